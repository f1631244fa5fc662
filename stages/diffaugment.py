"""Random transformations in front of the discriminator (DiffAugment, Zhao et al. 2020), carried over to features.

With few photographs the discriminator learns them by heart. It then sees real and generated features through the same
differentiable transformation, so it learns less by heart and the generator does not learn the transformation.
A transformation is drawn for each mask; its real and its generated features, and the mask itself, undergo the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from featurestore import VOID

SHIFT = 1 / 8  # of a side, at most, as in DiffAugment
CUT = 1 / 2  # of a side, as in DiffAugment
DROPPED = 0.1  # of the channels

Groups = list[Tensor]


def augment(groups: Groups, masks: Tensor, policy: Sequence[str], rng: torch.Generator) -> tuple[Groups, Tensor]:
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
    flipped = _each(groups, masks, lambda x: torch.where(mirrored[:, None, None, None], x.flip(-1), x))
    return flipped, torch.where(mirrored[:, None, None], masks.flip(-1), masks)


def translation(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Shift each sample by up to an eighth of its sides, by whole feature pixels."""
    height, width = groups[0].shape[-2:]
    uniform = torch.rand(len(masks), 2, generator=rng, device=masks.device)
    shifts = []  # down and right, (B,) each
    for axis, size in enumerate((height, width)):
        most = int(size * SHIFT + 0.5)
        shifts.append((uniform[:, axis] * (2 * most + 1)).floor().long() - most)

    def moved(x: Tensor, fill: int) -> Tensor:
        """x (k, B, channels, rows, columns)."""
        for shift, dim, features in ((shifts[0], -2, height), (shifts[1], -1, width)):
            size = x.shape[dim]
            by = shift * (size // features)
            source = torch.arange(size, device=x.device) - by[:, None]  # (B, size): where each pixel comes from
            inside = (source >= 0) & (source < size)
            layout = (1, len(by), 1, size, 1) if dim == -2 else (1, len(by), 1, 1, size)
            x = x.gather(dim, source.clamp(0, size - 1).view(layout).expand(x.shape)).masked_fill(~inside.view(layout), fill)
        return x

    return _each(groups, masks, lambda x: moved(x, 0)), moved(masks[None, :, None], VOID)[0, :, 0]


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
    of_mask = kept.repeat_interleave(masks.shape[1] // height, 1).repeat_interleave(masks.shape[2] // width, 2)
    return _each(groups, masks, lambda x: x * kept[:, None]), torch.where(of_mask, masks, VOID)


def channel_dropout(groups: Groups, masks: Tensor, rng: torch.Generator) -> tuple[Groups, Tensor]:
    """Empty a tenth of the channels of each sample, others for each: what colour jitter is to photographs."""
    kept = torch.rand(len(masks), groups[0].shape[1], generator=rng, device=masks.device) >= DROPPED
    return _each(groups, masks, lambda x: x * kept[:, :, None, None]), masks


TRANSFORMS: dict[str, Callable[[Groups, Tensor, torch.Generator], tuple[Groups, Tensor]]] = {
    "flip": flip,
    "translation": translation,
    "cutout": cutout,
    "channel_dropout": channel_dropout,
}
