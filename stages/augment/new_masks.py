"""New masks: random changes of the training masks.

A generator can be asked for their features; a cache of real features does not have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from featurestore import VOID, StoreSpec
from stages.common.errors import ConfigError
from stages.common.runtime import to_device
from stages.segmentation.regions import count_pixels, draw_allowed
from stages.segmentation.transforms import flip

Change = Literal["flip", "shift", "scale", "paste", "swap"]
SHIFT = 1 / 4  # largest shift as a fraction of a side
SCALE = (0.6, 1.6)  # of the size of an object or a scene
CHOICE = 1  # of the masks to change: purpose of random numbers, a part of their seed


class MaskSource(Protocol):
    """Whatever has masks by position, such as a feature store."""

    @property
    def spec(self) -> StoreSpec:
        """What the values of the masks mean."""

    def mask(self, position: int, /) -> np.ndarray:
        """Read a mask (H, W) uint8."""


def resample(masks: Tensor, scales: Tensor, shifts: Tensor, fill: int | None = None) -> Tensor:
    """Scale masks (B, H, W) about their centre and then shift them, by nearest pixels.

    Parameters
    ----------
    scales
        (B,) > 0; 2 shows everything twice as large.
    shifts
        (B, 2) down and right, as fractions of the sides.
    fill
        Value of the pixels that move in from outside; None: the value of the nearest border pixel.
    """
    sources, inside = [], []
    for axis, size in enumerate(masks.shape[1:]):
        places = (torch.arange(size, device=masks.device) + 0.5) / size - 0.5  # (size,) -1/2..1/2
        source = (places - shifts[:, axis, None]) / scales[:, None] + 0.5  # (B, size) 0..1 inside
        inside.append((source >= 0) & (source < 1))
        sources.append((source * size).floor().long().clamp(0, size - 1))
    samples = torch.arange(len(masks), device=masks.device)[:, None, None]
    picked = masks[samples, sources[0][:, :, None], sources[1][:, None, :]]
    if fill is None:
        return picked
    return torch.where(inside[0][:, :, None] & inside[1][:, None, :], picked, fill)


class NewMasks:
    """Random changes of masks.

    Parameters
    ----------
    changes
        ``flip`` mirrors half of the masks. ``shift`` and ``scale`` move the whole scene. ``paste``
        puts an object of another mask on top, moved and scaled too; classes in few images are drawn
        more often. ``swap`` gives an object of the mask another class; all classes have the same
        probability.
    store, positions
        Masks from which objects are taken.
    fraction
        Of the masks that are changed, drawn at random; the others stay as they are. 0..1.
    known
        (K,) bool: which classes may be pasted or swapped; None: all.

    Raises
    ------
    ConfigError
        When a change is unknown, or the masks have too few classes for it.
    """

    def __init__(
        self,
        changes: Sequence[str],
        store: MaskSource,
        positions: np.ndarray,
        fraction: float = 1.0,
        known: np.ndarray | None = None,
    ) -> None:
        allowed = get_args(Change)
        if unknown := sorted(set(changes) - set(allowed)):
            message = f"{unknown[0]!r} is unknown; known are {', '.join(allowed)}"
            raise ConfigError("new_masks", message)
        self.changes, self.store, self.fraction = changes, store, fraction
        if "paste" in changes or "swap" in changes:
            self._find_objects(positions, known)

    def _find_objects(self, positions: np.ndarray, known: np.ndarray | None) -> None:
        """Find the classes of objects (T,), and which masks have them."""
        masks = (self.store.mask(int(position)) for position in positions)
        present = np.stack([np.bincount(mask.ravel(), minlength=VOID + 1) > 0 for mask in masks])
        present = present[:, : self.store.spec.num_classes]  # (N, K)
        self.holders = [positions[has_class] for has_class in present.T]  # by class
        images = present.sum(0)
        weights = np.array([1 / max(count, 1) ** 0.5 for count in images.tolist()])
        # The most frequent class is taken for the background.
        is_object = (images > 0) & (np.arange(len(images)) != images.argmax())
        weights[~is_object if known is None else ~(is_object & known)] = 0
        self.probabilities = weights / max(weights.sum(), 1e-12)
        self.objects = torch.from_numpy(np.flatnonzero(self.probabilities))
        needed, change = 1, "pasting objects"
        if "swap" in self.changes:
            needed, change = 2, "exchanging classes (swap, class-transfer)"
        if (actual := len(self.objects)) < needed:
            message = (
                f"{change} needs {needed} classes beside the one that most images have,"
                f" found {actual}; remove this change"
            )
            raise ConfigError("new_masks", message, expected=needed, actual=actual)

    def chosen(self, count: int, rng: torch.Generator) -> list[int]:
        """List the rows of the masks, of ``count``, that a call with an equal ``rng`` changes."""
        drawing = np.random.default_rng([rng.initial_seed(), CHOICE])
        return np.flatnonzero(drawing.random(count) < self.fraction).tolist()

    def __call__(self, masks: Tensor, rng: torch.Generator) -> Tensor:
        """Change masks (B, H, W) uint8."""
        changed, count = masks, len(masks)
        if "flip" in self.changes:
            _, changed = flip([], changed, rng, ())
        if "shift" in self.changes or "scale" in self.changes:
            shifts = torch.zeros(count, 2, device=masks.device)
            scales = torch.ones(count, device=masks.device)
            if "shift" in self.changes:
                shifts = _draw_shifts(count, rng)
            if "scale" in self.changes:
                scales = _draw_scales(count, rng)
            changed = resample(changed, scales, shifts)
        if "paste" in self.changes:
            changed = self._paste(changed, rng)
        if "swap" in self.changes:
            changed = swap_classes(changed, to_device(self.objects, masks.device), rng)
        if self.fraction == 1:
            return changed
        rows = to_device(torch.tensor(self.chosen(count, rng), dtype=torch.int64), masks.device)
        return masks.index_copy(0, rows, changed[rows])

    def _paste(self, masks: Tensor, rng: torch.Generator) -> Tensor:
        """Paste an object of another mask, moved and scaled, over each mask (B, H, W)."""
        drawing = np.random.default_rng(rng.initial_seed())
        drawn = drawing.choice(len(self.probabilities), len(masks), p=self.probabilities)
        donors = [self.store.mask(int(drawing.choice(self.holders[number]))) for number in drawn]
        given = to_device(torch.from_numpy(np.stack(donors)), masks.device)
        classes = to_device(torch.from_numpy(drawn).to(masks.dtype), masks.device)[:, None, None]
        scales, shifts = _draw_scales(len(masks), rng), _draw_shifts(len(masks), rng)
        objects = resample(torch.where(given == classes, given, VOID), scales, shifts, fill=VOID)
        return torch.where(objects == classes, classes, masks)


def swap_classes(masks: Tensor, objects: Tensor, rng: torch.Generator) -> Tensor:
    """Give another class to one class of each mask (B, H, W), both drawn of ``objects`` (T,)."""
    draws = torch.rand(2, len(masks), len(objects), generator=rng, device=masks.device)
    # In a mask without objects the first class is drawn, which has no pixel to change either.
    old = draw_allowed(count_pixels(masks)[:, objects] > 0, draws[0])
    others = torch.arange(len(objects), device=masks.device) != old[:, None]
    new = draw_allowed(others, draws[1])
    old, new = (objects[number].to(masks.dtype)[:, None, None] for number in (old, new))
    return torch.where(masks == old, new, masks)


def _draw_shifts(count: int, rng: torch.Generator) -> Tensor:
    return -SHIFT + 2 * SHIFT * torch.rand(count, 2, generator=rng, device=rng.device)


def _draw_scales(count: int, rng: torch.Generator) -> Tensor:
    low, high = (torch.tensor(bound).log().item() for bound in SCALE)
    return (low + (high - low) * torch.rand(count, generator=rng, device=rng.device)).exp()
