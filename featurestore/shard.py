"""One shard: an HDF5 file of samples. It is read through a memory map, and written row by row."""

from __future__ import annotations

import errno
import io
import os
import secrets
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from typing_extensions import Buffer, override

from featurestore.bitshuffle import check_filters
from featurestore.copying import take_rows
from featurestore.errors import (
    FeatureStoreError,
    ShardCorruptError,
    StoreNotFoundError,
    StoreReadError,
)
from featurestore.files import file_sha256, sync
from featurestore.hdf5 import find_dataset, map_dataset
from featurestore.index import ShardRecord
from featurestore.layers import Layer
from featurestore.layouts import STARTS, VALUES, Layout, Rows
from featurestore.prepared_sample import PreparedSample
from featurestore.schema import IDS, VIEWS, StoreSpec, check_version
from featurestore.statistics import Statistics

# Datasets start on a cache line, but not on a memory page: NumPy's buffers start 16 bytes into a
# page. Copying to an address 16 bytes further into its page is three times slower: the processor
# waits for its own writes ("4K aliasing").
ALIGNMENT = 4096 + 64
# From this version of the file format on (2016), HDF5's own structures carry checksums: damage in
# them is an error and not a crash. Chunks carry one through the fletcher32 filter.
LIBVER = ("v110", "v110")


class Shard:
    """A shard that is open for reading.

    Contiguous datasets are in one memory map, and no HDF5 handle stays open: a fork is harmless.
    Chunked ones (``lz4``, ``zstd``) are read through h5py. Either takes one file descriptor.

    Raises
    ------
    StoreNotFoundError
        When there is no such file.
    FormatVersionError
        When another version of the format wrote it.
    ShardCorruptError
        When it is not an HDF5 file, or its datasets differ from its own attributes.
    StoreReadError
        When the operating system refuses (too many open files, a disk that does not answer), or
        a filter is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise StoreNotFoundError("there is no such shard", path=path)
        try:
            self._open()
        except FeatureStoreError:
            raise
        except ImportError as error:
            raise StoreReadError(
                f"is packed by a filter that this Python lacks; pip install {error.name}", path=path
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise read_error(path, error) from error
            # On damaged files h5py raises KeyError, RuntimeError, OSError without a number, ...
            raise ShardCorruptError(
                f"cannot be read as a shard ({error}); write the store again", path=path
            ) from error

    def _open(self) -> None:
        with ExitStack() as stack:
            # Nothing changes a shard: no lock is needed, and some disks have none.
            file = stack.enter_context(h5py.File(self.path, "r", locking=False))
            check_version(int(file.attrs["format_version"]), self.path)
            self.spec = StoreSpec.from_attributes(file.attrs)
            content = np.asarray(np.memmap(self.path, np.uint8, "r"))

            def mapped(name: str) -> np.ndarray:
                return map_dataset(content, find_dataset(file, name))

            self.ids, self.views = (self._texts(name, mapped(name)) for name in (IDS, VIEWS))
            count = len(self.ids)
            if len(self.views) != count:
                raise self._differs(VIEWS, len(self.views), count)
            self.spec.check_size(count, content.size)
            self._layouts = self.spec.layouts
            self._pixel_layout = next(iter(self._layouts.values()))
            expected: Rows = {}
            for name in self.spec.pixel_names:
                shape, dtype = self.spec.row(name)
                expected[name] = ((count, *shape), dtype)
            for layer in self.spec.layers:

                def in_layer(name: str, layer: Layer = layer) -> np.ndarray:
                    return mapped(layer.dataset(name))

                rows = self._layouts[layer.group].expected_datasets(in_layer, count)
                expected |= {layer.dataset(name): row for name, row in rows.items()}
            arrays: dict[str, h5py.Dataset] = {}
            for name, (shape, dtype) in expected.items():
                dataset = find_dataset(file, name, chunked=not self._pixel_layout.mapped)
                if (dataset.shape, dataset.dtype) != (shape, np.dtype(dtype)):
                    actual = f"{dataset.dtype} {dataset.shape}"
                    raise self._differs(name, actual, f"{dtype} {shape}")
                if self._pixel_layout.mapped:
                    arrays[name] = map_dataset(content, dataset)
                else:
                    check_filters(dataset, self.spec.compression)
                    arrays[name] = dataset
            if not self._pixel_layout.mapped:
                stack.pop_all()  # h5py reads the datasets while the file is open
            self._arrays: dict[str, dict[str, h5py.Dataset]] = {}  # by group and name
            for path, array in arrays.items():
                group, _, name = path.rpartition("/")
                self._arrays.setdefault(group, {})[name] = array

    def _texts(self, name: str, values: np.ndarray) -> list[str]:
        """Decode the texts of ``ids`` or ``views``."""
        if values.dtype.kind != "S" or values.ndim != 1 or not values.size:
            raise self._differs(name, f"{values.dtype} {values.shape}", "a list of texts")
        return [text.decode() for text in values.tolist()]

    def _differs(self, name: str, actual: object, expected: object) -> ShardCorruptError:
        return ShardCorruptError(
            f"dataset {name!r} is {actual}, but the shard's attributes say {expected};"
            " write the store again",
            path=self.path,
            expected=expected,
            actual=actual,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, name: str, row: int) -> np.ndarray:
        """Read row ``row`` of ``masks``, ``images`` or one of the spec's ``feature_names``.

        Returns
        -------
        np.ndarray
            A read-only view of the file where the layout stores the row as it is; else a copy.

        Raises
        ------
        ShardCorruptError
            When the row cannot be decoded.
        """
        layout, arrays, dataset = self._find(name)
        if dataset in layout.in_place:
            return np.asarray(arrays[dataset][row])
        out = np.empty(*self.spec.row(name))
        self._decode(name, row, out)
        return out

    def _find(self, name: str) -> tuple[Layout, dict[str, h5py.Dataset], str]:
        """Return the layout and the arrays of a dataset's group, and its name in the group."""
        group, _, dataset = name.rpartition("/")
        return self._layouts.get(group, self._pixel_layout), self._arrays[group], dataset

    def gather_into(
        self, name: str, rows: np.ndarray, out: np.ndarray, *, past_caches: bool = False
    ) -> None:
        """Copy or decode several rows straight into ``out``.

        Parameters
        ----------
        name
            ``masks``, ``images`` or one of the spec's ``feature_names``.
        rows
            (B,) int64, numbers of the samples in the shard.
        out
            (B, ...) contiguous array of the row's shape and type.
        past_caches
            See :func:`featurestore.copying.take_rows`; default: False.

        Raises
        ------
        ShardCorruptError
            When a row cannot be decoded.
        """
        layout, arrays, dataset = self._find(name)
        if dataset in layout.in_place:
            take_rows(arrays[dataset], rows, out, past_caches=past_caches)
        else:
            for row, target in zip(rows.tolist(), out, strict=True):
                self._decode(name, row, target)

    def _decode(self, name: str, row: int, out: np.ndarray) -> None:
        layout, arrays, dataset = self._find(name)
        try:
            layout.decode(arrays, dataset, row, out)
        except (OSError, ValueError) as error:
            raise ShardCorruptError(
                f"row {row} of {name!r} cannot be decoded ({error}); write the store again",
                path=self.path,
            ) from error


