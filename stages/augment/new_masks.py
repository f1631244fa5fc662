"""Masks that do not exist in the training set: what a generator can be asked for and a cache of real features cannot give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from featurestore import VOID, StoreSpec
from stages.common.errors import ConfigError

Change = Literal["flip", "shift", "scale", "paste", "swap"]
SHIFT = 1 / 4  # of a side, at most
SCALE = (0.6, 1.6)  # of an object's or a scene's size


class MaskSource(Protocol):
    """Whatever has masks by position, such as a feature store."""

    @property
    def spec(self) -> StoreSpec:
        """What their values mean."""

    def mask(self, position: int, /) -> np.ndarray:
        """(H, W) uint8."""


def moved(masks: Tensor, scales: Tensor, shifts: Tensor, fill: int | None = None) -> Tensor:
    """Masks (B, H, W) scaled about their centre and then shifted, by nearest pixels.

    Parameters
    ----------
    scales
        (B,) > 0; 2 shows everything twice as large.
    shifts
        (B, 2) down and right, as shares of the sides.
    fill
        What the outside becomes; None: what stands at the nearest border.
    """
    _, height, width = masks.shape
    sources, inside = [], []
    for axis, size in enumerate((height, width)):
        places = (torch.arange(size, device=masks.device) + 0.5) / size - 0.5  # (size,) -1/2..1/2
        source = (places - shifts[:, axis, None]) / scales[:, None] + 0.5  # (B, size) 0..1 inside
        inside.append((source >= 0) & (source < 1))
        sources.append((source * size).floor().long().clamp(0, size - 1))
    rows = torch.arange(len(masks), device=masks.device)[:, None, None]
    picked = masks[rows, sources[0][:, :, None], sources[1][:, None, :]]
    return (
        picked
        if fill is None
        else torch.where(inside[0][:, :, None] & inside[1][:, None, :], picked, fill)
    )


class NewMasks:
    """Random changes of masks.

    Parameters
    ----------
    changes
        ``flip`` half of them; ``shift`` and ``scale`` the whole scene; ``paste`` an object of another mask over it, of a
        class chosen with a chance that falls with how many images have it, itself moved and scaled; ``swap`` gives a
        thing of the mask another class, any with the same chance.
    store, positions
        Where objects come from.
    share
        Of the masks that are changed, each by chance; the others stay as they are.
    known
        (K,) which classes may be pasted or swapped; None: all.

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
        share: float = 1.0,
        known: np.ndarray | None = None,
    ) -> None:
        if unknown := sorted(set(changes) - set(get_args(Change))):
            raise ConfigError(
                "new_masks", f"{unknown[0]!r} is unknown; known are {', '.join(get_args(Change))}"
            )
        self.changes, self.store, self.share = changes, store, share
        self.holders: list[np.ndarray] = []  # by class: who has it
        if "paste" in changes or "swap" in changes:
            present = [
                np.bincount(store.mask(int(position)).ravel(), minlength=VOID + 1)[:VOID] > 0
                for position in positions
            ]
            classes = np.stack(present).T[: store.spec.num_classes]
            # The most frequent class (the background) is what things lie on, not a thing.
            self.holders = [positions[there] for there in classes]
            most = max(range(len(self.holders)), key=lambda number: len(self.holders[number]))
            self.chances = np.array(
                [
                    0.0 if number == most or not len(h) else 1 / len(h) ** 0.5
                    for number, h in enumerate(self.holders)
                ]
            )
            if known is not None:
                self.chances[~known] = 0
            self.chances /= max(self.chances.sum(), 1e-12)
            self.things = torch.from_numpy(np.flatnonzero(self.chances))
            needed, doing = (
                (2, "exchanging classes (swap, class-transfer)")
                if "swap" in changes
                else (1, "pasting objects")
            )
            if len(self.things) < needed:
                found = len(self.things)
                message = f"{doing} needs {needed} classes beside the one that most images have, found {found}; leave it out"
                raise ConfigError("new_masks", message, expected=needed, actual=found)

    def __call__(self, masks: Tensor, rng: torch.Generator) -> Tensor:
        """(B, H, W) uint8 -> (B, H, W) uint8."""

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=rng, device=masks.device)

        def scales() -> Tensor:
            low, high = (torch.tensor(bound).log().item() for bound in SCALE)
            return uniform(low, high, count).exp()

        count, given = len(masks), masks
        if "flip" in self.changes:
            masks = torch.where(uniform(0, 1, count)[:, None, None] < 0.5, masks.flip(2), masks)
        ones, still = (
            torch.ones(count, device=masks.device),
            torch.zeros(count, 2, device=masks.device),
        )
        if "shift" in self.changes or "scale" in self.changes:
            by = uniform(-SHIFT, SHIFT, count, 2) if "shift" in self.changes else still
            masks = moved(masks, scales() if "scale" in self.changes else ones, by)
        if "paste" in self.changes:
            drawing = np.random.default_rng(rng.initial_seed())
            classes = drawing.choice(len(self.chances), count, p=self.chances)
            donors = [drawing.choice(self.holders[number]) for number in classes]
            objects = torch.from_numpy(
                np.stack([self.store.mask(int(donor)) for donor in donors])
            ).to(masks.device)
            wanted = torch.from_numpy(classes).to(masks.device, masks.dtype)[:, None, None]
            objects = moved(
                torch.where(objects == wanted, objects, VOID),
                scales(),
                uniform(-SHIFT, SHIFT, count, 2),
                fill=VOID,
            )
            masks = torch.where(objects == wanted, wanted, masks)
        if "swap" in self.changes:
            masks = _swapped(masks, self.things.to(masks.device), rng)
        return (
            masks
            if self.share == 1
            else torch.where(uniform(0, 1, count)[:, None, None] < self.share, masks, given)
        )


def _swapped(masks: Tensor, things: Tensor, rng: torch.Generator) -> Tensor:
    """Masks (B, H, W) with one of the classes ``things`` (T,) that each has called another of them."""
    pixels = masks.flatten(1).long()
    counts = torch.zeros(len(masks), VOID + 1, device=masks.device).scatter_add_(
        1, pixels, torch.ones_like(pixels, dtype=torch.float32)
    )
    draws = torch.rand(2, len(masks), len(things), generator=rng, device=masks.device)
    old = torch.where(counts[:, things] > 0, draws[0], -1.0).argmax(
        1
    )  # a mask without things has none of the first one's pixels either
    new = draws[1].scatter(1, old[:, None], -1.0).argmax(1)
    old_class, new_class = (things[chosen].to(masks.dtype)[:, None, None] for chosen in (old, new))
    return torch.where(masks == old_class, new_class, masks)
