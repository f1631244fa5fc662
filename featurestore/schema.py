"""Description of a feature store: its spec, the HDF5 attributes that hold it, its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from featurestore.errors import FormatVersionError, SampleError
from featurestore.float16 import all_finite, any_negative
from featurestore.layouts import FEATURES, IMAGES, LAYOUTS, MASKS, Layout

FORMAT_VERSION = 1
VOID = 255  # mask value of pixels without a label

IDS, VIEWS = "ids", "views"  # datasets of text
GENERATOR = "generator"  # the only attribute that a store may lack

FEATURE_DTYPES = ("float16", "float32")
VIEW_NAMES = ("identity", "hflip")

# HDF5 types of the attributes that are not text.
ATTRIBUTE_DTYPES = {
    "feature_shape": "int64",
    "mask_shape": "int64",
    "class_names": "S",
    "palette": "uint8",
    "output_stride": "int64",
    "normalization_mean": "float64",
    "normalization_std": "float64",
    "nonnegative": "uint8",
    "void_index": "int64",
    "has_images": "uint8",
}

Values: TypeAlias = dict[str, Any]  # as read from JSON or from HDF5 attributes, not yet checked


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Properties that all samples of a store share.

    Attributes
    ----------
    feature_shape
        (C, h, w): channels, height and width of a feature map.
    mask_shape
        (H, W): height and width in pixels of a mask, and of an image.
    class_names
        Name of each class; class k is the mask value k.
    palette
        (red, green, blue) of each class, 0..255.
    backbone
        Name of the network that computed the features.
    weights_digest
        sha256 of the network's weights, so that features of two versions are never mixed.
    output_stride
        H / h.
    normalization_mean, normalization_std
        Of each colour channel of the backbone's input images, scaled to 0..1 before.
    resize
        How images of other sizes were resized to (H, W): ``stretch``, ``pad`` or ``crop``.
    compute
        Number format of the backbone's forward pass: ``fp32`` or ``bf16``.
    nonnegative
        True where every feature is >= 0 (the backbone ends in a ReLU).
    feature_dtype
        ``float16`` or ``float32``.
    void_index
        Mask value of pixels without a label: 255 in every store.
    has_images
        Whether the samples' images are stored.
    compression
        Layout of the features, a key of :data:`featurestore.layouts.LAYOUTS`. ``none`` is
        memory-mapped; ``zeros``, ``lz4`` and ``zstd`` are lossless; ``int8`` is lossy.
    generator
        Generator that made the features in the backbone's place: its family, and the sha256 of
        its weights. Empty for features of the backbone; index and shards then lack the field,
        as before the field existed.
    """

    feature_shape: tuple[int, int, int]
    mask_shape: tuple[int, int]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    backbone: str
    weights_digest: str
    output_stride: int
    normalization_mean: tuple[float, float, float]
    normalization_std: tuple[float, float, float]
    resize: str
    compute: str
    nonnegative: bool
    feature_dtype: str = "float16"
    void_index: int = VOID
    has_images: bool = False
    compression: str = "none"
    generator: str = ""

    def __post_init__(self) -> None:
        classes, colours = len(self.class_names), len(self.palette)
        checks = (
            (
                self.feature_dtype in FEATURE_DTYPES,
                f"feature_dtype must be one of {FEATURE_DTYPES}, not {self.feature_dtype!r}",
            ),
            (
                self.compression in LAYOUTS,
                f"compression must be one of {tuple(LAYOUTS)}, not {self.compression!r}",
            ),
            (
                len(self.feature_shape) == 3 and min(self.feature_shape) >= 1,
                f"feature_shape must be three positive numbers (C, h, w), not {self.feature_shape}",
            ),
            (
                len(self.mask_shape) == 2 and min(self.mask_shape) >= 1,
                f"mask_shape must be two positive numbers (H, W), not {self.mask_shape}",
            ),
            (
                1 <= classes <= 255,
                f"a uint8 mask with a void value takes 1 to 255 classes, not {classes}",
            ),
            (colours == classes, f"{classes} classes but {colours} colours in the palette"),
            (
                self.void_index == VOID,
                f"void_index must be {VOID}, not {self.void_index};"
                " change the masks' values before storing them",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)

    @property
    def num_classes(self) -> int:
        """Number of classes, without void."""
        return len(self.class_names)

    @property
    def folds(self) -> tuple[tuple[int, int], ...]:
        """Layers of a feature map: channels of each, and how often it is folded (1: not)."""
        return ((self.feature_shape[0], 1),)

    @property
    def pixel_names(self) -> tuple[str, ...]:
        """Names of the datasets of (H, W) pixels: ``masks``, and ``images`` where stored."""
        return (MASKS, IMAGES) if self.has_images else (MASKS,)

    @property
    def layout(self) -> Layout:
        """Layout of the features in a shard."""
        layout = LAYOUTS[self.compression]
        return layout(self.feature_shape, self.feature_dtype, self.nonnegative)

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample: features, mask, and image where stored; before lossless packing."""
        pixels = self.mask_shape[0] * self.mask_shape[1]
        return self.layout.sample_bytes + pixels * (4 if self.has_images else 1)

    def row(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return shape and type of a sample's ``features``, ``masks`` or ``images`` as read."""
        return {
            FEATURES: (self.feature_shape, self.feature_dtype),
            MASKS: (self.mask_shape, "uint8"),
            IMAGES: ((*self.mask_shape, 3), "uint8"),
        }[name]

    def checked_features(
        self,
        *,
        id: str,
        view: str,
        features: np.ndarray,
        mask: np.ndarray,
        image: np.ndarray | None,
        path: Path,
    ) -> np.ndarray:
        """Check a sample that is to be written, and convert its features to the spec's type.

        Parameters
        ----------
        id, view, features, mask, image
            See :meth:`featurestore.StoreWriter.append`.
        path
            The store, for the error.

        Returns
        -------
        np.ndarray
            (C, h, w) features of type ``feature_dtype``.

        Raises
        ------
        SampleError
            With the sample's id, for the first problem.
        """

        def problem(text: str, expected: object, actual: object) -> SampleError:
            text = f"sample {id!r}: {text}"
            return SampleError(text, path=path, expected=expected, actual=actual)

        if view not in VIEW_NAMES:
            raise problem(f"view {view!r} is none of {VIEW_NAMES}", VIEW_NAMES, view)
        if not id or "\0" in id:
            raise problem("an id must have a character, and no NUL", "text", id)
        image_type = f"uint8 {(*self.mask_shape, 3)}" if self.has_images else None
        for name, actual, expected in (
            ("features are", features.shape, self.feature_shape),
            ("mask is", f"{mask.dtype} {mask.shape}", f"uint8 {self.mask_shape}"),
            ("image is", None if image is None else f"{image.dtype} {image.shape}", image_type),
        ):
            if actual != expected:
                raise problem(f"{name} {actual}, expected {expected}", expected, actual)
        unknown = mask[(mask >= self.num_classes) & (mask != self.void_index)]
        if unknown.size:
            text = f"is no class (0 to {self.num_classes - 1}) and not void ({self.void_index})"
            raise problem(f"mask value {unknown[0]} {text}", self.num_classes, int(unknown[0]))
        if not all_finite(features):
            raise problem("a feature value is not finite (NaN or infinite)", "finite", "not finite")
        with np.errstate(over="ignore"):
            stored = features.astype(self.feature_dtype, copy=False)
        if stored is not features and not all_finite(stored):
            largest, limit = float(np.abs(features).max()), float(np.finfo(stored.dtype).max)
            text = f"feature value {largest:g} does not fit {stored.dtype} (largest {limit:g})"
            raise problem(text, limit, largest)
        if self.nonnegative and any_negative(stored):
            least = float(stored.min())
            raise problem(f"feature value {least:g} is negative, but the spec says >= 0", 0, least)
        return stored

    def to_dict(self) -> Values:
        """Return the spec as JSON-ready values: tuples become lists; without an empty generator."""
        values: Values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in values.items() if key != GENERATOR or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreSpec:
        """Make a spec of what :meth:`to_dict` returned.

        Raises
        ------
        ValueError, TypeError
            For unknown or missing keys and for values out of range.
        """
        return cls(**{key: _as_tuple(value) for key, value in values.items()})

    def to_attributes(self) -> dict[str, object]:
        """Return the spec as HDF5 attributes: numbers, text and arrays that any HDF5 tool shows."""
        values = self.to_dict()
        values["class_names"] = [name.encode() for name in self.class_names]
        for key, dtype in ATTRIBUTE_DTYPES.items():
            values[key] = np.asarray(values[key], dtype)
        return {"format": "featurestore", "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreSpec:
        """Make a spec of a shard's attributes.

        Raises
        ------
        KeyError, ValueError, TypeError
            When an attribute is missing or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if GENERATOR not in attributes:
            names.remove(GENERATOR)
        values = {name: _as_tuple(np.asarray(attributes[name]).tolist()) for name in names}
        values["class_names"] = tuple(name.decode() for name in values["class_names"])
        for name in ("nonnegative", "has_images"):
            values[name] = bool(values[name])
        return cls(**values)


def check_version(version: object, path: Path) -> None:
    """Refuse a file of another version of the format.

    Raises
    ------
    FormatVersionError
        When ``version`` is not :data:`FORMAT_VERSION`.
    """
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"format version {version!r}, but this library reads version {FORMAT_VERSION};"
            " write the store again",
            path=path,
            expected=FORMAT_VERSION,
            actual=version,
        )


def fingerprint(**values: object) -> str:
    """Compute the identity of what a store is made from: sha256 of JSON-ready values.

    >>> fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value
