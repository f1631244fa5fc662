"""Statistics of a store's channels and classes, computed by sample and merged by shard."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from featurestore.float16 import as_float32
from featurestore.schema import StoreSpec, Values

ARRAYS = {
    "mean": np.float64,
    "variance": np.float64,
    "minimum": np.float64,
    "maximum": np.float64,
    "class_pixels": np.int64,
    "class_samples": np.int64,
}
BLOCK = 1 << 16  # values that are converted and measured at once
PER_CHANNEL = ("mean", "variance", "minimum", "maximum")


@dataclass
class Statistics:
    """Statistics over all positions of all samples.

    Attributes
    ----------
    count
        Number of samples.
    mean, variance, minimum, maximum
        (C,) float64, of each stored feature channel over samples and positions; population
        variance. The channels of several layers follow each other.
    class_pixels
        (K,) int64, mask pixels of each class.
    class_samples
        (K,) int64, samples in which each class occurs.
    void_pixels
        Mask pixels without a label.
    """

    count: int
    mean: np.ndarray
    variance: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    class_pixels: np.ndarray
    class_samples: np.ndarray
    void_pixels: int

    @property
    def std(self) -> np.ndarray:
        """(C,) float64 standard deviation of each channel."""
        return np.asarray(np.sqrt(self.variance))

    @classmethod
    def of_sample(
        cls, spec: StoreSpec, features: Sequence[np.ndarray], mask: np.ndarray
    ) -> Statistics:
        """Compute the statistics of one sample: features (c, h, w) of each layer, mask (H, W)."""
        layers = [_of_channels(layer) for layer in features]
        mean, variance, minimum, maximum = map(np.concatenate, zip(*layers, strict=True))
        pixels = np.bincount(mask.reshape(-1), minlength=256)
        return cls(
            count=1,
            mean=mean,
            variance=variance,
            minimum=minimum,
            maximum=maximum,
            class_pixels=pixels[: spec.num_classes].astype(np.int64),
            class_samples=(pixels[: spec.num_classes] > 0).astype(np.int64),
            void_pixels=int(pixels[spec.void_index]),
        )

    def at(self, channels: np.ndarray) -> Statistics:
        """Return the statistics of the stored channels at (C,) int64 positions, in that order."""
        arrays = {name: getattr(self, name)[channels] for name in PER_CHANNEL}
        return replace(self, **arrays)

    def merged(self, other: Statistics) -> Statistics:
        """Combine the statistics of two sets of samples (Chan et al. 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        weight = other.count / count
        return Statistics(
            count=count,
            mean=self.mean + delta * weight,
            variance=self.variance * (1 - weight)
            + other.variance * weight
            + delta**2 * weight * (1 - weight),
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
            class_pixels=self.class_pixels + other.class_pixels,
            class_samples=self.class_samples + other.class_samples,
            void_pixels=self.void_pixels + other.void_pixels,
        )

    @staticmethod
    def merge_all(parts: Iterable[Statistics]) -> Statistics:
        """Merge in the given order, so that equal parts give equal bits.

        Raises
        ------
        TypeError
            When there is no part.
        """
        return functools.reduce(Statistics.merged, parts)

    def to_dict(self) -> Values:
        """Return JSON-ready values; floats survive the round trip exactly."""
        values = vars(self).items()
        return {key: np.asarray(value).tolist() for key, value in values}

    @classmethod
    def from_dict(cls, values: Values) -> Statistics:
        """Make statistics of what :meth:`to_dict` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            When a value is missing or is no list of numbers.
        """
        arrays = {key: np.asarray(values[key], dtype) for key, dtype in ARRAYS.items()}
        return cls(count=int(values["count"]), void_pixels=int(values["void_pixels"]), **arrays)


def _of_channels(features: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute :data:`PER_CHANNEL` of features (c, h, w): each (c,) float64.

    A few channels at a time stay in the processor's cache for all passes over them.
    """
    flat = features.reshape(features.shape[0], -1)  # (c, h, w) -> (c, h*w)
    count = max(1, BLOCK // flat.shape[1])
    blocks = [_moments(flat[start : start + count]) for start in range(0, len(flat), count)]
    return tuple(map(np.concatenate, zip(*blocks, strict=True)))


def _moments(features: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute :data:`PER_CHANNEL` of features (c, p) at p positions."""
    flat = as_float32(features)
    mean = flat.mean(axis=1, dtype=np.float64)
    centred = flat - mean[:, None].astype(np.float32)
    return (
        mean,
        np.einsum("cp,cp->c", centred, centred).astype(np.float64) / flat.shape[1],
        flat.min(axis=1).astype(np.float64),
        flat.max(axis=1).astype(np.float64),
    )
