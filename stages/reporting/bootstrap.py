"""How sure a difference between two variants is: the paired bootstrap over test images (Efron and Tibshirani 1993, chapter 16).

Frames of a video resemble their neighbours. They are drawn in blocks (the circular block bootstrap, Politis and Romano 1992).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
SEED = 0  # the same resamples for all comparisons


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
        """From confusion matrices as ``images.json`` holds them, in the order of ``ids``."""
        counts = cls(*np.zeros((3, len(ids), num_classes), np.float64))
        for row, id in enumerate(ids):
            truth, predicted, pixels = np.array(images[id], np.int64).reshape(-1, 3).T
            np.add.at(counts.truth[row], truth, pixels)
            np.add.at(counts.predicted[row], predicted, pixels)
            same = truth == predicted
            np.add.at(counts.right[row], truth[same], pixels[same])
        return counts

    def iou(self, weights: np.ndarray) -> np.ndarray:
        """(R, n) how often each image counts -> (R, K) IoU; nan for a class that the truth of these images lacks.

        So both sides of a comparison have a mean over the same classes: one that a single side predicts, be it in one
        pixel, would count there with zero.
        """
        truth, right = weights @ self.truth, weights @ self.right
        union = truth + weights @ self.predicted - right
        return np.divide(right, union, out=np.full_like(right, np.nan), where=truth > 0)


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval, in the unit of IoU (0..1)."""

    value: float
    low: float
    high: float


def paired_intervals(
    ours: Sequence[Counts],
    theirs: Sequence[Counts],
    *means: Sequence[int],
    resamples: int = RESAMPLES,
    block_length: int = 1,
) -> tuple[list[Interval], dict[int, Interval]]:
    """Differences in mIoU over each of ``means`` and in each class's IoU, mean over seeds, with percentile intervals.

    Images are drawn anew, the same ones for both sides and all seeds; the seeds are not. So the interval says how much the
    difference depends on which images are in the test split; how much it depends on the seed is what its standard
    deviation over seeds says.

    Parameters
    ----------
    ours, theirs
        One a seed, the same seeds and the same images on both sides.
    means
        Classes; one that a resample's truth lacks is left out of that resample's mean.
    block_length
        As many images as this, one after the other, are drawn together.
    """
    weights = _resampled(len(ours[0].truth), resamples, block_length)
    by_class = np.mean(
        [mine.iou(weights) - other.iou(weights) for mine, other in zip(ours, theirs, strict=True)],
        axis=0,
    )
    return [_interval(_mean(by_class[:, list(classes)])) for classes in means], {
        number: _interval(values) for number, values in enumerate(by_class.T)
    }


def intervals(
    runs: Sequence[Counts], *, resamples: int = RESAMPLES, block_length: int = 1
) -> dict[int, Interval]:
    """Each class's IoU, mean over seeds, with its percentile interval over the same resamples."""
    weights = _resampled(len(runs[0].truth), resamples, block_length)
    by_class = np.mean([run.iou(weights) for run in runs], axis=0)
    return {number: _interval(values) for number, values in enumerate(by_class.T)}


@lru_cache(
    maxsize=1
)  # a comparison asks for the same ones again and again, and drawing them takes longer than all else in it
def _resampled(images: int, resamples: int, block_length: int) -> np.ndarray:
    """(1 + resamples, images) how often each image counts; the first row is the split itself."""
    blocks = round(images / block_length)
    starts = np.random.default_rng(SEED).multinomial(
        blocks, np.full(images, 1 / images), size=resamples
    )
    drawn = sum(
        np.roll(starts, offset, axis=1) for offset in range(block_length)
    )  # the first image follows the last one
    return np.concatenate([np.ones((1, images)), drawn])


def _mean(iou: np.ndarray) -> np.ndarray:
    """(R, K) -> (R,) over the classes that are there; nan where none is."""
    there = ~np.isnan(iou)
    total = np.where(there, iou, 0).sum(1)
    return np.divide(total, there.sum(1), out=np.full_like(total, np.nan), where=there.any(1))


def _interval(values: np.ndarray) -> Interval:
    """Of a statistic's resamples, the first of which is the statistic itself."""
    known = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))
