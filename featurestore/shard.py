"""One shard: an HDF5 file of samples, read through a memory map."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurestore import codec
from featurestore.copying import take_rows
from featurestore.errors import (
    FeatureStoreError,
    FormatVersionError,
    ShardCorruptError,
    StoreNotFoundError,
    StoreReadError,
)
from featurestore.schema import FEATURES, FORMAT_VERSION, IDS, IMAGES, MASKS, VIEWS, StoreSpec

BITS, VALUES, STARTS = (
    "feature_bits",
    "feature_values",
    "feature_starts",
)  # in place of FEATURES where zeros are packed
SCALES = "feature_scales"  # beside FEATURES where they are int8


class Shard:
    """A shard that is open for reading.

    All but chunked datasets lie in one memory map (no HDF5 handle stays open, so a fork is
    harmless); chunked ones (``lz4``, ``zstd``) are read through h5py. Either takes one file descriptor.

    Attributes
    ----------
    plain
        Arrays (N, ...) that lie in the file as they are, by name: ``masks``, and ``features`` and ``images`` where they do.

    Raises
    ------
    StoreNotFoundError
        When there is no such file.
    FormatVersionError
        When another version of the format wrote it.
    ShardCorruptError
        When it is no HDF5 file, or its datasets are not those of its own attributes.
    StoreReadError
        When the operating system refuses (too many open files, a disk that does not answer), or a filter is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise StoreNotFoundError("there is no such shard", path=path)
        try:
            self._open(path)
        except FeatureStoreError:
            raise
        except OSError as error:
            if error.errno is None:  # HDF5's word on the file's content
                raise ShardCorruptError(
                    f"cannot be read as a shard ({error}); write the store again", path=path
                ) from error
            raise refused(path, error) from error
        except ImportError as error:
            raise StoreReadError(
                f"is packed by a filter that this Python lacks; pip install {error.name}", path=path
            ) from error
        except Exception as error:  # h5py raises KeyError, RuntimeError, ... on damaged files
            raise ShardCorruptError(
                f"cannot be read as a shard ({error}); write the store again", path=path
            ) from error

    def _open(self, path: Path) -> None:
        file = h5py.File(path, "r")
        try:
            version = int(file.attrs["format_version"])
            if version != FORMAT_VERSION:
                raise FormatVersionError(
                    f"format version {version}, but this library reads version {FORMAT_VERSION}; write the store again",
                    path=path,
                    expected=FORMAT_VERSION,
                    actual=version,
                )
            self.spec = spec = StoreSpec.from_attributes(file.attrs)
            chunked = spec.compression in ("lz4", "zstd")
            if chunked:
                import hdf5plugin  # noqa: F401  (registers its filters with HDF5)
            self.ids = [text.decode() for text in file[IDS][()].tolist()]
            self.views = [text.decode() for text in file[VIEWS][()].tolist()]
            if len(self.views) != len(self.ids):
                self._refuse(VIEWS, len(self.views), len(self.ids))
            self._arrays: dict[str, np.ndarray | h5py.Dataset] = {}
            content = None if chunked else np.asarray(np.memmap(path, np.uint8, "r"))
            for name, (shape, dtype) in self._layout(file).items():
                dataset = file[name]
                found, expected = (dataset.shape, dataset.dtype), (shape, np.dtype(dtype))
                if found != expected:
                    self._refuse(name, found, expected)
                self._arrays[name] = dataset if content is None else _mapped(content, dataset, path)
            packed = (FEATURES,) if spec.compression == "int8" else ()
            self.plain = {
                name: array
                for name, array in self._arrays.items()
                if isinstance(array, np.ndarray) and name not in packed
            }
        except BaseException:
            file.close()
            raise
        if not chunked:
            file.close()

    def _layout(self, file: h5py.File) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each dataset that the attributes promise."""
        spec, count = self.spec, len(self.ids)
        features: dict[str, tuple[tuple[int, ...], str]] = {
            FEATURES: ((count, *spec.feature_shape), spec.feature_dtype)
        }
        if spec.compression == "zeros":
            self._starts = np.asarray(file[STARTS][()])
            ordered = (
                self._starts.shape == (count + 1,)
                and self._starts[0] == 0
                and (np.diff(self._starts) >= 0).all()
            )
            if not ordered:
                self._refuse(STARTS, self._starts.shape, (count + 1,))
            packed = -(-int(np.prod(spec.feature_shape)) // 8)
            features = {
                BITS: ((count, packed), "uint8"),
                VALUES: ((int(self._starts[-1]),), spec.feature_dtype),
            }
        elif spec.compression == "int8":
            codes = "uint8" if spec.nonnegative else "int8"
            features = {
                FEATURES: ((count, *spec.feature_shape), codes),
                SCALES: ((count, spec.feature_shape[0]), "float32"),
            }
        layout = {**features, MASKS: ((count, *spec.mask_shape), "uint8")}
        if spec.has_images:
            layout[IMAGES] = ((count, *spec.mask_shape, 3), "uint8")
        return layout

    def _refuse(self, name: str, found: object, expected: object) -> None:
        message = f"dataset {name!r} is {found}, but the shard's attributes say {expected}; write the store again"
        raise ShardCorruptError(message, path=self.path, expected=expected, actual=found)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, name: str, row: int) -> np.ndarray:
        """Row ``row`` of ``features``, ``masks`` or ``images``: a read-only view of the file where it lies there as it is.

        Raises
        ------
        ShardCorruptError
            When a row cannot be decoded.
        """
        if name in self.plain:
            return self.plain[name][row]
        shape, dtype = self.spec.row(name)
        out = np.empty(shape, dtype)
        self._decode(name, row, out)
        return out

    def gather_into(
        self, name: str, rows: np.ndarray, out: np.ndarray, *, past_caches: bool = False
    ) -> None:
        """Several rows, copied (see :func:`featurestore.copying.take_rows`) or decoded straight into ``out`` (B, ...), contiguous.

        Raises
        ------
        ShardCorruptError
            When a row cannot be decoded.
        """
        if name in self.plain:
            take_rows(self.plain[name], rows, out, past_caches=past_caches)
        else:
            for row, target in zip(rows.tolist(), out, strict=True):
                self._decode(name, row, target)

    def _decode(self, name: str, row: int, out: np.ndarray) -> None:
        """One row that does not lie in the file as it is.

        Raises
        ------
        ShardCorruptError
            When a row cannot be decoded.
        """
        arrays: dict[str, Any] = self._arrays
        try:
            if name == FEATURES and self.spec.compression == "zeros":
                codec.unpack_zeros(
                    arrays[BITS][row],
                    arrays[VALUES][self._starts[row] : self._starts[row + 1]],
                    out,
                )
            elif name == FEATURES and self.spec.compression == "int8":
                codec.dequantise(arrays[FEATURES][row], arrays[SCALES][row], out)
            else:
                arrays[name].read_direct(out, np.s_[row])
        except (OSError, ValueError) as error:
            message = f"row {row} of {name!r} cannot be decoded ({error}); write the store again"
            raise ShardCorruptError(message, path=self.path) from error


def refused(path: Path, error: OSError) -> StoreReadError:
    """What to say when the operating system did not let a shard be read."""
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        message = f"cannot be opened ({reason}); raise the limit, with `ulimit -n`, above the store's number of shards"
        return StoreReadError(message, path=path)
    return StoreReadError(
        f"cannot be read ({reason}); look at the disk, and start again", path=path
    )


def _mapped(content: np.ndarray, dataset: h5py.Dataset, path: Path) -> np.ndarray:
    """A contiguous dataset's bytes in the map of its file."""
    if dataset.size == 0:  # no bytes, so no place in the file
        return np.empty(dataset.shape, dataset.dtype)
    offset = dataset.id.get_offset()
    if offset is None or offset + dataset.nbytes > len(content):
        raise ShardCorruptError(
            f"dataset {dataset.name!r} reaches past the end of the file", path=path
        )
    return content[offset : offset + dataset.nbytes].view(dataset.dtype).reshape(dataset.shape)
