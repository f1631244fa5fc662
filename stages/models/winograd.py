"""3 x 3 convolutions with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3), for wide layers on the CPU.

Lavin and Gray 2016 ("Fast Algorithms for Convolutional Neural Networks", section 4): an output tile of 4 x 4 is
``A' ((G g G') * (B' d B)) A``, with d the input tile of 6 x 6 and g the filter; over tiles and channels the products in the
middle are 36 matrix products. cuDNN chooses this by itself; oneDNN, which PyTorch uses on the CPU, has it no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE, WINDOW = 4, 6  # sides of an output tile, and of the input that it needs
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
    """Within it :func:`conv2d` is PyTorch's own everywhere: to count what a step costs by definition, on any device."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def _transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What takes flattened input tiles (36), filters (9) and products (36) over, as matrices: (36, 36), (36, 9), (16, 36)."""
    one_sided = (torch.tensor(matrix, dtype=torch.float64) for matrix in (B, G, A))
    inputs, filters, outputs = (torch.kron(matrix, matrix).to(dtype) for matrix in one_sided)
    return inputs, filters, outputs


def winograd_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(x, weight, padding=1)`` to rounding, some five times its error: 1e-5 of the largest value in float32.

    Parameters
    ----------
    x
        (N, I, H, W), on the CPU; best with channels last in memory, as the result is.
    weight
        (O, I, 3, 3). Its transform, four times as large, is kept for the backward pass.

    Returns
    -------
    Tensor
        (N, O, H, W).
    """
    (n, _, height, width), o = x.shape, len(weight)
    inputs, filters, outputs = _transforms(x.dtype)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + -width % TILE, 1, 1 + -height % TILE))
    tiles = padded.unfold(1, WINDOW, TILE).unfold(
        2, WINDOW, TILE
    )  # (N, h, w, I, 6, 6), h x w tiles
    h, w = tiles.shape[1:3]
    tiles = (inputs @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)).view(
        WINDOW**2, n * h * w, -1
    )
    filtered = (filters @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(WINDOW**2, o, -1)
    products = filtered @ tiles.transpose(1, 2)  # (36, O, I) @ (36, I, N*h*w)
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
    """:func:`torch.nn.functional.conv2d`, by :func:`winograd_conv2d` where that is faster (``benchmarks/winograd.py``)."""
    if not is_faster(x, weight, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)
    y = winograd_conv2d(x, weight)
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def is_faster(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: str | tuple[int, ...]
) -> bool:
    """Whether :func:`conv2d` takes the shorter way: in float32 alone, for with fewer digits the transforms lose too many."""
    if (
        not _enabled
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    narrow, wide = sorted(weight.shape[:2])
    tiles = len(x) * x.shape[2] * x.shape[3] // TILE**2
    suits = weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1)
    return suits and narrow >= 128 and wide >= 256 and tiles >= 32


class WideConv2d(nn.Conv2d):
    """A convolution that takes :func:`conv2d`'s shorter way where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W')."""
        return conv2d(input, self.weight, self.bias, self.stride, self.padding)
