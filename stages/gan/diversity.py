"""How varied generated feature vectors are, compared with real ones of the same class."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 20  # vectors of a class on each side; fewer say nothing about its variance


def class_variances(vectors: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Compute the variance of each class's vectors about their mean, summed over channels.

    Parameters
    ----------
    vectors
        (n, C).
    labels
        (n,) classes.

    Returns
    -------
    Tensor
        (K,); NaN for a class with too few vectors.
    """
    groups = [vectors[labels == number] for number in range(num_classes)]
    unknown = vectors.new_tensor(torch.nan)
    variances = [group.var(0).sum() if len(group) >= FEWEST else unknown for group in groups]
    return torch.stack(variances)


def variance_ratios(real: Tensor, fake: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Compute generated over real variance of each class.

    Returns
    -------
    Tensor
        (K,); near 0 for a collapsed class, NaN for a class with too few vectors.
    """
    real_variances = class_variances(real, labels, num_classes)
    return class_variances(fake, labels, num_classes) / real_variances.clamp(min=1e-12)


def draw_diversity(first: Tensor, second: Tensor, labels: Tensor, real_variances: Tensor) -> float:
    """Compare two draws of z at the same places of the same masks with two real vectors.

    The mean squared distance of the draws is divided by that of two independent real vectors of the
    class, which is twice their variance. 1: draws differ as unrelated real vectors do; 0: z is
    ignored.

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
