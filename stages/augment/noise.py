"""Noise: additive and multiplicative Gaussian noise.

"Perturb" of Kumar et al. 2019; thesis section 2.2.1.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Context, FeatureAugmenter, SourceConfig, VariantConfig
from stages.segmentation.regions import labels_at


class NoiseConfig(SourceConfig):
    """Strengths of the noise, and the deviation that scales it."""

    augmenter: Literal["noise"]
    additive: float = Field(0.5, ge=0, description="in standard deviations of the channel")
    multiplicative: float = Field(0.1, ge=0, description="deviation of the factor")
    deviation: Literal["channel", "class"] = Field(
        "channel", description="deviation over all pixels, or over those of the pixel's class"
    )

    needs_stored_features: ClassVar[bool] = True


class Noise(FeatureAugmenter):
    """``x * (1 + m * e) + a * s * n`` with e, n from N(0, 1) at every value.

    s is the standard deviation of the channel.
    """

    config: NoiseConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        overall = torch.from_numpy(self.store.stats.std).float().to(self.accelerator.device)  # (C,)
        self.deviations = overall.repeat(VOID + 1, 1)  # (256, C): a row a mask value
        if self.config.deviation == "class":
            statistics = context.class_statistics()
            present = (statistics.images > 0).nonzero().flatten()
            self.deviations[present] = statistics.deviations[present]

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        features = batch.features

        def normal() -> Tensor:
            return torch.randn(features.shape, generator=rng, device=features.device)

        deviations = self.deviations[labels_at(batch.masks, features.shape[2:])]
        deviations = deviations.permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        scaled = features * (1 + self.config.multiplicative * normal())
        noisy = scaled + self.config.additive * deviations * normal()
        return self.add(batch.masks, self.clamp(noisy))
