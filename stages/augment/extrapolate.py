"""Hard-example extrapolation: away from the centre of the class (thesis section 2.2.1, after Cheung and Yeung 2020, MODALS)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import Regions


class ExtrapolateConfig(SourceConfig):
    """Variant ``extrapolate``."""

    augmenter: Literal["extrapolate"]
    strength: float = Field(default=0.5, gt=0)  # lambda


class Extrapolate(Augmenter):
    """``x + lambda * (m - mu)`` with m the centre of x's region and mu that of its class over the whole store."""

    def __init__(self, config: ExtrapolateConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self.num_classes, self.nonnegative = (
            context.store.spec.num_classes,
            context.store.spec.nonnegative,
        )
        self.means = ClassStatistics.of(
            context.store, context.positions, context.accelerator.device
        ).means

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with every region moved."""
        regions = Regions.of(batch.features, batch.masks, self.num_classes)
        moved = regions.moved(
            self.config.strength * (regions.centres - self.means), nonnegative=self.nonnegative
        )
        return Augmented([Labelled(moved, [(batch.masks, 1.0)], self.config.weight)])
