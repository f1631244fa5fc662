"""What a feature store holds: its spec, the names of its datasets, its attributes, its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT_VERSION = 1
VOID = 255  # mask value of pixels without a label

FEATURES, MASKS, IMAGES, IDS, VIEWS = "features", "masks", "images", "ids", "views"

GENERATOR = "generator"  # the one attribute that a store may lack

FEATURE_DTYPES = ("float16", "float32")
COMPRESSIONS = ("none", "zeros", "lz4", "zstd", "int8")
VIEW_NAMES = ("identity", "hflip")


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything that is the same for all samples of a store.

    Attributes
    ----------
    feature_shape
        (C, h, w): channels, height and width of a feature map.
    mask_shape
        (H, W): height and width in pixels of a mask, and of an image.
    class_names
        One name a class; class k is the mask value k.
    palette
        One (red, green, blue) a class, each 0..255.
    backbone
        Name of the network that made the features.
    weights_digest
        sha256 over the network's weights, so that features of other weights are never mixed up.
    output_stride
        H / h.
    normalization_mean, normalization_std
        Per colour channel, for images scaled to 0..1, as they entered the backbone.
    resize
        How images of other sizes were brought to (H, W).
    compute
        Number format of the backbone's forward pass: ``fp32`` or ``bf16``.
    nonnegative
        True where every feature is >= 0 (the backbone ends in a ReLU).
    feature_dtype
        ``float16`` or ``float32``.
    void_index
        Mask value of pixels without a label: 255 in every store.
    has_images
        Whether the samples' images are stored too.
    compression
        ``none`` (contiguous, memory-mapped), ``zeros`` (a bit a value that says whether it is zero, then those that
        are not), ``lz4`` or ``zstd`` (one-sample chunks, bit-shuffled), or ``int8`` (8 bits a value, a scale for each
        sample and channel; the only one that loses something).
    generator
        What generated the features in the backbone's place: family and sha256 of the generator's weights. Empty where they
        are the backbone's own; then it is in no index and no shard, and the store is what it was before there was this field.
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
        if self.feature_dtype not in FEATURE_DTYPES:
            raise ValueError(
                f"feature_dtype must be one of {FEATURE_DTYPES}, not {self.feature_dtype!r}"
            )
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression must be one of {COMPRESSIONS}, not {self.compression!r}")
        if len(self.feature_shape) != 3 or min(self.feature_shape) < 1:
            raise ValueError(
                f"feature_shape must be three positive numbers (C, h, w), not {self.feature_shape}"
            )
        if len(self.mask_shape) != 2 or min(self.mask_shape) < 1:
            raise ValueError(
                f"mask_shape must be two positive numbers (H, W), not {self.mask_shape}"
            )
        if not 1 <= len(self.class_names) <= 255:
            raise ValueError(
                f"between 1 and 255 classes fit a uint8 mask with a void value, not {len(self.class_names)}"
            )
        if len(self.palette) != len(self.class_names):
            raise ValueError(
                f"{len(self.class_names)} classes but {len(self.palette)} colours in the palette"
            )
        if self.void_index != VOID:
            raise ValueError(
                f"void_index must be {VOID}, not {self.void_index}; change the masks' values before storing them"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, void not counted."""
        return len(self.class_names)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample, features, mask and, where stored, image: exact for ``none`` and ``int8``, else unpacked."""
        pixels = self.mask_shape[0] * self.mask_shape[1]
        features = int(np.prod(self.feature_shape)) * np.dtype(self.feature_dtype).itemsize
        if self.compression == "int8":
            features = (
                int(np.prod(self.feature_shape)) + 4 * self.feature_shape[0]
            )  # codes and scales
        return features + pixels + (3 * pixels if self.has_images else 0)

    def row(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of one sample's ``features``, ``masks`` or ``images``, as they are read."""
        return {
            FEATURES: (self.feature_shape, self.feature_dtype),
            MASKS: (self.mask_shape, "uint8"),
            IMAGES: ((*self.mask_shape, 3), "uint8"),
        }[name]

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON-ready values (tuples become lists); an empty ``generator`` is left out."""
        return json.loads(json.dumps(self._present()))

    def _present(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key != GENERATOR or value
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreSpec:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        ValueError, TypeError
            For unknown or missing keys and for values out of range.
        """
        return cls(**{key: _as_tuple(value) for key, value in values.items()})

    def to_attributes(self) -> dict[str, Any]:
        """The spec as HDF5 attributes: numbers, strings and arrays that any HDF5 tool shows."""
        attributes: dict[str, Any] = {"format": "featurestore", "format_version": FORMAT_VERSION}
        for key, value in self._present().items():
            if key == "class_names":
                attributes[key] = np.array([name.encode() for name in value])
            elif key == "palette":
                attributes[key] = np.array(value, np.uint8)
            elif isinstance(value, bool):
                attributes[key] = np.uint8(value)
            elif isinstance(value, (int, tuple)):
                attributes[key] = np.asarray(
                    value, np.float64 if key.startswith("normalization") else np.int64
                )
            else:
                attributes[key] = value
        return attributes

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreSpec:
        """The inverse of :meth:`to_attributes`.

        Raises
        ------
        KeyError, ValueError, TypeError
            When an attribute is missing or out of range.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name == GENERATOR and GENERATOR not in attributes:
                continue
            value = attributes[field.name]
            if field.name == "class_names":
                values[field.name] = tuple(name.decode() for name in value.tolist())
            elif isinstance(value, str):
                values[field.name] = value
            elif field.type == "bool":
                values[field.name] = bool(value)
            else:
                values[field.name] = _as_tuple(np.asarray(value).tolist())
        return cls(**values)


def fingerprint(**parts: Any) -> str:
    """sha256 over JSON-ready values: the identity of what a store is made from.

    >>> fingerprint(a=1, b=[2]) == fingerprint(b=[2], a=1)
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value
