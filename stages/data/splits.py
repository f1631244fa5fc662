"""Dividing ids over train, val and test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_split(ids: Sequence[str], ratios: Sequence[float], seed: int) -> dict[str, str]:
    """Split by chance: id -> ``train``, ``val`` or ``test``, in shares ``ratios`` (thesis section 4.1: 0.7, 0.15, 0.15).

    The outcome depends on the set of ids and the seed, not on their order.
    """
    ordered = sorted(ids)
    order = np.random.default_rng(seed).permutation(len(ordered))
    first = round(len(ordered) * ratios[0])
    second = first + round(len(ordered) * ratios[1])
    names = ["train"] * first + ["val"] * (second - first) + ["test"] * (len(ordered) - second)
    return {ordered[position]: name for position, name in zip(order, names, strict=False)}


def halve(ids: Sequence[str], seed: int) -> dict[str, str]:
    """Give each of two halves a name, ``val`` and ``test``: for data sets that come without labelled test images."""
    ordered = sorted(ids)
    order = np.random.default_rng(seed).permutation(len(ordered))
    return {ordered[position]: "val" if rank < (len(ordered) + 1) // 2 else "test" for rank, position in enumerate(order)}
