"""Per-channel and per-class statistics of a store, gathered sample by sample and merged shard by shard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featurestore.codec import as_float32
from featurestore.schema import StoreSpec


@dataclass
class Statistics:
    """Statistics over all positions of all samples.

    Attributes
    ----------
    count
        Number of samples.
    mean, variance, minimum, maximum
        (C,) float64, per feature channel, over samples and positions; population variance.
    class_pixels
        (K,) int64, mask pixels a class.
    class_samples
        (K,) int64, samples in which the class occurs.
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
        """(C,) float64 standard deviation a channel."""
        return np.sqrt(self.variance)

    @classmethod
    def of_sample(cls, spec: StoreSpec, features: np.ndarray, mask: np.ndarray) -> Statistics:
        """Statistics of one sample: features (C, h, w), mask (H, W)."""
        flat = as_float32(features).reshape(features.shape[0], -1)  # (C, h, w) -> (C, h*w)
        mean = flat.mean(axis=1, dtype=np.float64)
        centred = flat - mean[:, None].astype(np.float32)
        pixels = np.bincount(mask.reshape(-1), minlength=256)
        return cls(
            count=1,
            mean=mean,
            variance=np.einsum("cp,cp->c", centred, centred).astype(np.float64) / flat.shape[1],
            minimum=flat.min(axis=1).astype(np.float64),
            maximum=flat.max(axis=1).astype(np.float64),
            class_pixels=pixels[: spec.num_classes].astype(np.int64),
            class_samples=(pixels[: spec.num_classes] > 0).astype(np.int64),
            void_pixels=int(pixels[spec.void_index]),
        )

    def merged(self, other: Statistics) -> Statistics:
        """Statistics of both sets of samples together (Chan et al. 1979)."""
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
        """All parts merged in their order, so that the same parts give the same bits.

        Raises
        ------
        ValueError
            When there is no part.
        """
        total: Statistics | None = None
        for part in parts:
            total = part if total is None else total.merged(part)
        if total is None:
            raise ValueError("no samples, so no statistics")
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; floats survive the round trip exactly."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        KeyError, TypeError, ValueError
            When a value is missing or is no list of numbers.
        """
        floats = {
            key: np.asarray(values[key], np.float64)
            for key in ("mean", "variance", "minimum", "maximum")
        }
        counts = {
            key: np.asarray(values[key], np.int64) for key in ("class_pixels", "class_samples")
        }
        return cls(
            count=int(values["count"]), void_pixels=int(values["void_pixels"]), **floats, **counts
        )
