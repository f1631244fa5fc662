"""DeepLabv3+ (Chen et al. 2018) on a map of several layers, of which some are folded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.aspp import ASPP
from stages.models.blocks import normalised

LOW_LEVEL = 48  # channels of a finer layer after its 1 x 1 convolution, at most (section 4.1)


class DeepLabV3Plus(nn.Module):
    """ASPP of the layers on the grid, refined by the layers finer than the grid.

    Each finer layer is unfolded to its stored size, and a 1 x 1 convolution reduces it to 48
    channels, or keeps fewer. The ASPP's result and all finer layers are upsampled bilinearly to
    the size of the finest one, concatenated, and pass two 3 x 3 convolutions.

    The paper has one finer layer, of stride 4, and features of stride 16.
    segmentation_models_pytorch's ``DeepLabV3PlusDecoder`` has one finer layer too, upsamples by a
    fixed factor with aligned corners, takes exactly three rates, and has one 3 x 3 convolution
    after the concatenation, where the paper found two to be better.

    Parameters
    ----------
    folds
        Channels c and fold r of each layer, which has c*r*r channels of the map; r = 1 is a layer
        on the grid. At least one layer is on the grid and one is finer.
    width
        A, the channels of the ASPP, of the 3 x 3 convolutions and of the result.
    rates
        Dilations of the ASPP's 3 x 3 branches.
    dropout
        Probability of dropping a value of the ASPP's result, 0 to 1.

    Raises
    ------
    ValueError
        When no layer is on the grid, or none is finer.
    """

    def __init__(
        self,
        folds: Sequence[Sequence[int]],
        width: int,
        rates: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.factors = [factor for _, factor in folds]
        self.sizes = [channels * factor**2 for channels, factor in folds]
        if not has_pyramid(folds):
            layers = ", ".join(f"{channels} channels folded {factor}" for channels, factor in folds)
            message = "deeplabv3plus needs a layer on the grid (folded 1) and a finer one"
            raise ValueError(f"{message}, found {layers}; store a layer of stride 4")
        on_grid = sum(channels for channels, factor in folds if factor == 1)
        finer = [channels for channels, factor in folds if factor > 1]
        reduced = [min(LOW_LEVEL, channels) for channels in finer]
        self.aspp = ASPP(on_grid, width, rates, dropout)
        self.reduce = nn.ModuleList(
            normalised(nn.Conv2d(channels, out, 1, bias=False))
            for channels, out in zip(finer, reduced, strict=True)
        )
        self.refine = nn.Sequential(separable(width + sum(reduced), width), separable(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, r*h, r*w), r of the finest layer."""
        blocks = list(zip(features.split(self.sizes, dim=1), self.factors, strict=True))
        on_grid = torch.cat([block for block, factor in blocks if factor == 1], dim=1)
        unfolded = (F.pixel_shuffle(block, factor) for block, factor in blocks if factor > 1)
        finer = [reduce(layer) for reduce, layer in zip(self.reduce, unfolded, strict=True)]
        # ASPP's result is not channels last, and convolutions of the finest size would be slower.
        coarse = self.aspp(on_grid).contiguous(memory_format=torch.channels_last)
        most = max(self.factors)
        size = (most * features.shape[2], most * features.shape[3])
        layers = (
            layer
            if layer.shape[2:] == size
            else F.interpolate(layer, size, mode="bilinear", align_corners=False)
            for layer in [coarse, *finer]
        )
        return self.refine(torch.cat(list(layers), dim=1))


def has_pyramid(folds: Sequence[Sequence[int]]) -> bool:
    """Return whether a map has a layer on the grid and one that is finer."""
    factors = {factor for _, factor in folds}
    return 1 in factors and len(factors) > 1


def separable(in_channels: int, out_channels: int) -> nn.Sequential:
    """Make a 3 x 3 convolution of each channel, then a 1 x 1 convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        *normalised(nn.Conv2d(in_channels, out_channels, 1, bias=False)),
    )
