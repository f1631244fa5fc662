"""Statistics of a store's channels and classes, computed by sample and merged by shard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
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
LARGE = 1 << 19  # number of values of a layer from which the compiled loop is used
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

    @classmethod
    def none(cls, spec: StoreSpec) -> Statistics:
        """Return the statistics of an empty store: all zero."""
        channels = np.zeros(sum(layer.shape[0] for layer in spec.layers))
        classes = np.zeros(spec.num_classes, np.int64)
        return cls(0, channels, channels, channels, channels, classes, classes, 0)

    def check(self, spec: StoreSpec, samples: int) -> None:
        """Refuse statistics that are not those of ``samples`` samples of a spec.

        Raises
        ------
        ValueError
            When a number or length differs, or a value is not finite or negative where none is.
        """
        channels = sum(layer.shape[0] for layer in spec.layers)
        lengths = {name: channels if name in PER_CHANNEL else spec.num_classes for name in ARRAYS}
        wrong = [name for name, length in lengths.items() if getattr(self, name).shape != (length,)]
        arrays = [getattr(self, name) for name in ARRAYS]
        if wrong or self.count != samples or not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"statistics of {samples} samples are damaged")
        if min(self.variance.min(), self.class_pixels.min(), self.class_samples.min()) < 0:
            raise ValueError("statistics have a negative variance or count")

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
    """Compute :data:`PER_CHANNEL` of finite features (c, h, w): each (c,) float64."""
    flat = features.reshape(features.shape[0], -1)  # (c, h, w) -> (c, h*w)
    if flat.dtype == np.float16 and flat.size >= LARGE:
        return _of_many(flat)
    flat = as_float32(flat)
    mean = flat.mean(axis=1, dtype=np.float64)
    centred = flat - mean[:, None].astype(np.float32)
    return (
        mean,
        np.einsum("cp,cp->c", centred, centred).astype(np.float64) / flat.shape[1],
        flat.min(axis=1).astype(np.float64),
        flat.max(axis=1).astype(np.float64),
    )


def _of_many(features: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute :data:`PER_CHANNEL` of contiguous float16 (c, p), ten times as fast as NumPy."""
    channels, count = features.shape
    mean, variance = np.empty((2, channels))
    extremes = np.empty((3, channels), np.int16)
    scratch = np.empty(count, np.int32)
    _kernel()(features.view(np.int16), mean, variance, extremes, scratch)
    low, high, farthest = extremes.view(np.float16).astype(np.float64)
    # The words of negative numbers ascend as the numbers fall.
    is_negative = np.signbit([low, high, farthest])
    return (
        mean,
        variance,
        np.where(is_negative[2], farthest, low),
        np.where(is_negative[1], low, high),
    )


@functools.cache
def _kernel() -> Callable[..., None]:
    """Compile the loop over float16 numbers on first use; it runs without Python's lock."""
    import numba

    # Any order is faster. In float64 sums of float16 are exact, of squares nearly exact.
    @numba.njit(nogil=True, fastmath={"reassoc"})
    def measure(
        words: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        extremes: np.ndarray,
        scratch: np.ndarray,
    ) -> None:
        channels, count = words.shape
        values = scratch.view(np.float32)
        for channel in range(channels):
            low, high, farthest = np.int16(0x7FFF), np.int16(-0x8000), np.uint16(0)
            for position in range(count):
                word = words[channel, position]
                low, high = min(low, word), max(high, word)
                farthest = max(farthest, np.uint16(word))  # the most negative, if there is one
                # See float16.as_float32.
                scratch[position] = (np.int32(word) << 13) & np.int32(~0x70000000)
            total, squares = 0.0, 0.0
            for position in range(count):
                value = np.float64(values[position] * np.float32(2.0**112))
                total += value
                squares += value * value
            mean[channel] = total / count
            variance[channel] = max(squares / count - mean[channel] ** 2, 0.0)
            extremes[0, channel], extremes[1, channel] = low, high
            extremes[2, channel] = np.int16(farthest)

    return measure
