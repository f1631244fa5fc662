"""Transforms of images and their masks, for a backbone that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ImageTransform = Literal["flip", "crop", "colour"]
CROP_SCALE = (0.5, 1.0)  # of the image's area
JITTER = 0.4  # brightness, contrast and saturation change by factors of 0.6 to 1.4


def build_transform(
    names: Sequence[ImageTransform], size: tuple[int, int]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Build transforms of torchvision for a batch; each sample is transformed by itself.

    Parameters
    ----------
    names
        ``flip`` (left and right, with probability 0.5), ``crop`` (random resized crop, sides of
        3:4 to 4:3), ``colour`` (brightness, contrast, saturation); applied in this order.
    size
        (H, W) of the images.

    Returns
    -------
    Callable
        Images (B, 3, H, W) uint8 and masks (B, H, W) uint8 to transformed ones of equal shape.
        Random numbers come from PyTorch's global generator of the CPU.
    """
    from torchvision import tv_tensors  # takes a second, which only this training should cost
    from torchvision.transforms import v2

    known: dict[str, Callable[[], Any]] = {
        "flip": v2.RandomHorizontalFlip,
        "crop": lambda: v2.RandomResizedCrop(size, scale=CROP_SCALE, antialias=True),
        "colour": lambda: v2.ColorJitter(JITTER, JITTER, JITTER),
    }
    steps = [make() for name, make in known.items() if name in names]

    def transform(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        pairs = []
        for image, mask in zip(images, masks, strict=True) if steps else ():
            pair = tv_tensors.Image(image), tv_tensors.Mask(mask)
            for step in steps:
                pair = step(*pair)
            pairs.append([value.as_subclass(Tensor) for value in pair])
        if not pairs:
            return images, masks
        first, second = (torch.stack(values) for values in zip(*pairs, strict=True))
        return first, second

    return transform
