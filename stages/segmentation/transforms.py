"""Random transformations of features together with their masks.

They are used in front of the decoder (feature augmentation), and in front of the discriminator
(DiffAugment, Zhao et al. 2020). With few images the discriminator memorises them. If it sees
real and generated features through the same differentiable transformation, it overfits less, and
the generator does not learn the transformation. A transformation is drawn for each mask
and applied to the mask, its real and its generated features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from featurestore import VOID
from stages.segmentation.folds import Folds, expand_channels, mirror, unfolded_channels
from stages.segmentation.regions import count_pixels, draw_allowed, fill_cells

SHIFT = 1 / 8  # largest shift as a fraction of a side, as in DiffAugment
CUT = 1 / 2  # fraction of a side, as in DiffAugment
DROPPED = 0.1  # fraction of the channels
PASTE_SHIFT = 1 / 4  # largest shift as a fraction of a side

Groups = list[Tensor]  # each (k, B, C, h, w), k draws of B masks
Transform = Literal["flip", "translation", "cutout", "channel_dropout", "copy_paste"]
USUAL: tuple[Transform, ...] = ("flip", "translation", "channel_dropout", "cutout")


def augment(
    groups: list[Tensor], masks: Tensor, policy: Sequence[str], rng: torch.Generator, folds: Folds
) -> tuple[list[Tensor], Tensor]:
    """Apply the transformations of ``policy``, in its order.

    Parameters
    ----------
    groups
        Each (k*B, C, h, w), k draws of B masks.
    masks
        (B, H, W) uint8; h and w or larger.
    policy
        Names in :data:`TRANSFORMS`.
    rng
        Source of the random numbers, on the tensors' device.
    folds
        Layers of the features, as ``folds`` of the store's spec gives them.

    Returns
    -------
    groups, masks
        Of the same shapes. What a transformation leaves empty is 0 in features and void in masks.
    """
    groups = [group.unflatten(0, (-1, len(masks))) for group in groups]
    for name in policy:
        groups, masks = TRANSFORMS[name](groups, masks, rng, folds)
    return [group.flatten(0, 1) for group in groups], masks


def flip(
    groups: Groups, masks: Tensor, rng: torch.Generator, folds: Folds
) -> tuple[Groups, Tensor]:
    """Mirror half of the samples, left and right."""
    mirrored = torch.rand(len(masks), generator=rng, device=masks.device) < 0.5
    flipped = [torch.where(mirrored[:, None, None, None], mirror(x, folds), x) for x in groups]
    return flipped, torch.where(mirrored[:, None, None], masks.flip(-1), masks)


def translation(
    groups: Groups, masks: Tensor, rng: torch.Generator, folds: Folds
) -> tuple[Groups, Tensor]:
    """Shift each sample by up to an eighth of its sides, by whole feature pixels.

    Masks are shifted by as many of their pixels, rounded.
    """
    uniform = torch.rand(len(masks), 2, generator=rng, device=masks.device)
    return _translate(groups, masks, uniform.T, SHIFT)


def _translate(
    groups: Groups, masks: Tensor, uniform: Tensor, fraction: float
) -> tuple[Groups, Tensor]:
    """Shift samples by up to ``fraction`` of their sides, by random numbers (2, B) in 0..1."""
    size = groups[0].shape[-2:]
    bounds = [int(side * fraction + 0.5) for side in size]
    shifts = [
        (draws * (2 * most + 1)).floor().long() - most
        for draws, most in zip(uniform, bounds, strict=True)
    ]
    moved = [_shift(x, shifts, size, 0) for x in groups]
    return moved, _shift(masks[None, :, None], shifts, size, VOID)[0, :, 0]


def _shift(x: Tensor, shifts: list[Tensor], size: torch.Size, fill: int) -> Tensor:
    """Move samples down and right.

    Parameters
    ----------
    x
        (k, B, channels, rows, columns).
    shifts
        Down and right, each (B,) int64, in pixels of maps of size ``size``.
    size
        (h, w).
    fill
        Value of the pixels that move in from outside.
    """
    for shift, dim in zip(shifts, (-2, -1), strict=True):
        pixels = x.shape[dim]
        by = (2 * shift * pixels + size[dim]) // (2 * size[dim])  # shift * pixels / size, rounded
        source = torch.arange(pixels, device=x.device) - by[:, None]  # (B, pixels)
        layout = (1, len(by), 1, pixels, 1) if dim == -2 else (1, len(by), 1, 1, pixels)
        outside = ((source < 0) | (source >= pixels)).view(layout)
        x = x.gather(dim, source.clamp(0, pixels - 1).view(layout).expand(x.shape))
        x = x.masked_fill(outside, fill)
    return x


def cutout(
    groups: Groups, masks: Tensor, rng: torch.Generator, folds: Folds
) -> tuple[Groups, Tensor]:
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
    kept_pixels = fill_cells(kept, masks.shape[1:])  # (B, H, W)
    return [x * kept[:, None] for x in groups], torch.where(kept_pixels, masks, VOID)


def channel_dropout(
    groups: Groups, masks: Tensor, rng: torch.Generator, folds: Folds
) -> tuple[Groups, Tensor]:
    """Empty a random tenth of the channels of each sample, as colour jitter does to images.

    All sub-pixels of a folded channel are emptied together.
    """
    size = (len(masks), unfolded_channels(folds))
    kept = torch.rand(size, generator=rng, device=masks.device) >= DROPPED
    kept = expand_channels(kept, folds)  # (B, C)
    return [x * kept[:, :, None, None] for x in groups], masks


def copy_paste(
    groups: Groups, masks: Tensor, rng: torch.Generator, folds: Folds
) -> tuple[Groups, Tensor]:
    """Paste a class of another sample over half of the samples.

    The pasted pixels are mirrored with probability 0.5 and shifted by up to a quarter of the sides:
    Copy-Paste (Ghiasi et al. 2021) and ClassMix (Olsson et al. 2021) of features. The class is any
    class of the other sample, except the one that covers most of it. A feature pixel is pasted
    where most of the mask pixels that it covers are of the class.
    """
    batch, device = len(masks), masks.device
    donors = torch.randperm(batch, generator=rng, device=device)
    counts = count_pixels(masks[donors])[:, :VOID]  # (B, 255)
    allowed = counts > 0
    allowed.scatter_(1, counts.argmax(1, keepdim=True), False)
    uniform = torch.rand(allowed.shape, generator=rng, device=device)
    classes = draw_allowed(allowed, uniform).to(masks.dtype)[:, None, None]
    draws = torch.rand(4, batch, generator=rng, device=device)
    pasted = allowed.any(1) & (draws[0] < 0.5)  # a donor with one class has nothing to give
    mirrored = (draws[1] < 0.5)[:, None, None]

    given = [x[:, donors] for x in groups]
    given = [torch.where(mirrored[..., None], mirror(x, folds), x) for x in given]
    objects = torch.where(mirrored, masks[donors].flip(-1), masks[donors])
    given, objects = _translate(given, objects, draws[2:], PASTE_SHIFT)
    region = (objects == classes) & pasted[:, None, None]  # (B, H, W)
    height, width = groups[0].shape[-2:]
    cells = F.adaptive_avg_pool2d(region.float(), (height, width)) > 0.5  # (B, h, w)
    composed = [torch.where(cells[:, None], new, x) for new, x in zip(given, groups, strict=True)]
    return composed, torch.where(region, classes, masks)


TRANSFORMS: dict[str, Callable[[Groups, Tensor, torch.Generator, Folds], tuple[Groups, Tensor]]] = {
    "flip": flip,
    "translation": translation,
    "cutout": cutout,
    "channel_dropout": channel_dropout,
    "copy_paste": copy_paste,
}
