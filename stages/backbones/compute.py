"""Features of a batch of images: to the device, through a frozen backbone, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from stages.backbones.backbone import Backbone


@dataclass
class Computed:
    """Features of B images.

    Attributes
    ----------
    features
        (B, c, h, w) of each layer as computed, on the device.
    stored
        (c, h, w) of each layer and image, contiguous and in the store's type, on the CPU.
    arrived
        On a GPU, set once ``stored`` is filled.
    """

    features: list[Tensor]
    stored: list[Sequence[Tensor]]
    arrived: torch.cuda.Event | None

    def layers(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Wait until the features are on the CPU, and return those of one image.

        Returns
        -------
        list of tuple
            (c, h, w) of each layer: as stored, and as computed.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        layers = zip(self.stored, self.features, strict=True)
        return [(stored[row], computed[row]) for stored, computed in layers]


def compute(
    images: Tensor, backbone: Backbone, accelerator: Accelerator, dtype: torch.dtype
) -> Computed:
    """Compute the features of images (B, 3, H, W) uint8; on a GPU nothing waits for the result.

    Parameters
    ----------
    images
        On the CPU.
    backbone
        On the accelerator's device.
    accelerator
        Device, and precision of the backbone.
    dtype
        Type of the stored features.
    """
    cuda = accelerator.device.type == "cuda"
    moved = (images.pin_memory() if cuda else images).to(accelerator.device, non_blocking=True)
    with accelerator.autocast():
        features = backbone(moved)
    stored = [converted(layer, dtype) for layer in features]
    arrived = None
    if cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    return Computed(features, stored, arrived)


def converted(features: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Convert features (B, c, h, w) to the store's type: (c, h, w) of each image, on the CPU."""
    if features.device.type == "cuda":
        stored = torch.empty(features.shape, dtype=dtype, device=features.device)
        pinned = torch.empty(features.shape, dtype=dtype, pin_memory=True)
        return list(pinned.copy_(stored.copy_(features), non_blocking=True))
    # Memory of one image is used again; that of a whole batch is new each time, a page fault every
    # 4 KB. PyTorch transposes matrices of one type in blocks, four times as fast.
    is_last = not features.is_contiguous()
    pixels = features.permute(0, 2, 3, 1).flatten(1, 2) if is_last else features  # (B, h*w, c)
    scratch = torch.empty(pixels.shape[1:], dtype=dtype)
    images = []
    for image in pixels:
        target = torch.empty(features.shape[1:], dtype=dtype)
        if is_last:
            target.flatten(1).copy_(scratch.copy_(image).t())
        else:
            target.copy_(image)
        images.append(target)
    return images
