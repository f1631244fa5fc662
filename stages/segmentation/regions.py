"""Regions: the pixels of one class in one image, and their mean feature.

The feature-space methods of thesis section 2.2.1 were written for one vector a sample. A dense
feature map has thousands of vectors, which differ mostly by their position. What differs from one
cow to the next is the mean of each cow. So a sample of these methods is a region here, and all
pixels of a region are shifted by the same vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID
from stages.models.blocks import nearest_pixels


def labels_at(masks: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Reduce masks (B, H, W) to the features' resolution (h, w), by each cell's first pixel.

    Row i of the features has the mask rows from floor(i * H / h) to before floor((i + 1) * H / h);
    columns likewise. These pixels are its cell. Convolutions of stride 2 with symmetric padding
    centre an output on the first pixel, not on the middle one (docs/choices.md).

    Returns
    -------
    Tensor
        (B, h, w) int64.
    """
    return nearest_pixels(masks, size).long()


def fill_cells(values: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Give all mask pixels of a cell the value of its feature pixel.

    :func:`labels_at` picks the same values again.

    Parameters
    ----------
    values
        (B, h, w).
    size
        (H, W) of the masks, h and w or larger.

    Returns
    -------
    Tensor
        (B, H, W).
    """
    rows, columns = (
        ((torch.arange(side, device=values.device) + 1) * count - 1) // side
        for side, count in zip(size, values.shape[1:], strict=True)
    )
    return values.index_select(2, columns).index_select(1, rows)  # whole rows are copied last


def count_pixels(masks: Tensor) -> Tensor:
    """Count the pixels of each value in masks (B, H, W) uint8: (B, 256) float32."""
    pixels = masks.flatten(1).long()
    counts = torch.zeros(len(masks), VOID + 1, device=masks.device)
    return counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=torch.float32))


def draw_allowed(allowed: Tensor, uniform: Tensor) -> Tensor:
    """Draw one allowed column of each row; the first column where none is allowed.

    Parameters
    ----------
    allowed
        (B, n) bool.
    uniform
        (B, n) random numbers in 0..1.

    Returns
    -------
    Tensor
        (B,) int64.
    """
    return torch.where(allowed, uniform, -1.0).argmax(1)


@dataclass
class Regions:
    """The regions of a batch.

    Attributes
    ----------
    features
        (B, C, h, w).
    labels
        (B, h, w) int64.
    one_hot
        (B, K, h*w) in the features' type, 1 where the pixel is of the class.
    present
        (B, K) bool: which image has which class.
    centres
        (B, K, C) mean features, 0 where there is no pixel.
    """

    features: Tensor
    labels: Tensor
    one_hot: Tensor
    present: Tensor
    centres: Tensor

    @classmethod
    def of(cls, features: Tensor, masks: Tensor, num_classes: int) -> Regions:
        """Find the regions of features (B, C, h, w) under masks (B, H, W)."""
        labels = labels_at(masks, features.shape[2:])
        index = torch.where(labels == VOID, num_classes, labels).flatten(1)  # (B, h*w)
        one_hot = F.one_hot(index, num_classes + 1)[..., :num_classes].to(features.dtype)
        one_hot = one_hot.transpose(1, 2)
        counts = one_hot.sum(2)  # (B, K)
        sums = torch.einsum("bkp,bcp->bkc", one_hot, features.flatten(2))
        return cls(features, labels, one_hot, counts > 0, sums / counts.clamp(min=1)[..., None])

    def shifted(self, shifts: Tensor) -> Tensor:
        """Shift the features of every region by its vector in (B, K, C), void pixels by none."""
        by_pixel = torch.einsum("bkp,bkc->bcp", self.one_hot, shifts)
        return self.features + by_pixel.unflatten(2, self.labels.shape[1:])

    def others(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw for each region ``count`` different other images of the batch that have its class.

        Returns
        -------
        positions
            (B, K, count) int64.
        enough
            (B, K) bool: whether the region is present and there are ``count`` such images.
        """
        batch, classes = self.present.shape
        device = self.present.device
        draws = torch.rand(batch, batch, classes, generator=rng, device=device)  # [i, j, k]
        draws = draws.masked_fill(~self.present[None], -1.0)
        draws.diagonal(dim1=0, dim2=1).fill_(-1.0)  # not the region itself
        if batch < count:
            positions = torch.zeros(batch, classes, count, dtype=torch.int64, device=device)
            return positions, torch.zeros_like(self.present)
        best = draws.topk(count, dim=1)
        return best.indices.transpose(1, 2), (best.values[:, -1] >= 0) & self.present
