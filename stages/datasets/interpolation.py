"""Signs that a mask was resized with interpolation, which invents classes along borders."""

from __future__ import annotations

import numpy as np

from stages.data.images import VOID

FEWEST = 8  # pixels on false borders, below which a mask is not judged
SHARP = 1.0  # most direct borders between distant classes, as a fraction of these pixels


def false_borders(mask: np.ndarray) -> np.ndarray:
    """Count the pixels that interpolation may have invented, by class.

    A bilinear resize leaves a thin strip of classes 1 and 2 between class 0 and class 3, and no
    place where 0 and 3 touch. Real masks have such places.

    Parameters
    ----------
    mask
        (H, W) uint8 class indices, 255 for void.

    Returns
    -------
    (256,) int
        Pixels in strips at most two pixels wide, with a lower class on one side and a higher one
        on the other. All 0 where distant classes touch directly, and for a few pixels.
    """
    counts = np.bincount(mask.reshape(-1), minlength=256)
    if (counts[:VOID] > 0).sum() < 3:  # no class can be between two others
        return np.zeros_like(counts)
    strips = _strips(mask)
    counts = np.bincount(mask[strips], minlength=256)
    # Neighbours outside of strips, none of them void, whose indices differ by two or more.
    sides = np.where(strips, VOID, mask)
    touching = 0
    for one, other in ((sides[1:], sides[:-1]), (sides[:, 1:], sides[:, :-1])):
        low, high = np.minimum(one, other), np.maximum(one, other)
        touching += int(((high - low > 1) & (high != VOID)).sum())
    doubtful = counts.sum() >= FEWEST and touching <= SHARP * counts.sum()
    return counts if doubtful else np.zeros_like(counts)


def _strips(mask: np.ndarray) -> np.ndarray:
    """Mark pixels (H, W) of strips between a lower and a higher class."""
    lowest = _spread(mask, np.minimum, 2)
    highest = _spread(np.where(mask == VOID, 0, mask), np.maximum, 2)
    between = (lowest < mask) & (mask < highest) & (mask != VOID)
    flat = _spread(mask, np.minimum, 1) == _spread(mask, np.maximum, 1)  # centres of 3 x 3
    return between & ~_spread(flat, np.maximum, 1)


def _spread(values: np.ndarray, combine: np.ufunc, radius: int) -> np.ndarray:
    """Combine each pixel of (H, W) with its neighbours in a square; edges are repeated."""
    padded = np.pad(values, radius, mode="edge")
    height, width = values.shape
    rows = padded[:height]
    for shift in range(1, 2 * radius + 1):
        rows = combine(rows, padded[shift : shift + height])
    result = rows[:, :width]
    for shift in range(1, 2 * radius + 1):
        result = combine(result, rows[:, shift : shift + width])
    return result
