"""Writing one shard: rows go to disk as they come, and the file gets its name once it is whole."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurestore import codec
from featurestore.files import file_sha256, sync_folder
from featurestore.index import ShardRecord
from featurestore.schema import FEATURES, IDS, IMAGES, MASKS, VIEWS, StoreSpec
from featurestore.shard import BITS, SCALES, STARTS, VALUES

# Datasets start on a cache line, but not on a memory page: buffers of NumPy start 16 bytes into one, and a processor
# that copies to 16 bytes further into a page than it reads from takes its own writes for what it is to read next
# ("4K aliasing"), at a third of the speed.
ALIGNMENT = 4096 + 64
# HDF5's own structures carry checksums from this version of the file format on (2016), so that damage in them is an
# error and not a crash; chunks carry one by the fletcher32 filter.
LIBVER = ("v110", "v110")


class ShardWriter:
    """A shard that is being written; the same rows give the same bytes.

    Parameters
    ----------
    path
        The shard's final name. Until :meth:`finish` the file has another: one of its own, because a writer that was
        believed dead must not write into the file of the one that took over.
    spec
        What every sample looks like.
    capacity
        Rows there is room for.
    """

    def __init__(self, path: Path, spec: StoreSpec, capacity: int) -> None:
        self.path = path
        self.spec = spec
        self.capacity = capacity
        self._partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        self._ids: list[str] = []
        self._views: list[str] = []
        self._packed: list[
            np.ndarray
        ] = []  # values that are not zero, where zeros are packed: their number is known last
        self._bytes = _Bytes(self._partial)
        self._file = h5py.File(
            self._bytes, "w", libver=LIBVER, alignment_threshold=4096, alignment_interval=ALIGNMENT
        )
        for key, value in spec.to_attributes().items():
            self._file.attrs[key] = value
        for name, (shape, dtype, options) in self._layout().items():
            self._file.create_dataset(name, (capacity, *shape), dtype, **options)

    def _layout(self) -> dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]]:
        """Of each array: a row's shape, its type, and how h5py is to store it."""
        spec = self.spec
        filter_name: Any = spec.compression

        def options(shape: tuple[int, ...]) -> dict[str, Any]:
            if filter_name not in ("lz4", "zstd"):
                return {}
            import hdf5plugin

            return {
                "chunks": (1, *shape),
                "compression": hdf5plugin.Bitshuffle(cname=filter_name),
                "fletcher32": True,
            }

        layout: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {}
        if spec.compression == "zeros":
            layout[BITS] = ((-(-int(np.prod(spec.feature_shape)) // 8),), np.uint8, {})
        elif spec.compression == "int8":
            layout[FEATURES] = (spec.feature_shape, np.uint8 if spec.nonnegative else np.int8, {})
            layout[SCALES] = (spec.feature_shape[:1], np.float32, {})
        else:
            layout[FEATURES] = (spec.feature_shape, spec.feature_dtype, options(spec.feature_shape))
        for name in (MASKS, IMAGES) if spec.has_images else (MASKS,):
            shape, dtype = spec.row(name)
            layout[name] = (shape, dtype, options(shape))
        return layout

    def __len__(self) -> int:
        """Rows written."""
        return len(self._ids)

    def append(
        self, id: str, view: str, features: np.ndarray, mask: np.ndarray, image: np.ndarray | None
    ) -> None:
        """Write a row: features (C, h, w) of the spec's type, mask (H, W) uint8, image (H, W, 3) uint8 where there are images."""
        rows: dict[str, np.ndarray] = {MASKS: mask}
        if image is not None:
            rows[IMAGES] = image
        if self.spec.compression == "zeros":
            rows[BITS], values = codec.pack_zeros(features)
            self._packed.append(values)
        elif self.spec.compression == "int8":
            rows[FEATURES], rows[SCALES] = codec.quantise(
                features, nonnegative=self.spec.nonnegative
            )
        else:
            rows[FEATURES] = features
        for (
            name
        ) in self._layout():  # in the layout's order, which is that of their places in the file
            self._file[name].write_direct(
                np.ascontiguousarray(rows[name]), dest_sel=np.s_[len(self)]
            )
        self._ids.append(id)
        self._views.append(view)
        self._bytes.check()

    def finish(self) -> ShardRecord:
        """Close the shard, bring it to disk, and give it its name.

        Returns
        -------
        ShardRecord
            Size and sha256 of the finished file.
        """
        if len(self) < self.capacity:
            return self._shortened().finish()
        file = self._file
        if self.spec.compression == "zeros":
            file.create_dataset(
                STARTS, data=np.cumsum([0, *map(len, self._packed)], dtype=np.int64)
            )
            file.create_dataset(VALUES, data=np.concatenate(self._packed))
        for name, texts in ((IDS, self._ids), (VIEWS, self._views)):
            encoded = [text.encode() for text in texts]
            dtype = h5py.string_dtype("utf-8", length=max(len(text) for text in encoded))
            file.create_dataset(name, data=np.array(encoded, dtype=dtype))
        file.close()
        self._bytes.close()
        record = ShardRecord(
            self.path.name, len(self), self._partial.stat().st_size, file_sha256(self._partial)
        )
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        return record

    def _shortened(self) -> ShardWriter:
        """The same rows in a file with room for no more: the last shard of a store whose length nobody announced."""
        exact = ShardWriter(self.path, self.spec, len(self))
        try:
            for row in range(len(self)):
                for name in self._layout():
                    exact._file[name].write_direct(self._file[name][row], dest_sel=np.s_[row])
        except BaseException:
            exact.discard()
            raise
        exact._ids, exact._views, exact._packed = self._ids, self._views, self._packed
        self.discard()
        return exact

    def discard(self) -> None:
        """Remove what was written: on a full disk, say, its remains must not fill it further."""
        try:
            self._file.close()
        finally:
            self._bytes.abandon()
            self._partial.unlink(missing_ok=True)


class _Bytes:
    """A file that HDF5 can always write to: where the disk refuses, the error is kept for :meth:`check` to raise.

    HDF5 itself cannot leave a file that it failed to write: closing it fails again, and can crash the process.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115  (closed by close)
        self._error: OSError | None = None

    def write(self, content: memoryview) -> int:
        """Write all of ``content``, or keep the error."""
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:])
        except OSError as error:
            self._error = self._error or error
        return len(content)

    def check(self) -> None:
        """Raise the first error there was."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Bring the file to disk and close it; raises the first error there was."""
        self.check()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file, whatever became of it."""
        self._file.close()

    def read(self, size: int) -> bytes:
        """What HDF5 wants to see again."""
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()

    def truncate(self, size: int) -> int:
        """Set the file's length, or keep the error."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size

    def flush(self) -> None:
        """Nothing is held back."""
