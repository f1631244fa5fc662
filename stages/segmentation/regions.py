"""Regions: the pixels of one class in one image, and their mean feature.

The feature-space methods of chapter 2.2.1 were written for one vector a sample. A dense feature map has thousands of
vectors whose differences are mostly position; what differs from one cow to the next is in the mean of each cow. So
here a sample of those methods is a region, and all pixels of a region move by the same vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID


def labels_at(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (B, H, W) uint8 at the features' resolution, (B, h, w) int64: each cell's first pixel.

    Not its middle one: convolutions of stride 2 with symmetric padding centre an output on that pixel (docs/choices.md).
    """
    return masks[:, :: masks.shape[1] // size[0], :: masks.shape[2] // size[1]].long()


@dataclass
class Regions:
    """The regions of a batch.

    Attributes
    ----------
    labels
        (B, h, w) int64.
    shares
        (B, K, h*w) float, 1 where the pixel is of the class.
    present
        (B, K) bool: which image has which class.
    centres
        (B, K, C) mean features, 0 where there is no pixel.
    features
        (B, C, h, w) themselves.
    """

    features: Tensor
    labels: Tensor
    shares: Tensor
    present: Tensor
    centres: Tensor

    @classmethod
    def of(cls, features: Tensor, masks: Tensor, num_classes: int) -> Regions:
        """Regions of features (B, C, h, w) and masks (B, H, W)."""
        labels = labels_at(masks, (features.shape[2], features.shape[3]))
        index = torch.where(labels == VOID, num_classes, labels).flatten(1)  # (B, h*w)
        shares = (
            F.one_hot(index, num_classes + 1)[..., :num_classes].to(features.dtype).transpose(1, 2)
        )
        counts = shares.sum(2)  # (B, K)
        centres = (
            torch.einsum("bkp,bcp->bkc", shares, features.flatten(2))
            / counts.clamp(min=1)[..., None]
        )
        return cls(features, labels, shares, counts > 0, centres)

    def moved(self, by: Tensor, *, nonnegative: bool) -> Tensor:
        """(B, C, h, w) features, every region moved by its vector in (B, K, C), void pixels by none; at 0 and above if so wanted."""
        moved = self.features + torch.einsum("bkp,bkc->bcp", self.shares, by).unflatten(
            2, self.labels.shape[1:]
        )
        return moved.clamp(min=0) if nonnegative else moved

    def others(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """For each region ``count`` different images of the batch, chosen at random, that have its class too.

        Returns
        -------
        positions (B, K, count) int64, found (B, K) bool: whether there are so many
        """
        batch, classes = self.present.shape
        draws = torch.rand(
            batch, batch, classes, generator=rng, device=self.present.device
        )  # [i, j, k]
        draws = draws.masked_fill(~self.present[None], -1.0)
        draws.diagonal(dim1=0, dim2=1).fill_(-1.0)  # not the region itself
        if batch < count:
            return torch.zeros(
                batch, classes, count, dtype=torch.int64, device=draws.device
            ), torch.zeros_like(self.present)
        best = draws.topk(count, dim=1)
        return best.indices.transpose(1, 2), (best.values[:, -1] >= 0) & self.present
