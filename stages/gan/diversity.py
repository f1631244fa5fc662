"""How varied generated feature vectors are, against the real ones of the same class."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 20  # vectors of a class on each side; fewer say nothing about its variance


def class_variances(vectors: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K,) variance of each class's vectors about their mean, summed over channels; NaN for a class with too few vectors.

    Parameters
    ----------
    vectors
        (n, C).
    labels
        (n,) classes.
    """
    variances = torch.full((num_classes,), torch.nan)
    for number in range(num_classes):
        mine = vectors[labels == number]
        if len(mine) >= FEWEST:
            variances[number] = mine.var(0).sum()
    return variances


def variance_ratios(real: Tensor, fake: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K,) generated over real variance of each class; near 0 where a class has collapsed, NaN where there are too few vectors."""
    return class_variances(fake, labels, num_classes) / class_variances(
        real, labels, num_classes
    ).clamp(min=1e-12)


def draw_diversity(first: Tensor, second: Tensor, labels: Tensor, real_variances: Tensor) -> float:
    """Mean squared distance of two draws of z at the same place of the same mask, over that of two real vectors of its class.

    Two independent vectors of a class are 2 * variance apart; so 1: draws differ as strangers do, 0: z is ignored.

    Parameters
    ----------
    first, second
        (n, C).
    labels
        (n,) classes.
    real_variances
        (K,) of :func:`class_variances`.
    """
    expected = 2 * real_variances[labels]
    known = expected.isfinite() & (expected > 0)
    distance = (first - second).square().sum(1)
    return float(distance[known].mean() / expected[known].mean())
