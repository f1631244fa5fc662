"""Random transformations in front of the discriminator (DiffAugment, Zhao et al. 2020), carried over to features.

With few images the discriminator learns them by heart. It then sees real and generated features through the same
differentiable transformation, so it learns less by heart and the generator does not learn the transformation.
A transformation is drawn for each mask; its real and its generated features, and the mask itself, undergo the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID

SHIFT = 1 / 8  # of a side, at most, as in DiffAugment
CUT = 1 / 2  # of a side, as in DiffAugment
DROPPED = 0.1  # of the channels
PASTE_SHIFT = 1 / 4  # of a side, at most

Groups = list[Tensor]
Transform = Literal["flip", "translation", "cutout", "channel_dropout", "copy_paste"]


def augment(
    groups: Groups, masks: Tensor, policy: Sequence[str], rng: torch.Generator
) -> tuple[Groups, Tensor]:
    """Apply the transformations of ``policy``, in its order.

    Parameters
    ----------
    groups
        Each (k*B, C, h, w), k draws of B masks.
    masks
        (B, H, W) uint8, H and W multiples of h and w.
    policy
        Names in :data:`TRANSFORMS`.
    rng
        Source of the random numbers, on the tensors' device.

    Returns
    -------
    groups, masks
        Of the same shapes. What a transformation leaves empty is 0 in features and void in masks.
    """
    for name in policy:
        groups, masks = TRANSFORMS[name](groups, masks, rng)
    return groups, masks


def _each(groups: Groups, masks: Tensor, function: Callable[[Tensor], Tensor]) -> Groups:
    """Apply a function of (k, B, C, h, w) to every group."""
    return [function(group.unflatten(0, (-1, len(masks)))).flatten(0, 1) for group in groups]


def flip(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Mirror half of the samples, left and right."""
    mirrored = torch.rand(len(masks), generator=rng, device=masks.device) < 0.5
    flipped = _each(
        groups, masks, lambda x: torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    )
    return flipped, torch.where(mirrored[:, None, None], masks.flip(-1), masks)


def translation(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Shift each sample by up to an eighth of its sides, by whole feature pixels."""
    height, width = groups[0].shape[-2:]
    uniform = torch.rand(len(masks), 2, generator=rng, device=masks.device)
    shifts = [_whole(uniform[:, axis], size, SHIFT) for axis, size in enumerate((height, width))]
    moved = _each(groups, masks, lambda x: _shifted(x, shifts, (height, width), 0))
    return moved, _shifted(masks[None, :, None], shifts, (height, width), VOID)[0, :, 0]


def _whole(uniform: Tensor, size: int, share: float) -> Tensor:
    """Whole feature pixels from -share * size to share * size, of uniform numbers in 0..1."""
    most = int(size * share + 0.5)
    return (uniform * (2 * most + 1)).floor().long() - most


def _shifted(x: Tensor, shifts: list[Tensor], features: tuple[int, int], fill: int) -> Tensor:
    """x (k, B, channels, rows, columns) moved down and right by ``shifts``, each (B,), counted in pixels of maps of size ``features``."""
    for shift, dim, cells in ((shifts[0], -2, features[0]), (shifts[1], -1, features[1])):
        size = x.shape[dim]
        by = shift * (size // cells)
        source = (
            torch.arange(size, device=x.device) - by[:, None]
        )  # (B, size): where each pixel comes from
        inside = (source >= 0) & (source < size)
        layout = (1, len(by), 1, size, 1) if dim == -2 else (1, len(by), 1, 1, size)
        x = x.gather(dim, source.clamp(0, size - 1).view(layout).expand(x.shape)).masked_fill(
            ~inside.view(layout), fill
        )
    return x


def cutout(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Empty a rectangle of half the sides of each sample, its centre anywhere."""
    height, width = groups[0].shape[-2:]
    centre = torch.rand(len(masks), 2, generator=rng, device=masks.device)
    inside = []
    for axis, size in enumerate((height, width)):
        cut = int(size * CUT + 0.5)
        first = (centre[:, axis : axis + 1] * (size + 1 - cut % 2)).floor() - cut // 2  # (B, 1)
        places = torch.arange(size, device=masks.device)
        inside.append((places >= first) & (places < first + cut))
    kept = ~(inside[0][:, :, None] & inside[1][:, None, :])  # (B, h, w)
    of_mask = kept.repeat_interleave(masks.shape[1] // height, 1).repeat_interleave(
        masks.shape[2] // width, 2
    )
    return _each(groups, masks, lambda x: x * kept[:, None]), torch.where(of_mask, masks, VOID)


def channel_dropout(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Empty a tenth of the channels of each sample, others for each: what colour jitter is to images."""
    kept = torch.rand(len(masks), groups[0].shape[1], generator=rng, device=masks.device) >= DROPPED
    return _each(groups, masks, lambda x: x * kept[:, :, None, None]), masks


def copy_paste(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Paste a class of another sample over half of the samples, mirrored by half and shifted by up to a quarter of the sides.

    Copy-Paste (Ghiasi et al. 2021) and ClassMix (Olsson et al. 2021), of features: new layouts of real things. The class is any
    of the other sample's but the one that covers most of it; a feature pixel goes along where most of it is of that class.
    """
    batch, (height, width) = len(masks), groups[0].shape[-2:]
    tall, wide = masks.shape[1] // height, masks.shape[2] // width
    donors = torch.randperm(batch, generator=rng, device=masks.device)
    pixels = masks[donors].flatten(1).long()
    counts = torch.zeros(batch, VOID + 1, device=masks.device).scatter_add_(
        1, pixels, torch.ones_like(pixels, dtype=torch.float32)
    )
    counts = counts[:, :VOID]  # (B, 255)
    there = counts > 0
    there.scatter_(1, counts.argmax(1, keepdim=True), False)
    chances = torch.where(there, torch.rand(there.shape, generator=rng, device=masks.device), -1.0)
    draw = torch.rand(4, batch, generator=rng, device=masks.device)
    pasted = there.any(1) & (draw[0] < 0.5)  # a donor of one class alone has nothing to give
    chosen = chances.argmax(1).to(masks.dtype)[:, None, None]
    mirrored = draw[1] < 0.5

    def moved(x: Tensor, fill: int) -> Tensor:
        """(k, B, channels, rows, columns) of each sample's donor."""
        x = x[:, donors]
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return _shifted(
            x,
            [_whole(draw[2], height, PASTE_SHIFT), _whole(draw[3], width, PASTE_SHIFT)],
            (height, width),
            fill,
        )

    region = (moved(masks[None, :, None], VOID)[0, :, 0] == chosen) & pasted[
        :, None, None
    ]  # (B, H, W)
    cells = F.avg_pool2d(region.float(), (tall, wide)) > 0.5  # (B, h, w)
    composed = [
        torch.where(cells[:, None], moved(x, 0), x)
        for x in (group.unflatten(0, (-1, batch)) for group in groups)
    ]
    return [x.flatten(0, 1) for x in composed], torch.where(region, chosen, masks)


TRANSFORMS: dict[str, Callable[[Groups, Tensor, torch.Generator], tuple[Groups, Tensor]]] = {
    "flip": flip,
    "translation": translation,
    "cutout": cutout,
    "channel_dropout": channel_dropout,
    "copy_paste": copy_paste,
}
