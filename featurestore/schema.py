"""Description of a feature store: its spec, the HDF5 attributes that hold it, its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np

from featurestore.errors import FormatVersionError, SampleError
from featurestore.float16 import all_finite, any_negative
from featurestore.layers import Layer, fold, map_shape
from featurestore.layouts import FEATURES, IMAGES, LAYOUTS, MASKS, Layout

FORMAT_VERSION, LAYERED_VERSION = 1, 2  # LAYERED: with named layers or native strides
VOID = 255  # mask value of pixels without a label

IDS, VIEWS = "ids", "views"  # datasets of text
# A store lacks those that are empty or false.
OPTIONAL = ("generator", "layer_names", "layer_shapes", "native_strides")

FEATURE_DTYPES = ("float16", "float32")
VIEW_NAMES = ("identity", "hflip", "rotate", "crop", "colour", "random-N")  # N = 0, 1, ...
VIEW_NAME = re.compile("|".join(VIEW_NAMES).replace("N", r"\d+"))

TEXTS = {"class_names", "layer_names"}  # attributes that are lists of text

# HDF5 types of the attributes that are not text.
ATTRIBUTE_DTYPES = {
    "feature_shape": "int64",
    "mask_shape": "int64",
    "class_names": "S",
    "layer_names": "S",
    "layer_shapes": "int64",
    "native_strides": "uint8",
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
        (C, h, w): channels, height and width of a feature map; of several layers, of the map
        that they are assembled into (:mod:`featurestore.layers`).
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
        H / h, rounded.
    normalization_mean, normalization_std
        Of each colour channel of the backbone's input images, scaled to 0..1 before.
    resize
        How images got the size (H, W): ``stretch``, ``pad``, ``crop``, or ``tile``, windows of
        the images at their own scale.
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
    layer_names, layer_shapes
        Names of the backbone's layers, shallow to deep, and the shape (c, h, w) of each as it is
        stored. Empty for a store of one layer without a name.
    native_strides
        Whether the backbone kept its strides; default: convolutions were dilated to stride 8 where
        the network can.
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
    layer_names: tuple[str, ...] = ()
    layer_shapes: tuple[tuple[int, int, int], ...] = ()
    native_strides: bool = False

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
                all(0 <= channel <= 255 for colour in self.palette for channel in colour),
                "a colour of the palette is not in 0..255",
            ),
            (
                len(set(self.layer_names)) == len(self.layer_names) == len(self.layer_shapes),
                f"layer_names {self.layer_names} and layer_shapes {self.layer_shapes} must be a"
                " name and a shape of each layer",
            ),
            (
                self.output_stride >= 1,
                f"output_stride must be a positive number, not {self.output_stride}",
            ),
            (
                self.void_index == VOID,
                f"void_index must be {VOID}, not {self.void_index};"
                " change the masks' values before storing them",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)
        assembled = map_shape(self.layers, self.mask_shape) if self.layer_names else None
        if assembled not in (None, self.feature_shape):
            raise ValueError(
                f"the layers make a map of {assembled}, but feature_shape is {self.feature_shape}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, without void."""
        return len(self.class_names)

    @property
    def pixel_names(self) -> tuple[str, ...]:
        """Names of the datasets of (H, W) pixels, ``masks``, and ``images`` where stored."""
        return (MASKS, IMAGES) if self.has_images else (MASKS,)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Stored layers, shallow to deep; one without a name where the store names none."""
        if not self.layer_names:
            return (Layer("", self.feature_shape),)
        return tuple(map(Layer, self.layer_names, self.layer_shapes))

    @property
    def folds(self) -> tuple[tuple[int, int], ...]:
        """Channels c and fold r of each layer, which has c*r*r channels of the assembled map."""
        grid = self.feature_shape[1:]
        return tuple((layer.shape[0], fold(layer, grid)) for layer in self.layers)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Path of each layer's features in a shard, ``features``, or ``layers/NAME/features``."""
        return tuple(layer.dataset(FEATURES) for layer in self.layers)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layout of each layer in a shard, by its HDF5 group."""
        layout = LAYOUTS[self.compression]
        return {
            layer.group: layout(layer.shape, self.feature_dtype, self.nonnegative)
            for layer in self.layers
        }

    def select(self, names: Sequence[str]) -> StoreSpec:
        """Describe a store as if it had only the layers ``names``; none: all.

        Raises
        ------
        ValueError
            When a layer is not stored.
        """
        if not names or tuple(names) == self.layer_names:
            return self
        if missing := [name for name in names if name not in self.layer_names]:
            known = ", ".join(self.layer_names) or "one layer without a name"
            raise ValueError(f"layer {missing[0]!r} is not stored; stored is {known}")
        layers = [layer for layer in self.layers if layer.name in names]
        shape = map_shape(layers, self.mask_shape)
        return dataclasses.replace(
            self,
            feature_shape=shape,
            output_stride=round(self.mask_shape[0] / shape[1]),
            layer_names=tuple(layer.name for layer in layers),
            layer_shapes=tuple(layer.shape for layer in layers),
        )

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample (features, mask, and image where stored), before lossless packing."""
        pixels = self.mask_shape[0] * self.mask_shape[1]
        features = sum(layout.sample_bytes for layout in self.layouts.values())
        return features + pixels * (4 if self.has_images else 1)

    @property
    def exact_size(self) -> bool:
        """Whether :attr:`sample_bytes` is exact."""
        return LAYOUTS[self.compression].largest_ratio == 1

    def check_size(self, samples: int, size: int) -> None:
        """Refuse a shard that says it unpacks to more than its bytes can hold.

        Raises
        ------
        ValueError
            When ``samples`` samples need more than ``size`` bytes.
        """
        claimed = samples * self.sample_bytes
        if claimed > size * LAYOUTS[self.compression].largest_ratio:
            raise ValueError(f"{size} bytes cannot hold {samples} samples of {claimed} bytes")

    def row(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return shape and type of a sample's row in a dataset, as read.

        ``name`` is ``masks``, ``images`` or one of :attr:`feature_names`.
        """
        rows: dict[str, tuple[tuple[int, ...], str]] = {
            layer.dataset(FEATURES): (layer.shape, self.feature_dtype) for layer in self.layers
        }
        rows[MASKS] = (self.mask_shape, "uint8")
        rows[IMAGES] = ((*self.mask_shape, 3), "uint8")
        return rows[name]

    def checked_features(
        self,
        *,
        id: str,
        view: str,
        features: np.ndarray | Mapping[str, np.ndarray],
        mask: np.ndarray,
        image: np.ndarray | None,
        path: Path,
    ) -> list[np.ndarray]:
        """Check a sample that is to be written, and convert its features to the spec's type.

        Parameters
        ----------
        id, view, features, mask, image
            See :meth:`featurestore.StoreWriter.append`.
        path
            The store, for the error.

        Returns
        -------
        list of np.ndarray
            (c, h, w) features of type ``feature_dtype`` of each layer.

        Raises
        ------
        SampleError
            With the sample's id, for the first problem.
        """

        def problem(text: str, expected: object, actual: object) -> SampleError:
            text = f"sample {id!r}: {text}"
            return SampleError(text, path=path, expected=expected, actual=actual)

        if not VIEW_NAME.fullmatch(view):
            raise problem(f"view {view!r} is none of {VIEW_NAMES}", VIEW_NAMES, view)
        if not id or "\0" in id:
            raise problem("an id must have a character, and no NUL", "text", id)
        arrays = features if isinstance(features, Mapping) else {"": features}
        names = tuple(layer.name for layer in self.layers)
        if set(arrays) != set(names):
            raise problem(f"layers are {tuple(arrays)}, expected {names}", names, tuple(arrays))
        image_type = f"uint8 {(*self.mask_shape, 3)}" if self.has_images else None
        shapes = [
            (f"{layer.name} features are".lstrip(), arrays[layer.name].shape, layer.shape)
            for layer in self.layers
        ]
        for name, actual, expected in (
            *shapes,
            ("mask is", f"{mask.dtype} {mask.shape}", f"uint8 {self.mask_shape}"),
            ("image is", None if image is None else f"{image.dtype} {image.shape}", image_type),
        ):
            if actual != expected:
                raise problem(f"{name} {actual}, expected {expected}", expected, actual)
        unknown = mask[(mask >= self.num_classes) & (mask != self.void_index)]
        if unknown.size:
            text = f"is no class (0 to {self.num_classes - 1}) and not void ({self.void_index})"
            raise problem(f"mask value {unknown[0]} {text}", self.num_classes, int(unknown[0]))
        return [self._converted(arrays[name], problem) for name in names]

    def _converted(
        self, features: np.ndarray, problem: Callable[[str, object, object], SampleError]
    ) -> np.ndarray:
        """Convert one layer's features (c, h, w) to the spec's type."""
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
        """Return the spec as JSON-ready values without the empty ones; tuples become lists."""
        values: Values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in values.items() if key not in OPTIONAL or value}

    @property
    def format_version(self) -> int:
        """Version of the format, 2 with named layers or native strides, else 1."""
        return LAYERED_VERSION if self.layer_names or self.native_strides else FORMAT_VERSION

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreSpec:
        """Make a spec of what :meth:`to_dict` returned.

        Raises
        ------
        ValueError, TypeError
            For unknown or missing keys and for values of another type or out of range.
        """
        fields = {key: _as_tuple(value) for key, value in values.items()}
        for key, kind in get_type_hints(cls).items():
            if key in fields and not _is_of(fields[key], kind):
                raise TypeError(f"{key} is {fields[key]!r:.80}, which is no {kind}")
        return cls(**fields)

    def to_attributes(self) -> dict[str, object]:
        """Return the spec as HDF5 attributes: numbers, text and arrays that any HDF5 tool shows."""
        values = self.to_dict()
        for key in TEXTS & values.keys():
            values[key] = [name.encode() for name in values[key]]
        for key, dtype in ATTRIBUTE_DTYPES.items():
            if key in values:
                values[key] = np.asarray(values[key], dtype)
        return {"format": "featurestore", "format_version": self.format_version, **values}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> StoreSpec:
        """Make a spec of a shard's attributes.

        Raises
        ------
        KeyError, ValueError, TypeError
            When an attribute is missing or out of range.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        names = fields - (set(OPTIONAL) - attributes.keys())
        values = {name: _as_tuple(np.asarray(attributes[name]).tolist()) for name in names}
        for name in ("nonnegative", "has_images", "native_strides"):
            values[name] = bool(values.get(name))
        return cls.from_dict(values)


def check_version(version: object, path: Path) -> None:
    """Refuse a file of another version of the format.

    Raises
    ------
    FormatVersionError
        When ``version`` is neither :data:`FORMAT_VERSION` nor :data:`LAYERED_VERSION`.
    """
    if version not in (FORMAT_VERSION, LAYERED_VERSION):
        raise FormatVersionError(
            f"format version {version!r}, but this library reads versions {FORMAT_VERSION} and"
            f" {LAYERED_VERSION}; write the store again",
            path=path,
            expected=(FORMAT_VERSION, LAYERED_VERSION),
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
    value = value.decode() if isinstance(value, bytes) else value
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value is of a field's type, such as ``tuple[str, ...]``."""
    if get_origin(kind) is not tuple:
        return type(value) is kind or (kind is float and type(value) is int)
    kinds = get_args(kind)
    if not isinstance(value, tuple):
        return False
    kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    return len(value) == len(kinds) and all(map(_is_of, value, kinds))
