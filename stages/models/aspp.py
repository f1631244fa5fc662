"""Atrous spatial pyramid pooling (Chen et al. 2017), fast on small feature maps on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from stages.models.blocks import autocast_dtype, normalised

Tap = tuple[int, int]  # row and column, 0 to 2, in a 3 x 3 kernel
Window = tuple[slice, ...]  # of (B, h, w)
DENSE = 0.5  # PyTorch's convolution is faster when more of its products than this read no padding


class ASPP(nn.Module):
    """torchvision's ASPP: equal tensors and tensor names, equal results to rounding.

    Parameters
    ----------
    in_channels
        C.
    width
        A, the channels of each branch and of the result.
    rates
        Dilations of the 3 x 3 branches.
    dropout
        Probability of dropping a value of the result, 0 to 1; default: torchvision's 0.5.
    """

    def __init__(
        self, in_channels: int, width: int, rates: Sequence[int], dropout: float = 0.5
    ) -> None:
        super().__init__()
        pointwise = normalised(nn.Conv2d(in_channels, width, 1, bias=False))
        atrous = [normalised(AtrousConv(in_channels, width, rate)) for rate in rates]
        pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *normalised(nn.Conv2d(in_channels, width, 1, bias=False))
        )
        self.convs = nn.ModuleList([pointwise, *atrous, pooled])
        self.project = nn.Sequential(
            *normalised(nn.Conv2d(len(self.convs) * width, width, 1, bias=False)),
            nn.Dropout(dropout),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, h, w)."""
        *branches, pooled = (branch(features) for branch in self.convs)
        return self.project(torch.cat([*branches, pooled.expand_as(branches[0])], dim=1))


class AtrousConv(nn.Conv2d):
    """A 3 x 3 convolution without bias, padded by its dilation, that skips products with padding.

    On 32 x 32 features (images of 256 x 256) 56%, 25% and 11% of the products of ASPP's rates 12,
    24 and 36 read a pixel; at rate 36 only the middle tap does. Parameters and results (to
    rounding) are those of ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, rate: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=rate, dilation=rate, bias=False)
        self.rate = rate

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, A, h, w)."""
        height, width = features.shape[-2:]
        inside = max(height, 3 * height - 2 * self.rate), max(width, 3 * width - 2 * self.rate)
        if torch.compiler.is_exporting():  # exported programs need one standard operation
            return super().forward(features)
        if self.rate >= max(height, width):
            return F.conv2d(features, self.weight[:, :, 1:2, 1:2])
        dtype = autocast_dtype(features)
        # PyTorch 2.14's gradient of the weight is NaN, or crashes, on a CPU with bfloat16 units.
        is_odd = self.in_channels > 16 and self.in_channels % 16 != 0
        is_broken = dtype == torch.bfloat16 and self.rate > 1 and is_odd
        is_dense = inside[0] * inside[1] > DENSE * 9 * height * width
        if features.device.type != "cpu" or (is_dense and not is_broken):
            return super().forward(features)
        return _SumOfTaps.apply(features.to(dtype), self.weight.to(dtype), self.rate)


class _Context(FunctionCtx):  # typed for _SumOfTaps
    rate: int
    saved_tensors: tuple[Tensor, Tensor]  # features (B, C, h, w), weight (A, C, 3, 3)
    needs_input_grad: tuple[bool, ...]


class _SumOfTaps(Function):
    """The sum of each tap's matrix product over the pixels it reads, in float32 or float64."""

    @staticmethod
    def forward(ctx: _Context, features: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.rate = rate
        pixels = features.permute(0, 2, 3, 1)  # (B, C, h, w) -> (B, h, w, C)
        exact = torch.promote_types(pixels.dtype, torch.float32)
        total = pixels.new_zeros(*pixels.shape[:3], len(weight), dtype=exact)
        for (row, column), source, target in taps(pixels.shape[1:3], rate):
            total[target] += pixels[source] @ weight[:, :, row, column].T
        return total.to(features.dtype).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        features, weight = ctx.saved_tensors
        pixels, gradient = features.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
        exact = torch.promote_types(pixels.dtype, torch.float32)
        grad_features = torch.zeros_like(pixels, dtype=exact) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight)
        for (row, column), source, target in taps(pixels.shape[1:3], ctx.rate):
            reached = gradient[target].flatten(0, 2)  # (n, A)
            grad_weight[:, :, row, column] = reached.T @ pixels[source].flatten(0, 2)
            if grad_features is not None:
                change = reached @ weight[:, :, row, column]  # (n, C)
                grad_features[source] += change.view(pixels[source].shape)
        if grad_features is not None:
            grad_features = grad_features.to(features.dtype).permute(0, 3, 1, 2)
        return grad_features, grad_weight, None


def taps(size: Sequence[int], rate: int) -> list[tuple[Tap, Window, Window]]:
    """List the taps that read a pixel of (h, w) = ``size``.

    Returns
    -------
    list of tuple
        The tap, the pixels (B, h, w) that it reads, and the pixels that it adds to.
    """
    rows, columns = (_taps_of_axis(side, rate) for side in size)
    return [
        ((row, column), (slice(None), top, left), (slice(None), lower, right))
        for (row, top, lower), (column, left, right) in product(rows, columns)
    ]


def _taps_of_axis(side: int, rate: int) -> list[tuple[int, slice, slice]]:
    """List (tap, pixels that it reads, pixels that it adds to) along one side."""
    return [
        (tap, slice(max(0, by), side + min(0, by)), slice(max(0, -by), side - max(0, by)))
        for tap, by in enumerate((-rate, 0, rate))
        if abs(by) < side
    ]
