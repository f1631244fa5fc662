"""Dividing ids into train, val and test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stages.common.errors import ConfigError
from stages.data.manifest import Pair


def assign(pairs: Sequence[Pair], *, split: str, ratios: Sequence[float], seed: int) -> list[Pair]:
    """Put pairs into their final splits.

    Parameters
    ----------
    pairs
        Pairs in the splits of the data set's owners.
    split
        ``random`` pools all pairs and divides them at random; any other value keeps the owners'
        splits, and halves val into val and test where there is no labelled test split.
    ratios
        Fractions of train, val and test in a random split, each in 0..1; they add up to 1.
    seed
        Seed of the random division.
    """
    if split == "random":
        names = random_split([pair.id for pair in pairs], ratios, seed)
    elif any(pair.split == "test" for pair in pairs):
        return list(pairs)
    else:
        names = halve([pair.id for pair in pairs if pair.split == "val"], seed)
    return [replace(pair, split=names.get(pair.id, pair.split)) for pair in pairs]


def random_split(ids: Sequence[str], ratios: Sequence[float], seed: int) -> dict[str, str]:
    """Divide ids at random: ``train``, ``val`` or ``test`` by id, in fractions ``ratios``.

    Thesis section 4.1 uses 0.7, 0.15, 0.15. The result depends on the set of ids and the seed,
    not on their order.
    """
    return _deal(ids, split_counts(len(ids), ratios), seed)


def split_counts(images: int, ratios: Sequence[float]) -> dict[str, int]:
    """Divide a number of images among the splits by the fractions ``ratios``.

    Of three images or more, every split whose fraction is above 0 has at least one.
    """
    train, val = round(images * ratios[0]), round(images * ratios[1])
    counts = {"train": train, "val": val, "test": images - train - val}
    for name, ratio in zip(counts, ratios, strict=True):
        while counts[name] < 1 and ratio > 0 and images >= len(counts):
            counts[name] += 1
            counts[max(counts, key=lambda other: counts[other])] -= 1
    return counts


def halve(ids: Sequence[str], seed: int) -> dict[str, str]:
    """Divide ids into halves ``val`` and ``test``, for data sets without labelled test images."""
    half = (len(ids) + 1) // 2
    return _deal(ids, {"val": half, "test": len(ids) - half}, seed)


def keep_train_fraction(pairs: Sequence[Pair], fraction: float, seed: int) -> list[Pair]:
    """Keep a random ``fraction`` (0..1) of the training pairs; smaller fractions are subsets."""
    training = _in_random_order(pairs, seed)
    kept = set(training[: math.ceil(round(fraction * len(training), 6))])
    return [pair for pair in pairs if pair.split != "train" or pair.id in kept]


def select_fold(pairs: Sequence[Pair], fold: str, seed: int) -> list[Pair]:
    """Divide the training pairs for cross-validation and leave out the test pairs.

    Parameters
    ----------
    pairs
        Pairs in their final splits.
    fold
        ``K/N``: the K-th of N parts becomes the split ``test``; the other parts remain ``train``.
        Part sizes differ by at most one. Empty: all pairs keep their splits.
    seed
        Seed of the random division.

    Raises
    ------
    ConfigError
        When there are fewer training pairs than parts.
    """
    if not fold:
        return list(pairs)
    number, count = map(int, fold.split("/"))
    training = _in_random_order(pairs, seed)
    if len(training) < count:
        message = f"{count} folds need at least {count} training images, there are {len(training)}"
        raise ConfigError("prepare.fold", message, actual=fold)
    held_out = set(training[number - 1 :: count])
    return [
        replace(pair, split="test") if pair.id in held_out else pair
        for pair in pairs
        if pair.split != "test"
    ]


def _in_random_order(pairs: Sequence[Pair], seed: int) -> list[str]:
    """Return the ids of the training pairs, ordered by a seeded hash of each id."""
    training = [pair.id for pair in pairs if pair.split == "train"]
    return sorted(training, key=lambda id: hashlib.sha256(f"{seed} {id}".encode()).digest())


def _deal(ids: Sequence[str], counts: dict[str, int], seed: int) -> dict[str, str]:
    ordered = sorted(ids)
    order = np.random.default_rng(seed).permutation(len(ordered))
    names = [name for name, count in counts.items() for _ in range(count)]
    # Two rounded counts may exceed the number of ids by one, so the lengths may differ.
    return {ordered[position]: name for position, name in zip(order, names, strict=False)}
