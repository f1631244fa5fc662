"""Objects that change their class: what makes one object of a class differ from the next, carried over to another class."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.augment.new_masks import NewMasks
from stages.segmentation.class_statistics import ClassStatistics
from stages.segmentation.regions import labels_at


class ClassTransferConfig(SourceConfig):
    """Variant ``class-transfer``."""

    augmenter: Literal["class-transfer"]
    share: float = Field(
        default=1.0, gt=0, le=1
    )  # of the samples that it happens to; the others are added as they are

    @property
    def needs_classes(self) -> int:
        """Two things, and what they lie on."""
        return 3


class ClassTransfer(Augmenter):
    """``x + mu_d - mu_c`` for an object of class c that the new mask calls d; mu are the means of the classes' pixels.

    Feature transfer (Yin et al. 2019), all directions of the variation kept: classes with few objects get the variety of the others.
    """

    def __init__(self, config: ClassTransferConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight, self.nonnegative = config.weight, context.store.spec.nonnegative
        found = ClassStatistics.of(context.store, context.positions, context.accelerator.device)
        self.means = torch.zeros(
            VOID + 1, found.means.shape[1], device=found.means.device
        )  # void's pixels stay void, and where they are
        self.means[: len(found.means)] = found.means
        known = (
            (found.pixels > 0).cpu().numpy()
        )  # a class of slivers alone may have no feature pixel, and so no mean
        self.new_masks = NewMasks(["swap"], context.store, context.positions, config.share, known)

    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with an object of each image moved to another class."""
        masks = self.new_masks(batch.masks, rng)
        size = (batch.features.shape[2], batch.features.shape[3])
        change = (
            self.means[labels_at(masks, size)] - self.means[labels_at(batch.masks, size)]
        )  # (B, h, w, C)
        moved = batch.features + change.permute(0, 3, 1, 2)
        return Augmented(
            [
                Labelled(
                    moved.clamp(min=0) if self.nonnegative else moved, [(masks, 1.0)], self.weight
                )
            ]
        )
