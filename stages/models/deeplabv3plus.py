"""DeepLabV3+'s fusion of deep and fine layers (Chen et al. 2018, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP

FINE = 48  # channels of the fine layers, as in the paper


class DeepLabV3Plus(nn.Module):
    """ASPP over the layers of the grid, joined by the finest layers at their own resolution.

    segmentation_models_pytorch's decoder is not used: it upsamples by fixed factors, which need
    strides of 4 and 16, and reads exactly one fine and one deep layer.

    Parameters
    ----------
    folds
        (c, r) of each layer of the map; those with the largest r are the finest.
    width
        A, channels of the ASPP's branches and of the result.
    rates
        Dilations of the ASPP's 3 x 3 branches.

    Raises
    ------
    ValueError
        When no layer is folded, or all are.
    """

    def __init__(self, folds: Sequence[tuple[int, int]], width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [channels * factor**2 for channels, factor in folds]
        self.factor = max(factor for _, factor in folds)
        self.is_fine = [factor == self.factor > 1 for _, factor in folds]
        if len(set(self.is_fine)) < 2:
            raise ValueError("deeplabv3plus needs a layer finer than the grid, and one that is not")
        fine = sum(channels for channels, factor in folds if factor == self.factor)
        deep = sum(
            size for size, is_fine in zip(self.sizes, self.is_fine, strict=True) if not is_fine
        )
        reduced = min(FINE, width)
        self.aspp = ASPP(deep, width, rates)
        self.reduce = _convolution(fine, reduced, 1)
        self.fuse = nn.Sequential(
            _convolution(width + reduced, width, 3), _convolution(width, width, 3)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, r*h, r*w)."""
        blocks = list(zip(features.split(self.sizes, 1), self.is_fine, strict=True))
        fine = F.pixel_shuffle(torch.cat([x for x, is_fine in blocks if is_fine], 1), self.factor)
        fine = self.reduce(fine.contiguous(memory_format=torch.channels_last))
        deep = self.aspp(torch.cat([x for x, is_fine in blocks if not is_fine], 1))
        deep = F.interpolate(deep, fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.fuse(torch.cat([deep, fine], 1))


def _convolution(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
