"""Masks to generate features for: those of a folder of mask files, or of a feature store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

import featurestore
from featurestore import VOID, FeatureStore, SpecMismatchError, StoreSpec
from featurestore.index import INDEX_NAME
from stages.common.errors import DataError
from stages.data.images import MASK_SUFFIXES, decode_mask, read_bytes, resize_pair


class Masks(ABC):
    """Masks by position, brought to the size of a spec by its resize rule.

    Attributes
    ----------
    path
        Where they come from.
    spec
        Whose classes and size they have.
    names
        (id, view) of each.
    has_images
        Whether the images come along.
    """

    def __init__(
        self, path: Path, spec: StoreSpec, names: Sequence[tuple[str, str]], *, has_images: bool
    ) -> None:
        self.path = path
        self.spec = spec
        self.names = list(names)
        self.has_images = has_images

    def __len__(self) -> int:
        return len(self.names)

    def mask(self, position: int, /) -> np.ndarray:
        """(H, W) uint8 class indices, 255 = void; errors as of :meth:`read`."""
        return self.read(position)[1]

    def read(self, position: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Image (H, W, 3) uint8, or None, and mask (H, W) uint8.

        Raises
        ------
        DataError
            When the mask cannot be read, or holds a value that is no class.
        """
        image, mask = self._original(position)
        # One rule brings both to their size, so that a image stays on its mask; where there is none, a black one does.
        picture = Image.new("RGB", mask.shape[::-1]) if image is None else Image.fromarray(image)
        resized, mask = resize_pair(picture, mask, size=self.spec.mask_shape, rule=self.spec.resize)
        return None if image is None else resized, mask

    @abstractmethod
    def _original(self, position: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Image, or None, and mask at their own size."""


class FolderMasks(Masks):
    """The mask files of a folder, in the order of their names; values are class indices, 255 = void.

    Raises
    ------
    DataError
        When there is none, or two have the same name.
    """

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        files: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in MASK_SUFFIXES and not file.name.startswith("."):
                if file.stem in files:
                    raise DataError(
                        file,
                        f"has the same id ({file.stem}) as {files[file.stem].name}; rename one of them",
                    )
                files[file.stem] = file
        if not files:
            raise DataError(
                path,
                f"holds neither masks ({', '.join(MASK_SUFFIXES)}) nor a feature store; name a folder of either",
            )
        super().__init__(path, spec, [(name, "identity") for name in files], has_images=False)
        self._files = list(files.values())

    def _original(self, position: int) -> tuple[np.ndarray | None, np.ndarray]:
        file = self._files[position]
        return None, decode_mask(
            read_bytes(file, "mask"), file, num_classes=self.spec.num_classes, void_index=VOID
        )


class StoreMasks(Masks):
    """The masks of a feature store's samples.

    Raises
    ------
    SpecMismatchError
        When its classes are not those of the spec.
    """

    def __init__(self, store: FeatureStore, spec: StoreSpec, *, images: bool) -> None:
        for value, (found, expected) in enumerate(
            zip_longest(store.spec.class_names, spec.class_names)
        ):
            if found != expected:
                message = f"mask value {value} is {found!r} here, but {expected!r} to the generator; give it masks of its own classes"
                raise SpecMismatchError(
                    message,
                    path=store.path,
                    expected=spec.class_names,
                    actual=store.spec.class_names,
                )
        names = list(zip(store.ids, store.views, strict=True))
        super().__init__(store.path, spec, names, has_images=images and store.spec.has_images)
        self._store = store

    def _original(self, position: int) -> tuple[np.ndarray | None, np.ndarray]:
        image = self._store.image(position) if self.has_images else None
        return image, self._store.mask(position)


def open_masks(path: Path, spec: StoreSpec, *, images: bool) -> Masks:
    """The masks at a path: a feature store's (its folder, or a shard), or those of a folder of mask files.

    Raises
    ------
    DataError
        When there is nothing at ``path``, or no mask in the folder.
    FeatureStoreError
        When the store is not sound, or of other classes.
    """
    if path.is_file() or (path / INDEX_NAME).is_file():
        return StoreMasks(featurestore.open(path), spec, images=images)
    if not path.is_dir():
        raise DataError(path, "there is no such folder; name one of mask files, or a feature store")
    return FolderMasks(path, spec)
