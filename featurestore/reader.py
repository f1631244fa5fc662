"""Reading a store: random access to samples, zero copy where the shards are uncompressed."""

from __future__ import annotations

import bisect
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore.copying import LARGE
from featurestore.errors import (
    IncompleteStoreError,
    ShardCorruptError,
    SpecMismatchError,
    StoreNotFoundError,
)
from featurestore.files import file_sha256
from featurestore.index import INDEX_NAME, ShardRecord, read_index
from featurestore.prefetch import prefetch
from featurestore.schema import FEATURES, IMAGES, MASKS, StoreSpec
from featurestore.shard import Shard, refused
from featurestore.statistics import Statistics

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Sample:
    """One sample: features (C, h, w), mask (H, W) uint8, image (H, W, 3) uint8 or None."""

    id: str
    view: str
    features: np.ndarray
    mask: np.ndarray
    image: np.ndarray | None


def open(path: str | Path) -> FeatureStore:
    """Open a store's folder, or a single shard of one.

    Opening is cheap: it reads the index and looks at the shards' sizes, not at their
    contents (that is :meth:`FeatureStore.verify`).

    Raises
    ------
    StoreNotFoundError
        When there is nothing at ``path``.
    IncompleteStoreError, FormatVersionError, ShardCorruptError
        When what is there is not a whole store.
    """
    return FeatureStore(Path(path))


