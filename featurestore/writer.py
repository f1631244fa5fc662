"""Writing a store: samples in, shards out, the finished folder renamed into place."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from featurestore.errors import IncompleteStoreError, SampleError, StoreExistsError
from featurestore.files import (
    clear_after_move,
    file_sha256,
    move_into_place,
    write_atomically,
    writing,
)
from featurestore.index import Index, ShardRecord, write_index
from featurestore.lock import WriterLock
from featurestore.prefetch import prefetch
from featurestore.room import check_room
from featurestore.schema import StoreSpec
from featurestore.shard_writer import ShardWriter
from featurestore.statistics import Statistics
from featurestore.validation import checked_features

SHARD_BYTES = 256 << 20  # uncompressed target size of a shard
OUR_FILES = re.compile(
    r"shard-\d+\.h5(\.[0-9a-f]{8}\.partial|\.finished\.json(\.partial)?)?|index\.json(\.partial)?"
)
RECEIPT_SUFFIX = ".finished.json"  # beside a finished shard, until the store is whole


def create(
    path: str | Path,
    spec: StoreSpec,
    *,
    scratch: str | Path | None = None,
    fingerprint: str = "",
    samples_per_shard: int | None = None,
    overwrite: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> StoreWriter:
    """Start a new store; use it as a context manager.

    >>> with featurestore.create("features/train", spec) as writer:
    ...     writer.append(id="a", features=features, mask=mask)

    Parameters
    ----------
    path
        Folder of the finished store. It appears whole when the block ends without an exception, or not at all.
    spec
        What every sample looks like.
    scratch
        Folder for shards until the store is whole; on the same file system as ``path`` the end is one rename.
        Default: a hidden folder beside ``path``.
    fingerprint
        Identity of everything the store is made from (:func:`featurestore.fingerprint`). With it, shards that an
        interrupted writer of the same fingerprint left in ``scratch`` can be taken over (:meth:`StoreWriter.resume`).
    samples_per_shard
        Default: as many as make 256 MB uncompressed.
    overwrite
        Replace what is at ``path`` once the new store is whole.
    rank, ranks
        This process, of how many that write the store together into one scratch folder (with a fingerprint, and
        :meth:`StoreWriter.resume`): shard i belongs to rank i mod ``ranks``. Rank 0 must be created first, holds the
        lock and publishes; its block must end after the others' last sample.

    Raises
    ------
    StoreExistsError
        When there is something at ``path`` and ``overwrite`` is off.
    StoreBusyError
        When another writer is at work on ``path`` or in ``scratch``.
    """
    return StoreWriter(
        Path(path),
        spec,
        scratch=None if scratch is None else Path(scratch),
        fingerprint=fingerprint,
        samples_per_shard=samples_per_shard or max(1, SHARD_BYTES // spec.sample_bytes),
        overwrite=overwrite,
        rank=rank,
        ranks=ranks,
    )


class StoreWriter:
    """Collects samples into shards; see :func:`create`.

    Samples go to disk as they come, so memory does not depend on their number (the values
    of one shard stay in it where zeros are packed). A
    shard is renamed once it is full, and a small JSON file beside it then records its
    hash and statistics. So a killed writer loses the shard it was filling and nothing else.
    """

    def __init__(
        self,
        path: Path,
        spec: StoreSpec,
        *,
        scratch: Path | None,
        fingerprint: str,
        samples_per_shard: int,
        overwrite: bool,
        rank: int,
        ranks: int,
    ) -> None:
        if ranks > 1 and not fingerprint:
            raise ValueError("several writers of one store need a fingerprint")
        if path.exists() and not overwrite:
            raise StoreExistsError("exists already; remove it or write elsewhere", path=path)
        self.path = path
        self.spec = spec
        self.fingerprint = fingerprint
        self.samples_per_shard = samples_per_shard
        self.rank, self.ranks = rank, ranks
        self.scratch = scratch or path.with_name(f".{path.name}.unfinished")
        self._locks: list[WriterLock] = []
        try:
            with writing(self.scratch):
                for folder in (
                    (path, self.scratch) if rank == 0 else ()
                ):  # one writer makes the store, and works in scratch
                    self._locks.append(_lock(folder))
                if self.scratch.exists():
                    self._clear_scratch()
                self.scratch.mkdir(parents=True, exist_ok=True)
        except BaseException:
            self._unlock()
            raise
        self._number: int | None = None
        self._shard: ShardWriter | None = None
        self._statistics: Statistics | None = None
        self._finished: dict[int, tuple[ShardRecord, Statistics]] = {}
        self._announced: int | None = None
        self._spans: list[range] = []  # positions of the announced samples, by shard
        self._samples_left = 0  # of all ranks
        self._missing: Iterator[tuple[int, int]] = (
            (number, samples_per_shard) for number in itertools.count()
        )
        self._next_shard()

    def _clear_scratch(self) -> None:
        """Remove what nobody can take over; refuse a folder of other things."""
        files = [file for file in self.scratch.iterdir() if not file.name.startswith(".")]
        foreign = [file.name for file in files if not OUR_FILES.fullmatch(file.name)]
        if foreign:
            message = f"holds {foreign[0]!r}, which no writer left; choose another scratch folder"
            raise StoreExistsError(message, path=self.scratch, actual=foreign[0])
        if not self.fingerprint:  # nothing that lies there can be told to be ours
            shutil.rmtree(self.scratch)
        elif self.rank == 0:  # before the other ranks begin theirs
            for file in files:
                if file.suffix == ".partial":
                    file.unlink()

    # -- filling ---------------------------------------------------------------------------------

    def resume(self, samples: int) -> list[range]:
        """Say how many samples there will be, and take over the finished shards that lie in ``scratch``.

        Parameters
        ----------
        samples
            Of the whole store, whatever the number of ranks.

        Returns
        -------
        list of range
            The positions (0 to ``samples`` - 1) of the samples still to be appended, one range a missing shard, in
            the order in which :meth:`append` then expects them.

        Raises
        ------
        StoreWriteError
            When the disk has no room for them.
        """
        self._announced = samples
        self._spans = [
            range(start, min(start + self.samples_per_shard, samples))
            for start in range(0, samples, self.samples_per_shard)
        ]
        ours = range(self.rank, len(self._spans), self.ranks)
        found = prefetch(partial(self._finished_before, hashed=True), ours, workers=2)
        self._finished = {
            number: shard for number, shard in zip(ours, found, strict=True) if shard is not None
        }
        missing = [number for number in ours if number not in self._finished]
        if self.rank == 0:
            of_others = [
                number
                for number in range(len(self._spans))
                if number not in ours and not self._receipt(number).exists()
            ]
            self._samples_left = sum(len(self._spans[number]) for number in (*missing, *of_others))
            check_room([self])
        self._missing = iter([(number, len(self._spans[number])) for number in missing])
        self._next_shard()
        return [self._spans[number] for number in missing]

    @property
    def bytes_announced(self) -> tuple[int, int]:
        """Bytes of the samples that rank 0 found missing, of all ranks, and of all samples; 0 where lossless packing hides them."""
        size = self.spec.sample_bytes if self.spec.compression in ("none", "int8") else 0
        return self._samples_left * size, (self._announced or 0) * size

    def append(
        self,
        *,
        id: str,
        features: np.ndarray,
        mask: np.ndarray,
        image: np.ndarray | None = None,
        view: str = "identity",
    ) -> None:
        """Add one sample.

        Parameters
        ----------
        id
            Name of the sample; together with ``view`` it is meant to be unique.
        features
            (C, h, w) numbers that are finite and fit the spec's type.
        mask
            (H, W) uint8, class indices or the void value.
        image
            (H, W, 3) uint8, exactly where the spec has images.
        view
            ``identity`` or ``hflip``.

        Raises
        ------
        SampleError
            When the sample does not fit the spec; the text names the sample.
        StoreWriteError
            When a shard is full and the disk does not take it.
        """
        if self.ranks > 1 and self._announced is None:
            raise ValueError(
                "several writers of one store call resume() first: it says which samples are whose"
            )
        if self._number is None:
            raise SampleError(
                f"sample {id!r} comes after the last one that resume() announced", path=self.path
            )
        stored = checked_features(
            self.spec, id=id, features=features, mask=mask, image=image, view=view, path=self.path
        )
        path = self.scratch / shard_name(self._number)
        with writing(path):
            if self._shard is None:
                self._shard = ShardWriter(path, self.spec, self._capacity)
            self._shard.append(id, view, stored, mask, image)
        part = Statistics.of_sample(self.spec, stored, mask)
        self._statistics = part if self._statistics is None else self._statistics.merged(part)
        if len(self._shard) == self._capacity:
            self._finish_shard()

    # -- shards ----------------------------------------------------------------------------------

    def _next_shard(self) -> None:
        """Turn to the next missing shard; its file is made with its first sample."""
        self._number, self._capacity = next(self._missing, (None, 0))
        self._shard = None
        self._statistics = None

    def _finish_shard(self) -> None:
        assert self._number is not None
        assert self._shard is not None
        assert self._statistics is not None
        with writing(self._shard.path):
            record = self._shard.finish()
            receipt = {
                "fingerprint": self.fingerprint,
                "first": self._number * self.samples_per_shard,
                "shard": asdict(record),
                "statistics": self._statistics.to_dict(),
            }
            write_atomically(self._receipt(self._number), json.dumps(receipt).encode())
        self._finished[self._number] = (record, self._statistics)
        self._next_shard()

    def _finished_before(
        self, number: int, *, hashed: bool
    ) -> tuple[ShardRecord, Statistics] | None:
        """An announced shard if it is finished, of just its samples, and as long, or ``hashed`` unchanged, as it was written."""
        file, positions = self.scratch / shard_name(number), self._spans[number]
        try:
            receipt = json.loads(self._receipt(number).read_bytes())
            record = ShardRecord(**receipt["shard"])
            statistics = Statistics.from_dict(receipt["statistics"])
            ours = receipt["fingerprint"] == self.fingerprint != ""
            just_these = (receipt["first"], record.samples) == (positions.start, len(positions))
            if (
                not (ours and just_these)
                or file.stat().st_size != record.bytes
                or (hashed and file_sha256(file) != record.sha256)
            ):
                return None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # no receipt, or a damaged one: the shard is made again
            return None
        return record, statistics

    def _receipt(self, number: int) -> Path:
        return self.scratch / (shard_name(number) + RECEIPT_SUFFIX)

    # -- the end ---------------------------------------------------------------------------------

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self._shard is not None:  # unfinished
                with suppress(
                    OSError, RuntimeError
                ):  # the error that brought us here says what is wrong
                    self._shard.discard()
                self._shard = None
            if not self.fingerprint:  # nobody could take over what is left
                shutil.rmtree(self.scratch, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.release()

    def _publish(self) -> None:
        if self._shard is not None and self._announced is None:
            self._finish_shard()  # the last shard of an open-ended store may be short
        if self.rank != 0:
            return
        for number in range(
            len(self._spans)
        ):  # those of other ranks, which they wrote just now, or took over by their hashes
            if (
                number not in self._finished
                and (shard := self._finished_before(number, hashed=False)) is not None
            ):
                self._finished[number] = shard
        numbers = sorted(self._finished)
        samples = sum(self._finished[number][0].samples for number in numbers)
        if self._announced not in (None, samples):
            missing = (
                self._announced - samples - (len(self._shard) if self._shard is not None else 0)
            )
            message = f"{missing} of the {self._announced} samples that resume() announced were not appended"
            raise IncompleteStoreError(
                message, path=self.path, expected=self._announced, actual=samples
            )
        if not numbers:
            raise IncompleteStoreError(
                "no sample was appended; a store needs at least one", path=self.path
            )
        index = Index(
            spec=self.spec,
            fingerprint=self.fingerprint,
            shards=tuple(self._finished[number][0] for number in numbers),
            statistics=Statistics.merge_all(self._finished[number][1] for number in numbers),
        )
        with writing(self.path):
            known = {
                path
                for number in numbers
                for path in (self.scratch / shard_name(number), self._receipt(number))
            }
            for file in set(self.scratch.iterdir()) - known:
                file.unlink()  # left by a killed writer, or by one of other inputs
            write_index(self.scratch, index)
            move_into_place(self.scratch, self.path, leave_behind="*" + RECEIPT_SUFFIX)


def clear_after_publication(path: Path, scratch: Path) -> None:
    """Remove what the writer of a finished store left behind if it was killed just after the store got its name.

    Raises
    ------
    StoreBusyError
        When a writer is at work on ``path``, or in ``scratch``.
    """
    with writing(path), ExitStack() as locks:
        for folder in (path, scratch):
            locks.callback(_lock(folder).release)
        clear_after_move(scratch, path, leave_behind="*" + RECEIPT_SUFFIX)


def _lock(folder: Path) -> WriterLock:
    return WriterLock(folder.with_name(f".{folder.name.lstrip('.')}.lock"))


def shard_name(number: int) -> str:
    """File name of shard ``number``, counted from 0."""
    return f"shard-{number:05d}.h5"
