"""3 x 3 convolutions with a quarter of the multiplications, for wide layers on the CPU.

Winograd's minimal filtering F(4x4, 3x3), Lavin and Gray 2016 ("Fast Algorithms for Convolutional
Neural Networks", section 4): an output tile of 4 x 4 is ``A' ((G g G') * (B' d B)) A``, with d the
input tile of 6 x 6 and g the filter. Over tiles and channels the products in the middle are 36
matrix products. cuDNN uses it by itself; oneDNN, which PyTorch uses on the CPU, dropped it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import autocast_dtype

TILE, WINDOW = 4, 6  # sides of an output tile, and of its input tile
B = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
G = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
A = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)

_enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Let :func:`conv2d` use PyTorch's convolution only, to count operations by definition."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def winograd_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.conv2d(x, weight, padding=1)`` to rounding.

    The error is about five times that of ``F.conv2d``: in float32, 1e-5 of the largest value.

    Parameters
    ----------
    x
        (N, I, H, W), on the CPU; fastest with channels last in memory, as the result is.
    weight
        (O, I, 3, 3). Its transform, four times as large, is kept for the backward pass.

    Returns
    -------
    Tensor
        (N, O, H, W).
    """
    (n, _, height, width), o = x.shape, len(weight)
    # Matrices for flattened input tiles (36, 36), filters (36, 9) and products (16, 36).
    one_sided = (torch.tensor(matrix, dtype=torch.float64) for matrix in (B, G, A))
    inputs, filters, outputs = (torch.kron(matrix, matrix).to(x.dtype) for matrix in one_sided)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + -width % TILE, 1, 1 + -height % TILE))
    # (N, h, w, I, 6, 6), h x w tiles
    tiles = padded.unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
    h, w = tiles.shape[1:3]
    tiles = inputs @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)
    filtered = (filters @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(WINDOW**2, o, -1)
    # (36, O, I) @ (36, I, N*h*w)
    products = filtered @ tiles.view(WINDOW**2, n * h * w, -1).transpose(1, 2)
    y = (outputs @ products.view(WINDOW**2, -1)).view(TILE, TILE, o, n, h, w)
    y = y.permute(3, 4, 0, 5, 1, 2).reshape(n, TILE * h, TILE * w, o)
    return y[:, :height, :width].permute(0, 3, 1, 2)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
) -> Tensor:
    """Compute :func:`torch.nn.functional.conv2d`, with :func:`winograd_conv2d` if it is faster."""
    if not is_faster(x, weight, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)
    y = winograd_conv2d(x, weight)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def is_faster(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: str | tuple[int, ...]
) -> bool:
    """Return whether :func:`conv2d` uses Winograd's filtering (``benchmarks/winograd.py``).

    Only in float32: with fewer digits the transforms lose too much precision.
    """
    float32_on_cpu = x.device.type == "cpu" and autocast_dtype(x) == x.dtype == torch.float32
    if not (_enabled and float32_on_cpu):
        return False
    narrow, wide = sorted(weight.shape[:2])
    tiles = len(x) * x.shape[2] * x.shape[3] // TILE**2
    suits = weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1)
    return suits and narrow >= 128 and wide >= 256 and tiles >= 32


class WideConv2d(nn.Conv2d):
    """A convolution that uses Winograd's filtering if that is faster; see :func:`conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W')."""
        return conv2d(input, self.weight, self.bias, self.stride, self.padding)