def read_error(path: Path, error: OSError) -> StoreReadError:
    """Build the error of a shard that the operating system did not let us read."""
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        message = (
            f"cannot be opened ({reason}); raise the limit, with `ulimit -n`,"
            " above the store's number of shards"
        )
    else:
        message = f"cannot be read ({reason}); look at the disk, and start again"
    return StoreReadError(message, path=path)


class ShardWriter:
    """A shard that is being written; equal rows give equal bytes.

    HDF5 writes the structure of the file, its chunks, and the first row of each dataset. The
    other rows of contiguous datasets are written straight to their places: without HDF5's global
    lock, and in a third of the time.

    Parameters
    ----------
    path
        The shard's final name. Until :meth:`commit` the file has a random name of its own: a
        writer that was believed dead must not write into the file of its successor.
    spec
        Properties of every sample.
    capacity
        Number of rows in the file.
    """

    def __init__(self, path: Path, spec: StoreSpec, capacity: int) -> None:
        self.path = path
        self.spec = spec
        self.capacity = capacity
        self._layouts = spec.layouts
        self._partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        self._ids: list[str] = []
        self._views: list[str] = []
        # Of ``zeros``, by group: their total is known last.
        self._values: dict[str, list[np.ndarray]] = {}
        self._statistics: list[Statistics] = []
        self._starts: dict[str, int] = {}  # offset of row 0 in the file, of contiguous datasets
        self._bytes = _ErrorKeepingFile(self._partial, "w+")
        self._file = h5py.File(
            self._bytes, "w", libver=LIBVER, alignment_threshold=4096, alignment_interval=ALIGNMENT
        )
        self._file.attrs.update(spec.to_attributes())
        pixel_layout = next(iter(self._layouts.values()))
        rows = [
            (f"{group}/{name}".lstrip("/"), layout, *row)
            for group, layout in self._layouts.items()
            for name, row in layout.rows.items()
        ]
        rows += [(name, pixel_layout, *spec.row(name)) for name in spec.pixel_names]
        self._names = [name for name, *_ in rows]
        for name, layout, shape, dtype in rows:
            options = layout.storage_options(shape)
            self._file.create_dataset(name, (capacity, *shape), dtype, **options)

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, sample: PreparedSample) -> None:
        """Write a row.

        Raises
        ------
        OSError
            When the disk does not take it.
        """
        for name in self._names:
            self._write(name, len(self), sample.rows[name])
        for group, values in sample.values.items():
            self._values.setdefault(group, []).append(values)
        self._bytes.check()
        self._ids.append(sample.id)
        self._views.append(sample.view)
        self._statistics.append(sample.statistics)

    def _write(self, name: str, row: int, values: np.ndarray) -> None:
        """Write a row of a dataset.

        HDF5 opens the dataset anew each time: closing it writes its chunk, so that chunks are in
        the file in the order of the rows.
        """
        values = np.ascontiguousarray(values)
        if (start := self._starts.get(name)) is not None:
            self._bytes.write_at(start + row * values.nbytes, values)
            return
        dataset = self._file[name]
        dataset.write_direct(values, dest_sel=np.s_[row])
        if dataset.chunks is None:
            self._starts[name] = dataset.id.get_offset()  # known once a row is written

    def shortened(self) -> ShardWriter:
        """Copy the rows into a file of exact size: the last shard of an open-ended store."""
        exact = ShardWriter(self.path, self.spec, len(self))
        try:
            for row in range(len(self)):
                for name in self._names:
                    exact._write(name, row, self._file[name][row])
        except BaseException:
            exact.discard()
            raise
        exact._ids, exact._views, exact._values = self._ids, self._views, self._values
        exact._statistics = self._statistics
        self.discard()
        return exact

    def close(self) -> None:
        """Write what is known only after the last row, and close HDF5's file.

        Raises
        ------
        OSError
            When the disk does not take it.
        """
        for group, values in self._values.items():
            starts = np.cumsum([0, *map(len, values)], dtype=np.int64)
            self._file[group or "/"].create_dataset(STARTS, data=starts)
            self._file[group or "/"].create_dataset(VALUES, data=np.concatenate(values))
        self._values.clear()
        for name, texts in ((IDS, self._ids), (VIEWS, self._views)):
            encoded = [text.encode() for text in texts]
            dtype = h5py.string_dtype("utf-8", length=max(map(len, encoded)))
            self._file.create_dataset(name, data=np.array(encoded, dtype=dtype))
        self._file.close()
        self._bytes.check()

    def commit(self) -> tuple[ShardRecord, Statistics]:
        """Bring the closed shard to disk, hash it, and give it its name.

        Nothing here needs HDF5: a thread may do it while the next shard is written.

        Returns
        -------
        record
            Size and sha256 of the finished file.
        statistics
            Statistics of its samples.
        """
        try:
            os.fsync(self._bytes.fileno())
            self._bytes.close()
            size, sha256 = self._partial.stat().st_size, file_sha256(self._partial)
            os.replace(self._partial, self.path)
        except BaseException:
            self.discard()
            raise
        sync(self.path.parent)
        statistics = Statistics.merge_all(self._statistics)
        return ShardRecord(self.path.name, len(self), size, sha256), statistics

    def discard(self) -> None:
        """Remove what was written, so that its remains do not fill the disk further."""
        try:
            self._file.close()  # nothing, if it is closed
        finally:
            self._bytes.close()
            self._partial.unlink(missing_ok=True)


class _ErrorKeepingFile(io.FileIO):
    """A file that HDF5 can always write to: :meth:`check` raises the disk's first error.

    HDF5 cannot leave a file that it failed to write: closing it fails again, and can crash the
    process.
    """

    _error: OSError | None = None

    @override
    def write(self, content: Buffer) -> int:
        view, written = memoryview(content), 0
        try:
            while written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self._error = self._error or error
        return len(view)

    def write_at(self, offset: int, content: np.ndarray) -> None:
        """Write a contiguous array at an offset, past HDF5; the file's position stays."""
        view = content.data.cast("B")
        try:
            while view:
                written = os.pwrite(self.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self._error = self._error or error

    @override
    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raise the first error of a write."""
        if self._error is not None:
            raise self._error