class FeatureStore:
    """A store of samples, open for reading; made by :func:`featurestore.open`.

    It holds no file handles of its own until a sample is read, then one a shard (the process's soft limit is
    raised for them), and none that a fork or a pickle would carry over, so it can be handed to worker processes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[int, Shard] = {}
        self._pid = os.getpid()
        if path.is_dir():
            if not (path / INDEX_NAME).is_file():
                raise IncompleteStoreError(
                    f"no {INDEX_NAME} in this folder, so no finished store; write it again",
                    path=path,
                )
            self._written = _state_of(path / INDEX_NAME)
            index = read_index(path)
            self.folder = path
            self.spec: StoreSpec = index.spec
            self.records: tuple[ShardRecord, ...] = index.shards
            self.fingerprint = index.fingerprint
            self._statistics: Statistics | None = index.statistics
            self._check_sizes()
            _allow_open_files(len(index.shards))
        elif path.is_file():
            shard = Shard(path)
            self._written = None
            self.folder = path.parent
            self.spec = shard.spec
            self.records = (ShardRecord(path.name, len(shard), path.stat().st_size, ""),)
            self.fingerprint = ""
            self._statistics = None
        else:
            raise StoreNotFoundError(
                "there is no feature store here; run the extract stage first", path=path
            )
        self._ends = list(itertools.accumulate(record.samples for record in self.records))
        self._starts = [0, *self._ends[:-1]]

    def _check_sizes(self) -> None:
        for record in self.records:
            file = self.folder / record.file
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                raise IncompleteStoreError(
                    "the index lists this shard, but it is gone; write the store again", path=file
                )
            if size != record.bytes:
                message = (
                    f"{size} bytes long, but the index says {record.bytes}; write the store again"
                )
                raise IncompleteStoreError(message, path=file, expected=record.bytes, actual=size)

    # -- samples ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Sample:
        """Sample at ``position`` (negative ones count from the end).

        Raises
        ------
        IndexError
            When there is no such position.
        """
        shard, row = self._locate(position)
        image = shard.read(IMAGES, row) if self.spec.has_images else None
        return Sample(
            shard.ids[row],
            shard.views[row],
            shard.read(FEATURES, row),
            shard.read(MASKS, row),
            image,
        )

    def features(self, position: int) -> np.ndarray:
        """(C, h, w) features; a read-only view of the file's pages where the store is uncompressed."""
        shard, row = self._locate(position)
        return shard.read(FEATURES, row)

    def mask(self, position: int) -> np.ndarray:
        """(H, W) uint8 mask."""
        shard, row = self._locate(position)
        return shard.read(MASKS, row)

    def image(self, position: int) -> np.ndarray:
        """(H, W, 3) uint8 image.

        Raises
        ------
        SpecMismatchError
            When the store was written without images.
        """
        self._check_images()
        shard, row = self._locate(position)
        return shard.read(IMAGES, row)

    def _check_images(self) -> None:
        if not self.spec.has_images:
            raise SpecMismatchError(
                "this store has no images; extract with store_images: true", path=self.path
            )

    def gather(
        self, name: str, positions: Sequence[int] | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Several samples' ``features``, ``masks`` or ``images`` in one array: each is copied, or decoded, once.

        Parameters
        ----------
        name
            Which of the three.
        positions
            B of them, in any order.
        out
            (B, ...) contiguous array of the right type that takes them, page-locked memory for example; by default a
            fresh one.

        Raises
        ------
        IndexError
            When there is no such position.
        SpecMismatchError
            When there are no images.
        ShardCorruptError
            When a sample cannot be decoded.
        """
        if name == IMAGES:
            self._check_images()
        if out is None:
            shape, dtype = self.spec.row(name)
            out = np.empty((len(positions), *shape), dtype)
        where = np.asarray(positions, np.int64).tolist()
        if where and not (min(where) >= 0 and max(where) < len(self)):
            raise IndexError(f"samples {where} of a store with {len(self)}")
        # Neighbours in one shard are read by one call, during which other threads run.
        first = 0
        while first < len(where):
            number = bisect.bisect_right(self._ends, where[first])
            start, end = self._starts[number], self._ends[number]
            last = first + 1
            while last < len(where) and start <= where[last] < end:
                last += 1
            rows = np.array(where[first:last], np.int64) - start
            self._shard(number).gather_into(
                name, rows, out[first:last], past_caches=out.nbytes >= LARGE
            )
            first = last
        return out

    @property
    def ids(self) -> list[str]:
        """Every sample's id, in order."""
        return [id for number in range(len(self.records)) for id in self._shard(number).ids]

    def positions(self, view: str) -> np.ndarray:
        """(n,) int64 positions of the samples of one view, ``identity`` or ``hflip``, ascending."""
        return np.flatnonzero(np.array(self.views) == view)

    @property
    def views(self) -> list[str]:
        """Every sample's view (``identity`` or ``hflip``), in order."""
        return [view for number in range(len(self.records)) for view in self._shard(number).views]

    @property
    def stats(self) -> Statistics:
        """Per-channel and per-class statistics; those of the index, or for a single shard computed on first use."""
        if self._statistics is None:
            parts = (
                Statistics.of_sample(self.spec, sample.features, sample.mask) for sample in self
            )
            self._statistics = Statistics.merge_all(parts)
        return self._statistics

    def to_frame(self) -> pandas.DataFrame:
        """One row a sample: id, view, shard, and each class's share of the mask's pixels (0..1), void included."""
        import pandas

        rows: list[dict[str, Any]] = []
        for position, (id, view) in enumerate(zip(self.ids, self.views, strict=True)):
            shares = np.bincount(self.mask(position).reshape(-1), minlength=256) / np.prod(
                self.spec.mask_shape
            )
            file = self.records[bisect.bisect_right(self._ends, position)].file
            classes = {name: shares[value] for value, name in enumerate(self.spec.class_names)}
            rows.append(
                {
                    "id": id,
                    "view": view,
                    "shard": file,
                    **classes,
                    "void": shares[self.spec.void_index],
                }
            )
        return pandas.DataFrame(rows)

    # -- integrity -------------------------------------------------------------------------------

    def verify(
        self,
        *,
        workers: int = 2,
        progress: Callable[[int], object] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Compare every byte with the index.

        Parameters
        ----------
        workers
            Threads that read and hash, one shard each.
        progress
            Called with the number of bytes of each block that was read, from one thread at a time.
        rank, ranks
            This process, of how many that share the work: shard i is read by rank i mod ``ranks``, and opened by all.

        Raises
        ------
        ShardCorruptError
            For the first shard whose sha256 is not the recorded one.
        StoreReadError
            When the operating system does not let one be read.
        SpecMismatchError
            When this is a single shard: its hash is in the index of its folder.
        """
        if self.path.is_file():
            raise SpecMismatchError(
                "a single shard carries no hash of itself; verify the store's folder",
                path=self.path,
            )

        lock = threading.Lock()

        def count(size: int) -> None:
            if progress is not None:
                with lock:
                    progress(size)

        def check(record: ShardRecord) -> None:
            file = self.folder / record.file
            try:
                found = file_sha256(file, count)
            except OSError as error:
                raise refused(file, error) from error
            if found != record.sha256:
                message = f"damaged: sha256 {found[:12]}..., but the index says {record.sha256[:12]}...; write the store again"
                raise ShardCorruptError(message, path=file, expected=record.sha256, actual=found)

        for _ in prefetch(check, self.records[rank::ranks], workers=workers):
            pass
        for number in range(len(self.records)):
            self._shard(number)

    # -- shards, opened on first use, once a process --------------------------------------------------

    def _locate(self, position: int) -> tuple[Shard, int]:
        position = int(position)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of a store with {len(self)}")
        number = bisect.bisect_right(self._ends, position)
        return self._shard(number), position - self._starts[number]

    def _shard(self, number: int) -> Shard:
        self._forget_what_a_fork_brought()
        if number not in self._shards:
            record = self.records[number]
            shard = Shard(self.folder / record.file)
            if self._written is not None and _state_of(self.path / INDEX_NAME) != self._written:
                raise IncompleteStoreError(
                    "the store was written anew since it was opened; open it again", path=self.path
                )
            if (shard.spec, len(shard)) != (self.spec, record.samples):
                message = "the shard's own description is not the index's; write the store again"
                raise ShardCorruptError(
                    message, path=shard.path, expected=self.spec, actual=shard.spec
                )
            self._shards[number] = shard
        return self._shards[number]

    def _forget_what_a_fork_brought(self) -> None:
        """HDF5 handles that were opened before a fork give wrong data."""
        if self._pid != os.getpid():
            self._shards, self._pid = {}, os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def __repr__(self) -> str:
        channels, height, width = self.spec.feature_shape
        return f"FeatureStore({str(self.path)!r}: {len(self)} samples of {channels} x {height} x {width}, {self.spec.backbone})"


def _allow_open_files(shards: int) -> None:
    """Raise this process's own limit of open files, where a store has more shards: 256 and 1024 are usual, a terabyte has 4000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(
        ValueError, OSError
    ):  # macOS has a limit below the hard one; too few files are named when they are met
        wanted = (
            len(os.listdir("/dev/fd")) + 2 * shards + 512
        )  # what is open, a second store, and what else will be
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written anew: inode, size, time of its last change; None where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
