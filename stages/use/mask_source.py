"""Masks to generate features for: those of a folder of mask files, or of a feature store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

import featurestore
from featurestore import VOID, FeatureStore, SpecMismatchError, StoreSpec
from featurestore.index import INDEX_NAME
from stages.common.errors import DataError
from stages.common.windows import TILE
from stages.data.images import MASK_SUFFIXES, read_bytes, resize_pair
from stages.data.masks import decode_mask
from stages.datasets.layout import files_by_stem

Pair = tuple[np.ndarray | None, np.ndarray]  # image (H, W, 3) uint8, or None; mask (H, W) uint8


@dataclass(frozen=True)
class Masks:
    """Masks by position, resized to the size of a spec by the spec's rule.

    Attributes
    ----------
    path
        Folder or store of the masks.
    spec
        Spec with the classes, size and resize rule.
    names
        (id, view) of each mask.
    has_images
        Whether :meth:`read` returns images too.
    original
        Reads an image and its mask at their original size, by position.
    """

    path: Path
    spec: StoreSpec
    names: Sequence[tuple[str, str]]
    has_images: bool
    original: Callable[[int], Pair]

    def __len__(self) -> int:
        return len(self.names)

    def mask(self, position: int, /) -> np.ndarray:
        """Return the mask of :meth:`read`, (H, W) uint8."""
        return self.read(position)[1]

    def read(self, position: int) -> Pair:
        """Read an image, (H, W, 3) uint8 or None, and its mask, (H, W) uint8, 255 = void.

        Raises
        ------
        DataError
            When the mask cannot be read, or holds a value that is no class; when it is no window
            and the generator learned from windows.
        """
        image, mask = self.original(position)
        if self.spec.resize == TILE and mask.shape != self.spec.mask_shape:
            id, (height, width) = self.names[position][0], self.spec.mask_shape
            raise DataError(
                self.path / id,
                f"this mask is {mask.shape[1]} x {mask.shape[0]} pixels, but the generator learned"
                f" from windows of {width} x {height} (extract.resize: tile); cut it to this size",
                expected=(height, width),
                actual=mask.shape,
            )
        # The rule needs an image and a mask; a black image stands in for a missing one.
        full = Image.new("RGB", mask.shape[::-1]) if image is None else Image.fromarray(image)
        resized, mask = resize_pair(full, mask, size=self.spec.mask_shape, rule=self.spec.resize)
        return None if image is None else resized, mask


def folder_masks(path: Path, spec: StoreSpec) -> Masks:
    """Open the mask files of a folder, sorted by name; values are class indices, 255 = void.

    Raises
    ------
    DataError
        When there is no mask file, or two have the same name.
    """
    files = files_by_stem(path, MASK_SUFFIXES)
    if not files:
        raise DataError(
            path,
            f"holds neither masks ({', '.join(MASK_SUFFIXES)}) nor a feature store; "
            "name a folder of either",
        )
    names = [(id, "identity") for id in files]

    def original(position: int) -> Pair:
        file = files[names[position][0]]
        content = read_bytes(file, "mask")
        return None, decode_mask(content, file, num_classes=spec.num_classes, void_index=VOID)

    return Masks(path, spec, names, False, original)


def store_masks(store: FeatureStore, spec: StoreSpec, *, images: bool) -> Masks:
    """Open the masks of a feature store's samples.

    Raises
    ------
    SpecMismatchError
        When the store has other classes than the spec.
    """
    classes = zip_longest(store.spec.class_names, spec.class_names)
    for value, (actual, expected) in enumerate(classes):
        if actual != expected:
            raise SpecMismatchError(
                f"mask value {value} is {actual!r} here, but {expected!r} to the generator; "
                "give it masks of its own classes",
                path=store.path,
                expected=spec.class_names,
                actual=store.spec.class_names,
            )
    has_images = images and store.spec.has_images

    def original(position: int) -> Pair:
        return store.image(position) if has_images else None, store.mask(position)

    names = list(zip(store.ids, store.views, strict=True))
    return Masks(store.path, spec, names, has_images, original)


def open_masks(path: Path, spec: StoreSpec, *, images: bool) -> Masks:
    """Open the masks at a path: a feature store (folder or shard), or a folder of mask files.

    Parameters
    ----------
    path
        Feature store or folder.
    spec
        Classes, size and resize rule of the generator.
    images
        Whether to read images too, where a store has them.

    Raises
    ------
    DataError
        When there is nothing at ``path``, or no mask in the folder.
    FeatureStoreError
        When the store is damaged, or has other classes.
    """
    if path.is_file() or (path / INDEX_NAME).is_file():
        return store_masks(featurestore.open(path), spec, images=images)
    if not path.is_dir():
        raise DataError(path, "there is no such folder; name one of mask files, or a feature store")
    return folder_masks(path, spec)
