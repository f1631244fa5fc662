"""Manifold mixup on features and masks (Verma et al. 2019, section 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig


class MixupConfig(SourceConfig):
    """Variant ``mixup``."""

    augmenter: Literal["mixup"]
    alpha: float = Field(default=0.2, gt=0)  # of the Beta distribution

    @model_validator(mode="after")
    def _one_mask(self) -> Self:
        if "copy_paste" in self.perturb:
            raise ValueError(
                "perturb: copy_paste pastes by one mask, and mixup has two; leave one of them out"
            )
        return self


class Mixup(Augmenter):
    """``s * x_i + (1 - s) * x_j`` with s from Beta(alpha, alpha), one a batch; the cross-entropies with both masks in the same shares."""

    def __init__(self, config: MixupConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """The batch mixed with itself in another order."""
        order = torch.randperm(len(batch.masks), generator=rng, device=batch.masks.device)
        share = float(
            np.random.default_rng(rng.initial_seed()).beta(self.config.alpha, self.config.alpha)
        )
        mixed = share * batch.features + (1 - share) * batch.features[order]
        return Augmented(
            [
                Labelled(
                    mixed,
                    [(batch.masks, share), (batch.masks[order], 1 - share)],
                    self.config.weight,
                )
            ]
        )
