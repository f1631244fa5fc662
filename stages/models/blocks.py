"""Functions and small layers that several networks use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOID = 255
# SPADE uses ``batch``, without learned scale and shift.
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


def xavier_(module: nn.Module, gain: float) -> nn.Module:
    """Set Xavier-normal weights and zero biases in all convolutions and linear layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def normalised(convolution: nn.Conv2d) -> nn.Sequential:
    """Follow a convolution with BatchNorm and ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def one_hot(
    masks: Tensor, num_classes: int, *, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> Tensor:
    """Encode masks as one channel a class; void is the last channel.

    Parameters
    ----------
    masks
        (B, H, W) uint8 class indices, 255 = void.
    num_classes
        K, void not counted.
    dtype
        Type of the result.
    size
        (h, w) of the result, by :func:`nearest_pixels`. Default: (H, W).

    Returns
    -------
    Tensor
        (B, K + 1, h, w), channels last in memory.
    """
    if size is not None:
        masks = nearest_pixels(masks, size)
    masks = masks.clamp(max=num_classes)  # void becomes K
    values = torch.arange(num_classes + 1, dtype=torch.uint8, device=masks.device)
    # (B, h, w, K + 1) -> (B, K + 1, h, w)
    return (masks.unsqueeze(-1) == values).to(dtype).permute(0, 3, 1, 2)


def nearest_pixels(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize maps by nearest pixels: row i becomes row floor(i * H / h), columns likewise.

    Where h divides H, each cell of H / h rows gives its first one.

    Parameters
    ----------
    maps
        (..., H, W) of any type.
    size
        (h, w) of the result.

    Returns
    -------
    Tensor
        (..., h, w).
    """
    if maps.shape[-2:] == size:
        return maps
    rows, columns = (
        torch.arange(count, device=maps.device) * side // count
        for count, side in zip(size, maps.shape[-2:], strict=True)
    )
    return maps.index_select(-2, rows).index_select(-1, columns)


def reduced_size(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """Divide a size (h, w), rounded up."""
    return -(-size[0] // divisor), -(-size[1] // divisor)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which convolutions of ``tensor`` compute: autocast's, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class RandomProjection(nn.Module):
    """C channels -> P fixed orthonormal mixtures of them (after Sauer et al. 2021).

    A discriminator that sees few mixtures cannot rely on a few channels in which generated features
    are unrealistic, and its first layer is smaller by P / C. Sauer et al. (Projected GANs, section
    3.2) use random 1 x 1 convolutions; rows are orthonormal here: no direction counts twice, and P
    features have the variance of C on average.

    Parameters
    ----------
    channels, mixtures
        C, and P <= C.
    """

    weight: Tensor

    def __init__(self, channels: int, mixtures: int) -> None:
        super().__init__()
        rows = nn.init.orthogonal_(torch.empty(mixtures, channels))
        self.register_buffer("weight", rows.view(mixtures, channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, P, h, w)."""
        return F.conv2d(features, self.weight)
