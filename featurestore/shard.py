"""One shard: an HDF5 file of samples, written atomically, read through a memory map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from featurestore.errors import FeatureStoreError, FormatVersionError, ShardCorruptError, StoreNotFoundError
from featurestore.index import ShardRecord, sync_folder
from featurestore.schema import FEATURES, FORMAT_VERSION, IDS, IMAGES, MASKS, VIEWS, StoreSpec

PAGE = 4096  # datasets start on a memory page, so that a map of one is aligned


def write_shard(
    path: Path,
    spec: StoreSpec,
    *,
    ids: Sequence[str],
    views: Sequence[str],
    features: np.ndarray,
    masks: np.ndarray,
    images: np.ndarray | None = None,
) -> ShardRecord:
    """Write N samples as one shard; it appears under its name only once it is whole.

    Parameters
    ----------
    path
        The shard's final name.
    ids, views
        N names each.
    features
        (N, C, h, w) of the spec's type.
    masks
        (N, H, W) uint8.
    images
        (N, H, W, 3) uint8, where the spec has images.

    Returns
    -------
    ShardRecord
        Size and sha256 of the finished file. The same arguments give the same bytes.
    """
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w", alignment_threshold=PAGE, alignment_interval=PAGE) as file:
        for key, value in spec.to_attributes().items():
            file.attrs[key] = value
        for name, texts in ((IDS, ids), (VIEWS, views)):
            encoded = [text.encode() for text in texts]
            dtype = h5py.string_dtype("utf-8", length=max(len(text) for text in encoded))
            file.create_dataset(name, data=np.array(encoded, dtype=dtype))
        _write_array(file, FEATURES, features, spec.compression)
        _write_array(file, MASKS, masks, spec.compression)
        if images is not None:
            _write_array(file, IMAGES, images, spec.compression)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    record = ShardRecord(path.name, len(ids), partial.stat().st_size, file_sha256(partial))
    os.replace(partial, path)
    sync_folder(path.parent)
    return record


def _write_array(file: h5py.File, name: str, array: np.ndarray, compression: str) -> None:
    if compression == "none":
        file.create_dataset(name, data=array)
        return
    import hdf5plugin

    filters = hdf5plugin.Bitshuffle(cname="zstd" if compression == "zstd" else "lz4")
    file.create_dataset(name, data=array, chunks=(1, *array.shape[1:]), compression=filters)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Shard:
    """A shard that is open for reading.

    Uncompressed datasets are memory maps (no HDF5 handle stays open, so a fork is
    harmless); compressed ones are read through h5py.

    Raises
    ------
    StoreNotFoundError
        When there is no such file.
    FormatVersionError
        When another version of the format wrote it.
    ShardCorruptError
        When it is no HDF5 file, or its datasets are not those of its own attributes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise StoreNotFoundError("there is no such shard", path=path)
        try:
            self._open(path)
        except FeatureStoreError:
            raise
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ... on damaged files
            raise ShardCorruptError(f"cannot be read as a shard ({error}); write the store again", path=path) from error

    def _open(self, path: Path) -> None:
        file = h5py.File(path, "r")
        try:
            version = int(file.attrs["format_version"])
            if version != FORMAT_VERSION:
                raise FormatVersionError(
                    f"format version {version}, but this library reads version {FORMAT_VERSION}; write the store again",
                    path=path,
                    expected=FORMAT_VERSION,
                    found=version,
                )
            self.spec = spec = StoreSpec.from_attributes(file.attrs)
            if spec.compression != "none":
                import hdf5plugin  # noqa: F401  (registers its filters with HDF5)
            self.ids = [text.decode() for text in file[IDS][()].tolist()]
            self.views = [text.decode() for text in file[VIEWS][()].tolist()]
            shapes = {FEATURES: (spec.feature_shape, spec.feature_dtype), MASKS: (spec.mask_shape, "uint8")}
            if spec.has_images:
                shapes[IMAGES] = ((*spec.mask_shape, 3), "uint8")
            self._arrays: dict[str, np.ndarray | h5py.Dataset] = {}
            for name, (shape, dtype) in shapes.items():
                dataset = file[name]
                expected = ((len(self.ids), *shape), np.dtype(dtype))
                if (dataset.shape, dataset.dtype) != expected or len(self.views) != len(self.ids):
                    found = (dataset.shape, dataset.dtype)
                    message = f"dataset {name!r} is {found}, but its spec says {expected}"
                    raise ShardCorruptError(message, path=path, expected=expected, found=found)
                self._arrays[name] = dataset if spec.compression != "none" else _mapped(path, dataset)
        except BaseException:
            file.close()
            raise
        if spec.compression == "none":
            file.close()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, name: str, row: int) -> np.ndarray:
        """Row ``row`` of a dataset: a read-only view where uncompressed, else a fresh array.

        Raises
        ------
        ShardCorruptError
            When a compressed chunk cannot be decoded.
        """
        array = self._arrays[name]
        if isinstance(array, np.ndarray):
            return array[row]
        try:
            return array[row]
        except OSError as error:
            message = f"row {row} of {name!r} cannot be decoded ({error}); write the store again"
            raise ShardCorruptError(message, path=self.path) from error


def _mapped(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """(N, ...) read-only map of a contiguous dataset's bytes in the file."""
    offset = dataset.id.get_offset()
    if offset is None or offset + dataset.nbytes > path.stat().st_size:
        raise ShardCorruptError(f"dataset {dataset.name!r} reaches past the end of the file", path=path)
    return np.asarray(np.memmap(path, dataset.dtype, "r", offset, dataset.shape))
