"""What a sample must be before it is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featurestore.codec import all_finite, any_negative
from featurestore.errors import SampleError
from featurestore.schema import VIEW_NAMES, StoreSpec


def checked_features(
    spec: StoreSpec,
    *,
    id: str,
    features: np.ndarray,
    mask: np.ndarray,
    image: np.ndarray | None,
    view: str,
    path: Path,
) -> np.ndarray:
    """The sample's features (C, h, w) in the spec's type, once everything about the sample is right.

    Raises
    ------
    SampleError
        With the store's ``path`` and the sample's id, for the first thing that is wrong.
    """

    def wrong(message: str, expected: object, found: object) -> SampleError:
        return SampleError(f"sample {id!r}: {message}", path=path, expected=expected, actual=found)

    if view not in VIEW_NAMES:
        raise wrong(f"view {view!r} is none of {VIEW_NAMES}", VIEW_NAMES, view)
    if not id or "\0" in id:
        raise wrong("an id must have a character, and no NUL", "text", id)
    if features.shape != spec.feature_shape:
        raise wrong(
            f"features are {features.shape}, expected {spec.feature_shape}",
            spec.feature_shape,
            features.shape,
        )
    if mask.shape != spec.mask_shape or mask.dtype != np.uint8:
        found = f"{mask.dtype} {mask.shape}"
        raise wrong(f"mask is {found}, expected uint8 {spec.mask_shape}", spec.mask_shape, found)
    unknown = mask[(mask >= spec.num_classes) & (mask != spec.void_index)]
    if unknown.size:
        message = f"mask value {unknown[0]} is no class (0 to {spec.num_classes - 1}) and not void ({spec.void_index})"
        raise wrong(message, spec.num_classes, int(unknown[0]))
    image_shape = (*spec.mask_shape, 3) if spec.has_images else None
    found_shape = None if image is None else image.shape
    if found_shape != image_shape or (image is not None and image.dtype != np.uint8):
        raise wrong(
            f"image is {found_shape}, expected {image_shape} uint8", image_shape, found_shape
        )
    if not all_finite(features):
        raise wrong("a feature value is not finite (NaN or infinite)", "finite", "not finite")
    with np.errstate(over="ignore"):
        stored = features.astype(spec.feature_dtype, copy=False)
    if stored is not features and not all_finite(stored):
        largest, limit = float(np.abs(features).max()), float(np.finfo(spec.feature_dtype).max)
        raise wrong(
            f"feature value {largest:g} does not fit {spec.feature_dtype} (largest {limit:g})",
            limit,
            largest,
        )
    if spec.nonnegative and any_negative(stored):
        raise wrong(
            f"feature value {stored.min():g} is negative, but the spec says >= 0",
            0,
            float(stored.min()),
        )
    return stored
