"""Dividing ids over train, val and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.data.manifest import Pair


def assign(pairs: Sequence[Pair], *, split: str, ratios: Sequence[float], seed: int) -> list[Pair]:
    """Pairs in their final splits.

    Parameters
    ----------
    pairs
        In the splits of the data set's owners.
    split
        ``random`` pools all pairs and divides them by chance; anything else keeps the owners' splits, and halves val
        where they keep the labels of test to themselves.
    ratios
        Of a random split: train, val, test.
    seed
        Of the chance.
    """
    if split == "random":
        names = random_split([pair.id for pair in pairs], ratios, seed)
    elif any(pair.split == "test" for pair in pairs):
        return list(pairs)
    else:
        names = halve([pair.id for pair in pairs if pair.split == "val"], seed)
    return [replace(pair, split=names.get(pair.id, pair.split)) for pair in pairs]


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
    return {
        ordered[position]: "val" if rank < (len(ordered) + 1) // 2 else "test"
        for rank, position in enumerate(order)
    }
