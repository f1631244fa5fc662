"""Atrous spatial pyramid pooling (Chen et al. 2017) on feature maps that are hardly larger than its convolutions' holes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Tap = tuple[int, int]  # row and column, 0 to 2, in a 3 x 3 kernel
DENSE = 0.5  # with a larger share of products that are not with padding, the library's convolution is faster


class ASPP(nn.Module):
    """torchvision's, with its tensors under its names, and its results to rounding; faster on a CPU.

    Parameters
    ----------
    in_channels
        C.
    width
        A, the channels of each branch and of the result.
    rates
        Dilations of the 3 x 3 branches.
    """

    def __init__(self, in_channels: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        pointwise = _normalised(nn.Conv2d(in_channels, width, 1, bias=False))
        atrous = [_normalised(AtrousConv(in_channels, width, rate)) for rate in rates]
        pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *_normalised(nn.Conv2d(in_channels, width, 1, bias=False))
        )
        self.convs = nn.ModuleList([pointwise, *atrous, pooled])
        self.project = nn.Sequential(
            *_normalised(nn.Conv2d(len(self.convs) * width, width, 1, bias=False)), nn.Dropout(0.5)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, h, w)."""
        *branches, pooled = (branch(features) for branch in self.convs)
        scores: Tensor = self.project(torch.cat([*branches, pooled.expand_as(branches[0])], dim=1))
        return scores


def _normalised(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


class AtrousConv(nn.Conv2d):
    """A 3 x 3 convolution without bias, padded by its dilation, that leaves products with padding out.

    On 32 x 32 features, of 256 x 256 images, ASPP's rates 12, 24 and 36 find a pixel in 56%, 25% and 11% of their products; at
    rate 36 all taps but the middle one lie outside, always. Parameters and results (to rounding) are those of ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, rate: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False)
        self.rate = rate

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, h, w)."""
        height, width = features.shape[-2:]
        inside = max(height, 3 * height - 2 * self.rate), max(width, 3 * width - 2 * self.rate)
        if torch.compiler.is_exporting():  # one operation of the exchange format
            return super().forward(features)
        if self.rate >= max(height, width):
            return F.conv2d(features, self.weight[:, :, 1:2, 1:2])
        if features.device.type != "cpu" or inside[0] * inside[1] > DENSE * 9 * height * width:
            return super().forward(features)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            features, weight = features.to(dtype), weight.to(dtype)
        scores: Tensor = _SumOfTaps.apply(features, weight, self.rate)
        return scores


class _SumOfTaps(Function):
    """Each tap's matrix product, where the tap falls on pixels, added up in float32 at least."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.rate = rate
        pixels = features.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        exact = torch.promote_types(pixels.dtype, torch.float32)
        total = pixels.new_zeros(*pixels.shape[:3], len(weight), dtype=exact)
        for (row, column), source, target in taps((features.shape[2], features.shape[3]), rate):
            total[target] += pixels[source] @ weight[:, :, row, column].T
        return total.to(features.dtype).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        pixels, ours = features.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        exact = torch.promote_types(pixels.dtype, torch.float32)
        of_features = torch.zeros_like(pixels, dtype=exact) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight)
        for (row, column), source, target in taps((features.shape[2], features.shape[3]), ctx.rate):
            part = ours[target].flatten(0, 2)  # (n, A)
            of_weight[:, :, row, column] = part.T @ pixels[source].flatten(0, 2)
            if of_features is not None:
                of_features[source] += (part @ weight[:, :, row, column]).view(pixels[source].shape)
        return (
            None if of_features is None else of_features.to(features.dtype).permute(0, 3, 1, 2),
            of_weight,
            None,
        )


def taps(
    size: tuple[int, int], rate: int
) -> list[tuple[Tap, tuple[slice, ...], tuple[slice, ...]]]:
    """Those that fall on a pixel, each with the pixels (B, h, w) that it reads and those that it adds to."""
    found = []
    for row in range(3):
        for column in range(3):
            down, across = (row - 1) * rate, (column - 1) * rate
            if abs(down) < size[0] and abs(across) < size[1]:
                source = (
                    slice(None),
                    *(
                        slice(max(0, by), length + min(0, by))
                        for by, length in zip((down, across), size, strict=True)
                    ),
                )
                target = (
                    slice(None),
                    *(
                        slice(max(0, -by), length - max(0, by))
                        for by, length in zip((down, across), size, strict=True)
                    ),
                )
                found.append(((row, column), source, target))
    return found
