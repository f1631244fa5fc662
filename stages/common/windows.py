"""Windows over an image that is larger than a network's input, and the ids of their samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

TILE = "tile"  # resize rule: windows of the images at their own scale, each a sample
OVERLAP = 0.25  # least fraction of a window's side that neighbours share
WINDOW_ID = re.compile(r"(.+)@(\d+),(\d+)", re.DOTALL)  # NAME@Y,X; a name may hold an @

Corner = tuple[int, int]  # first row and first column of a window, in pixels of the image


@dataclass(frozen=True)
class Grid:
    """Windows of one size over an image, in rows of equal height.

    Attributes
    ----------
    size
        (height, width) of the image in pixels. Windows reach beyond it where it is smaller.
    window
        (H, W) of a window.
    tops, lefts
        First row of each row of windows, first column of each column of windows; ascending.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def over(cls, size: tuple[int, int], window: tuple[int, int], overlap: float = OVERLAP) -> Grid:
        """Cover an image with the fewest windows that share ``overlap`` of their sides, 0..0.9."""
        tops, lefts = (_starts(*sides, overlap) for sides in zip(size, window, strict=True))
        return cls(size, window, tops, lefts)

    @classmethod
    def spanned_by(
        cls, corners: Sequence[Corner], window: tuple[int, int]
    ) -> tuple[Grid, list[Corner]]:
        """Find the grid of the stored windows of an image, and the corner of each in this grid.

        Where all windows are stored, it is that of :meth:`over`, but for the size of an image that
        is smaller than a window. Rows and columns of pixels that no stored window shows are left
        out: later windows move up and left.
        """
        moved = []
        for starts, length in zip(zip(*corners, strict=True), window, strict=True):
            side = sorted(set(starts))
            steps = (min(length, after - before) for before, after in pairwise(side))
            moved.append(dict(zip(side, accumulate(steps, initial=0), strict=True)))
        tops, lefts = (tuple(side.values()) for side in moved)
        grid = cls((tops[-1] + window[0], lefts[-1] + window[1]), window, tops, lefts)
        return grid, [(moved[0][top], moved[1][left]) for top, left in corners]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def corners(self) -> Iterator[Corner]:
        """Iterate over the corners of the windows, row by row."""
        return product(self.tops, self.lefts)

    def cut(self, pixels: np.ndarray, corner: Corner) -> np.ndarray:
        """Return the part of (height, width, ...) pixels that a window shows; at most (H, W)."""
        top, left = corner
        return pixels[top : top + self.window[0], left : left + self.window[1]]


def _starts(side: int, window: int, overlap: float) -> tuple[int, ...]:
    """Spread windows evenly over a side: the first pixel of each; the last ends with the side."""
    free = max(0, side - window)
    count = 1 + math.ceil(free / max(1.0, window * (1 - overlap)))
    return tuple(round(number * free / max(1, count - 1)) for number in range(count))


# -- ids of samples --------------------------------------------------------------------------------


def window_id(name: str, corner: Corner) -> str:
    """Name the sample of a window of an image: ``NAME@Y,X``."""
    return f"{name}@{corner[0]},{corner[1]}"


def split_id(id: str, rule: str) -> tuple[str, Corner]:
    """Find the image of a sample, and the corner of its window.

    Parameters
    ----------
    id
        Id of the sample.
    rule
        Resize rule of its store. Only with ``tile`` an id names a window; one without a corner is
        that of an image of one window.

    >>> split_id("photo@2@0,64", "tile")
    ('photo@2', (0, 64))
    """
    match = WINDOW_ID.fullmatch(id) if rule == TILE else None
    return (match[1], (int(match[2]), int(match[3]))) if match else (id, (0, 0))


def image_name(id: str, rule: str) -> str:
    """Return the name of the image that a sample shows; see :func:`split_id`."""
    return split_id(id, rule)[0]


def positions_of_rank(ids: Sequence[str], rule: str, rank: int, ranks: int) -> list[int]:
    """Choose the samples that a process scores: all windows of every ``ranks``-th image.

    Returns
    -------
    list of int
        Positions in ``ids``, ascending.
    """
    names = [image_name(id, rule) for id in ids]
    number = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [position for position, name in enumerate(names) if number[name] % ranks == rank]
