"""Perturb: additive and multiplicative Gaussian noise (Kumar et al. 2019; thesis section 2.2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import labels_at


class NoiseConfig(SourceConfig):
    """Variant ``noise``."""

    augmenter: Literal["noise"]
    additive: float = Field(default=0.5, ge=0)  # standard deviations of the channel
    multiplicative: float = Field(default=0.1, ge=0)
    deviation: Literal["channel", "class"] = (
        "channel"  # of all pixels, or of those of the pixel's class
    )


class Noise(Augmenter):
    """``x * (1 + m * e) + a * s * n`` with e, n from N(0, 1) at every value, and s the channel's standard deviation."""

    def __init__(self, config: NoiseConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        store, device = context.store, context.accelerator.device
        overall = torch.from_numpy(store.stats.std).float().to(device)  # (C,)
        self.deviations = overall.repeat(VOID + 1, 1)  # (256, C): a row a mask value
        if config.deviation == "class":
            by_class = ClassStatistics.of(store, context.positions, device)
            there = by_class.images > 0
            self.deviations[: len(there)][there] = by_class.deviations[there]
        self.nonnegative = store.spec.nonnegative

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One noisy copy."""

        def noise() -> Tensor:
            return torch.randn(batch.features.shape, generator=rng, device=batch.features.device)

        labels = labels_at(batch.masks, (batch.features.shape[2], batch.features.shape[3]))
        deviations = self.deviations[labels].permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        noisy = (
            batch.features * (1 + self.config.multiplicative * noise())
            + self.config.additive * deviations * noise()
        )
        if self.nonnegative:  # as the backbone's are
            noisy = noisy.clamp(min=0)
        return Augmented([Labelled(noisy, [(batch.masks, 1.0)], self.config.weight)])
