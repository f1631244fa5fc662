"""Hard-example interpolation: regions move towards the nearest hard region of their class.

Thesis section 2.2.1, after Cheung and Yeung 2020 (MODALS).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import RegionAugmenter, SourceConfig
from stages.segmentation.regions import Regions


class InterpolateConfig(SourceConfig):
    """Strength of the interpolation."""

    augmenter: Literal["interpolate"]
    strength: float = Field(0.5, gt=0, le=1, description="lambda")


class Interpolate(RegionAugmenter):
    """``x + lambda * (s - m)`` with m the centre of x's region and s that of a hard region.

    s is the nearest hard region of the class in the batch. The thesis takes the hardest of q
    candidates and does not define q. Here a region is hard if the decoder's present cross-entropy
    is higher on it than on the region at hand.
    """

    config: InterpolateConfig

    @override
    def shifts(self, batch: Batch, regions: Regions, rng: torch.Generator) -> Tensor:
        losses = self._losses(batch, regions).T  # (K, B)
        centres, present = regions.centres.transpose(0, 1), regions.present.T  # (K, B, C), (K, B)
        # [k, i, j]: whether region j of class k is harder than region i
        usable = (losses[:, None] > losses[..., None]) & present[:, None] & present[..., None]
        distances = torch.cdist(centres, centres)  # (K, B, B)
        nearest = distances.masked_fill(~usable, torch.inf).min(2)
        hard = centres.gather(1, nearest.indices[..., None].expand_as(centres))
        shifts = (hard - centres) * nearest.values.isfinite()[..., None]
        return self.config.strength * shifts.transpose(0, 1)

    def _losses(self, batch: Batch, regions: Regions) -> Tensor:
        """Compute the mean cross-entropy (B, K) of each region, by the decoder in evaluation."""
        self.decoder.eval()
        with self.accelerator.autocast():
            logits = self.decoder(batch.features, tuple(regions.labels.shape[1:])).float()
        self.decoder.train()
        losses = F.cross_entropy(logits, regions.labels, ignore_index=VOID, reduction="none")
        sums = torch.einsum("bkp,bp->bk", regions.one_hot, losses.flatten(1))
        return sums / regions.one_hot.sum(2).clamp(min=1)
