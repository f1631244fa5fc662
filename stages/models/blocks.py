"""Small parts that several networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOID = 255


def xavier_(module: nn.Module, gain: float) -> nn.Module:
    """Xavier-normal weights and zero biases for every convolution and linear layer below ``module``."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def one_hot(
    masks: Tensor, num_classes: int, *, dtype: torch.dtype, size: tuple[int, int] | None = None
) -> Tensor:
    """Masks (B, H, W) uint8, 255 = void, as (B, num_classes + 1, h, w), channels last in memory; void is the last channel.

    ``size`` (h, w) picks the nearest pixels first, which equals resizing the one-hot map by nearest neighbour.
    """
    if size is not None and size != masks.shape[-2:]:
        masks = F.interpolate(masks.unsqueeze(1), size=size, mode="nearest").squeeze(1)
    values = torch.arange(num_classes + 1, dtype=torch.uint8, device=masks.device)
    values[-1] = VOID
    return (
        (masks.unsqueeze(-1) == values).to(dtype).permute(0, 3, 1, 2)
    )  # (B, h, w, K+1) -> (B, K+1, h, w)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """What convolutions of ``tensor`` compute in: autocast's type where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def instance_norm(x: Tensor) -> Tensor:
    """Instance normalisation without parameters; as group normalisation it leaves channels last in memory."""
    return F.group_norm(x, x.shape[1])


def parameter_free_norm(kind: str, channels: int) -> nn.Module:
    """``batch`` (SPADE's choice) or ``instance`` normalisation without learned scale and shift."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(channels, affine=False),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=False),
    }
    return makers[kind]()
