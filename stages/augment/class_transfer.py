"""Class transfer: objects change their class and keep what sets them apart from others."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from typing_extensions import override

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Context, FeatureAugmenter, SourceConfig, VariantConfig
from stages.augment.new_masks import NewMasks
from stages.segmentation.regions import labels_at


class ClassTransferConfig(SourceConfig):
    """Fraction of the samples that are changed."""

    augmenter: Literal["class-transfer"]
    fraction: float = Field(
        1.0, gt=0, le=1, description="fraction of the samples changed; the others are added as real"
    )

    needs_stored_features: ClassVar[bool] = True
    needs_classes: ClassVar[int] = 3  # two classes of objects, and the background


class ClassTransfer(FeatureAugmenter):
    """``x + mu_d - mu_c`` for an object of class c that the new mask calls d.

    mu are the means of the classes' pixels. Feature transfer (Yin et al. 2019) with all directions
    of the variation kept: classes with few objects get the variety of the other classes.
    """

    config: ClassTransferConfig

    def __init__(self, config: VariantConfig, context: Context) -> None:
        super().__init__(config, context)
        statistics = context.class_statistics()
        # (256, C): a row a mask value; void pixels are not changed.
        self.means = F.pad(statistics.means, (0, 0, 0, VOID + 1 - self.spec.num_classes))
        # A class that has only slivers may have no feature pixel, and no mean.
        known = (statistics.pixels > 0).cpu().numpy()
        fraction = self.config.fraction
        self.new_masks = NewMasks(["swap"], self.store, context.positions, fraction, known)

    @override
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        masks, size = self.new_masks(batch.masks, rng), batch.features.shape[2:]
        old, new = (self.means[labels_at(each, size)] for each in (batch.masks, masks))
        shifted = batch.features + (new - old).permute(0, 3, 1, 2)  # (B, h, w, C) -> (B, C, h, w)
        return self.add(masks, self.clamp(shifted))
