"""Hard-example interpolation: towards the nearest hard sample of the class (thesis section 2.2.1, after Cheung and Yeung 2020, MODALS)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from featurestore import VOID
from featurestore.dataset import Batch
from stages.augment.base import Augmented, Augmenter, Context, Labelled, SourceConfig
from stages.segmentation.regions import Regions


class InterpolateConfig(SourceConfig):
    """Variant ``interpolate``."""

    augmenter: Literal["interpolate"]
    strength: float = Field(default=0.5, gt=0, le=1)  # lambda


class Interpolate(Augmenter):
    """``x + lambda * (s - m)`` with m the centre of x's region and s that of the nearest hard region of its class in the batch.

    The thesis takes the hardest of q candidates and does not say how many; here those are hard on which the decoder's present
    cross-entropy is above that of the region at hand.
    """

    def __init__(self, config: InterpolateConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        self.num_classes, self.nonnegative = (
            context.store.spec.num_classes,
            context.store.spec.nonnegative,
        )
        self.decoder = context.decoder

    @torch.no_grad()
    def augment(self, batch: Batch, rng: torch.Generator) -> Augmented:
        """One copy with every region moved that has a harder one of its class beside it."""
        regions = Regions.of(batch.features, batch.masks, self.num_classes)
        by = self.config.strength * self._towards(regions, self._losses(batch, regions))
        moved = regions.moved(by, nonnegative=self.nonnegative)
        return Augmented([Labelled(moved, [(batch.masks, 1.0)], self.config.weight)])

    def _losses(self, batch: Batch, regions: Regions) -> torch.Tensor:
        """(B, K) mean cross-entropy of each region, by the decoder as it is used for prediction."""
        self.decoder.eval()
        with self.accelerator.autocast():
            scores = self.decoder(batch.features, tuple(regions.labels.shape[1:]))
        self.decoder.train()
        by_pixel = F.cross_entropy(
            scores.float(), regions.labels, ignore_index=VOID, reduction="none"
        ).flatten(1)  # (B, h*w)
        return torch.einsum("bkp,bp->bk", regions.shares, by_pixel) / regions.shares.sum(2).clamp(
            min=1
        )

    def _towards(self, regions: Regions, losses: torch.Tensor) -> torch.Tensor:
        """(B, K, C) from each region's centre to that of the nearest harder one; 0 where there is none."""
        centres = regions.centres.transpose(0, 1)  # (K, B, C)
        distances = torch.cdist(centres, centres)  # (K, B, B)
        harder = (
            losses.T[:, None, :] > losses.T[:, :, None]
        )  # [k, i, j]: region j of class k is harder than region i
        usable = harder & regions.present.T[:, None, :] & regions.present.T[:, :, None]
        nearest = distances.masked_fill(~usable, torch.inf).min(2)
        hard = centres.gather(1, nearest.indices[..., None].expand_as(centres))
        return ((hard - centres) * nearest.values.isfinite()[..., None]).transpose(0, 1)
