"""Confidence intervals by the bootstrap over test images (Efron and Tibshirani 1993, chapter 16).

Differences between two variants are paired: both are measured on the same resampled images.
Frames of a video resemble their neighbours, so images can be drawn in blocks of consecutive ones
(the circular block bootstrap, Politis and Romano 1992).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
SEED = 0  # every comparison uses the same resamples


@dataclass(frozen=True)
class Counts:
    """Pixels of n images by class: ``truth``, ``predicted`` and ``right``, (n, K) each."""

    truth: np.ndarray
    predicted: np.ndarray
    right: np.ndarray

    @classmethod
    def of(
        cls, images: Mapping[str, Sequence[int]], ids: Sequence[str], num_classes: int
    ) -> Counts:
        """Count the pixels of confusion matrices from ``images.json``, in the order of ``ids``."""
        counts = cls(*np.zeros((3, len(ids), num_classes), np.float64))
        for row, id in enumerate(ids):
            truth, predicted, pixels = np.array(images[id], np.int64).reshape(-1, 3).T
            np.add.at(counts.truth[row], truth, pixels)
            np.add.at(counts.predicted[row], predicted, pixels)
            np.add.at(counts.right[row], truth, pixels * (truth == predicted))
        return counts

    def iou(self, weights: np.ndarray) -> np.ndarray:
        """Compute IoU (R, K) where image i counts ``weights[r, i]`` times, weights (R, n).

        A class that the truth of a resample lacks is NaN, whether or not it is predicted. Thus
        both sides of a comparison average over the same classes.
        """
        truth, right = weights @ self.truth, weights @ self.right
        union = truth + weights @ self.predicted - right
        return np.divide(right, union, out=np.full_like(right, np.nan), where=truth > 0)


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval, in the unit of IoU (0..1)."""

    value: float
    low: float
    high: float


def paired_intervals(
    runs: Sequence[Counts],
    baselines: Sequence[Counts],
    *means: Sequence[int],
    resamples: int = RESAMPLES,
    block_length: int = 1,
) -> tuple[list[Interval], dict[int, Interval]]:
    """Compute percentile intervals of the difference in IoU between runs and baselines.

    Images are resampled, seeds are not: the interval measures how far the difference depends on
    the choice of test images. The standard deviation over seeds measures how far it depends on
    the seed.

    Parameters
    ----------
    runs, baselines
        One element a seed; both sides have the same seeds and the same images.
    means
        Class indices of each mean. A class that a resample's truth lacks is left out of that
        resample's mean.
    resamples
        Number of bootstrap resamples.
    block_length
        Consecutive images that are drawn together.

    Returns
    -------
    tuple
        The difference in mIoU over each of ``means``, and in each class's IoU, mean over seeds.
    """
    weights = _resampled(len(runs[0].truth), resamples, block_length)
    by_class = np.mean(
        [run.iou(weights) - base.iou(weights) for run, base in zip(runs, baselines, strict=True)],
        axis=0,
    )
    return [_interval(_mean(by_class[:, list(classes)])) for classes in means], {
        number: _interval(values) for number, values in enumerate(by_class.T)
    }


def intervals(
    runs: Sequence[Counts], *, resamples: int = RESAMPLES, block_length: int = 1
) -> dict[int, Interval]:
    """Compute each class's IoU, mean over seeds, with its percentile interval."""
    weights = _resampled(len(runs[0].truth), resamples, block_length)
    by_class = np.mean([run.iou(weights) for run in runs], axis=0)
    return {number: _interval(values) for number, values in enumerate(by_class.T)}


@lru_cache(maxsize=1)  # drawing takes longer than everything else in a comparison
def _resampled(images: int, resamples: int, block_length: int) -> np.ndarray:
    """Count how often each image is drawn, (1 + resamples, images); row 0 is the split itself."""
    starts = np.random.default_rng(SEED).multinomial(
        round(images / block_length), np.full(images, 1 / images), size=resamples
    )
    # Blocks wrap around: the first image follows the last one.
    drawn = sum(np.roll(starts, offset, axis=1) for offset in range(block_length))
    return np.concatenate([np.ones((1, images)), drawn])


def _mean(iou: np.ndarray) -> np.ndarray:
    """Average (R, K) to (R,) over the classes that are not NaN; NaN where all are."""
    there = ~np.isnan(iou)
    total = np.where(there, iou, 0).sum(1)
    return np.divide(total, there.sum(1), out=np.full_like(total, np.nan), where=there.any(1))


def _interval(values: np.ndarray) -> Interval:
    """Take the interval from a statistic's resamples; ``values[0]`` is the statistic itself."""
    known = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))
