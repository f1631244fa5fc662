"""Manifold mixup on features and masks (Verma et al. 2019, section 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from typing_extensions import Self, override

from featurestore.dataset import Batch
from stages.augment.base import Augmented, FeatureAugmenter, Labelled, SourceConfig


class MixupConfig(SourceConfig):
    """Distribution of the mixing fraction."""

    augmenter: Literal["mixup"]
    alpha: float = Field(0.2, gt=0, description="parameter of the Beta distribution")

    @model_validator(mode="after")
    def _one_mask(self) -> Self:
        if "copy_paste" in self.augment:
            raise ValueError(
                "copy_paste needs one mask a sample, mixup has two; remove one of them"
            )
        return self


class Mixup(FeatureAugmenter):
    """``s * x_i + (1 - s) * x_j`` with s from Beta(alpha, alpha), one s a batch.

    The cross-entropies with both masks are mixed in the same way.
    """

    config: MixupConfig

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        alpha, masks = self.config.alpha, batch.masks
        order = torch.randperm(len(masks), generator=rng, device=masks.device)
        fraction = float(np.random.default_rng(rng.initial_seed()).beta(alpha, alpha))
        mixed = fraction * batch.features + (1 - fraction) * batch.features[order]
        targets = [(masks, fraction), (masks[order], 1 - fraction)]
        return Augmented([Labelled(mixed, targets, self.config.weight)])
