"""Writing a store: samples in, shards out, the finished folder renamed into place."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from featurestore.disk_space import check_disk_space
from featurestore.errors import (
    IncompleteStoreError,
    SampleError,
    StoreExistsError,
    StoreWriteError,
)
from featurestore.files import (
    clear_after_move,
    move_into_place,
    write_atomically,
    writing,
)
from featurestore.index import INDEX_NAME, Index, ShardRecord
from featurestore.lock import WriterLock
from featurestore.prefetch import prefetch
from featurestore.prepared_sample import PreparedSample
from featurestore.receipt import RECEIPT_SUFFIX, Receipt, receipt_path
from featurestore.schema import StoreSpec
from featurestore.shard import ShardWriter
from featurestore.statistics import Statistics

SHARD_BYTES = 256 << 20  # size at which a shard is full, before packing
FINISHING = 2  # full shards that threads hash and sync at a time
SCRATCH_FILES = re.compile(
    r"shard-\d+\.h5(\.[0-9a-f]{8}\.partial|\.finished\.json(\.partial)?)?|index\.json(\.partial)?"
)


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
        Folder of the finished store. It appears whole when the block ends without an exception,
        or not at all.
    spec
        Properties of every sample.
    scratch
        Folder of unpublished shards. If it is on the file system of ``path``, publishing is one
        rename. Default: a hidden folder beside ``path``.
    fingerprint
        Identity of everything the store is made from (:func:`featurestore.fingerprint`). With
        it, :meth:`StoreWriter.resume` reuses the shards that an interrupted writer of an equal
        fingerprint left in ``scratch``. Default: none, nothing is reused.
    samples_per_shard
        Default: as many as make 256 MB before packing.
    overwrite
        Replace what is at ``path`` once the new store is whole. Default: False.
    rank, ranks
        Number of this process, and of all processes that write the store together into one
        scratch folder; shard i belongs to rank i mod ``ranks``. More than one need a fingerprint
        and :meth:`StoreWriter.resume`. Rank 0 must be created first, holds the lock and
        publishes; its block must end after every other rank's last sample. Default: 0 of 1.

    Raises
    ------
    StoreExistsError
        When there is something at ``path`` and ``overwrite`` is off.
    StoreBusyError
        When another writer is writing ``path`` or into ``scratch``.
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

    Samples go to disk one by one, so the writer's memory does not grow with them (with ``zeros`` it
    holds the values of one shard). A full shard gets its name, and a small JSON file beside it, its
    receipt, with its hash and statistics. Threads hash and rename up to two full shards while the
    next one is written. A killed writer loses at most three shards.
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
        with writing(self.scratch), ExitStack() as locks:
            for folder in (path, self.scratch) if rank == 0 else ():
                locks.callback(_lock(folder).release)
            if self.scratch.exists():
                self._clear_scratch()
            self.scratch.mkdir(parents=True, exist_ok=True)
            self._locks = locks.pop_all()
        # A shard is known by its span, the positions of its samples in the store.
        self._spans: list[range] = []  # of all shards of all ranks, once announced
        self._announced: int | None = None  # samples
        self._samples_missing = 0  # of all ranks
        self._finished: dict[range, tuple[ShardRecord, Statistics]] = {}
        self._missing: Iterator[range] = (
            range(first, first + samples_per_shard)
            for first in itertools.count(step=samples_per_shard)
        )
        self._shard: ShardWriter | None = None
        self._finisher = ThreadPoolExecutor(FINISHING, thread_name_prefix="finish-shard")
        self._finishing: deque[Future[None]] = deque()
        self._next_shard()

    def _clear_scratch(self) -> None:
        """Remove what nobody can reuse; refuse a folder of other files."""
        files = [file for file in self.scratch.iterdir() if not file.name.startswith(".")]
        foreign = [file.name for file in files if not SCRATCH_FILES.fullmatch(file.name)]
        if foreign:
            raise StoreExistsError(
                f"holds {foreign[0]!r}, which no writer left; choose another scratch folder",
                path=self.scratch,
                actual=foreign[0],
            )
        if not self.fingerprint:  # no file can be recognized as part of this store
            shutil.rmtree(self.scratch)
        elif self.rank == 0:  # before the other ranks start
            for file in files:
                if file.suffix == ".partial":
                    file.unlink()

    # -- samples ---------------------------------------------------------------------------------

    def resume(self, samples: int) -> list[range]:
        """Announce the number of samples, and reuse the finished shards in ``scratch``.

        Parameters
        ----------
        samples
            Of the whole store, whatever the number of ranks; 0 makes an empty store.

        Returns
        -------
        list of range
            Positions (0 to ``samples`` - 1) of the samples that are still to be appended, one
            range a missing shard, in the order in which :meth:`append` then expects them.

        Raises
        ------
        StoreWriteError
            When the samples do not fit on the disk.
        """
        size = self.samples_per_shard
        self._announced = samples
        self._spans = [
            range(first, min(first + size, samples)) for first in range(0, samples, size)
        ]
        assigned = self._spans[self.rank :: self.ranks]
        shards = prefetch(partial(self._reusable, hashed=True), assigned, workers=2)
        self._finished = {
            span: shard for span, shard in zip(assigned, shards, strict=True) if shard is not None
        }
        missing = [span for span in assigned if span not in self._finished]
        if self.rank == 0:
            of_others = (span for i, span in enumerate(self._spans) if i % self.ranks)
            unfinished = [span for span in of_others if not self._receipt(span).exists()]
            self._samples_missing = sum(map(len, missing + unfinished))
            check_disk_space([self])
        self._missing = iter(missing)
        self._next_shard()
        return missing

    @property
    def bytes_announced(self) -> tuple[int, int]:
        """Bytes of the missing samples of all ranks, and of all samples, as rank 0 knows them.

        Both are 0 where the size of a packed sample is not known before it is written.
        """
        size = self.spec.sample_bytes if self.spec.exact_size else 0
        return self._samples_missing * size, (self._announced or 0) * size

    def append(
        self,
        *,
        id: str,
        features: np.ndarray | Mapping[str, np.ndarray],
        mask: np.ndarray,
        image: np.ndarray | None = None,
        view: str = "identity",
    ) -> None:
        """Add one sample.

        Parameters
        ----------
        id
            Name of the sample; id and view together should be unique.
        features
            (C, h, w) finite numbers that fit the spec's type; of several layers, (c, h, w) of each
            by its name.
        mask
            (H, W) uint8, class indices or the void value.
        image
            (H, W, 3) uint8 where the spec has images, else None.
        view
            ``identity`` (default), ``hflip``, ``rotate``, ``crop``, ``colour`` or ``random-N``, N a
            number.

        Raises
        ------
        SampleError
            When the sample does not fit the spec; the text starts with the sample's id.
        StoreWriteError
            When the disk does not take a shard. The error may come up to two shards later, or at
            the end of the block.
        """
        self.write(self.prepare(id=id, features=features, mask=mask, image=image, view=view))

    def prepare(
        self,
        *,
        id: str,
        features: np.ndarray | Mapping[str, np.ndarray],
        mask: np.ndarray,
        image: np.ndarray | None = None,
        view: str = "identity",
    ) -> PreparedSample:
        """Check and encode a sample: the part of :meth:`append` that several threads may do.

        Parameters and errors are those of :meth:`append`. The arrays must not change until
        :meth:`write` has written the result, which may refer to them.
        """
        stored = self.spec.checked_features(
            id=id, view=view, features=features, mask=mask, image=image, path=self.path
        )
        return PreparedSample.of(
            self.spec, id=id, view=view, features=stored, mask=mask, image=image
        )

    def write(self, sample: PreparedSample) -> None:
        """Write a prepared sample: the part of :meth:`append` that one thread does, in order.

        Raises
        ------
        SampleError, StoreWriteError, ValueError
            After the last sample that :meth:`resume` announced; when the disk does not take a
            shard; when several ranks write and :meth:`resume` was not called.
        """
        if self.ranks > 1 and self._announced is None:
            raise ValueError(
                "several writers of one store call resume(), which divides the samples, first"
            )
        if self._span is None:
            raise SampleError(
                f"sample {sample.id!r} comes after the last one that resume() announced",
                path=self.path,
            )
        path = self._file(self._span)
        with writing(path):
            if self._shard is None:
                self._shard = ShardWriter(path, self.spec, len(self._span))
            self._shard.append(sample)
        if len(self._shard) == len(self._span):
            self._finish_shard(self._span, self._shard)

    # -- shards ----------------------------------------------------------------------------------

    def _file(self, span: range) -> Path:
        return self.scratch / f"shard-{span.start // self.samples_per_shard:05d}.h5"

    def _receipt(self, span: range) -> Path:
        return receipt_path(self._file(span))

    def _next_shard(self) -> None:
        self._span = next(self._missing, None)
        self._shard = None  # the first sample creates its file

    def _finish_shard(self, span: range, shard: ShardWriter) -> None:
        """Close a full shard; a thread brings it to disk while the next one is written."""
        with writing(shard.path):
            shard.close()
        self._finishing.append(self._finisher.submit(self._commit, span, shard))
        self._next_shard()
        # A rank's block may end only when its last receipt is there for rank 0.
        self._await_finished(at_most=0 if self._span is None else FINISHING)

    def _commit(self, span: range, shard: ShardWriter) -> None:
        with writing(shard.path):
            self._finished[span] = shard.commit()
        self._write_receipt(span)

    def _write_receipt(self, span: range) -> None:
        receipt = Receipt(self.fingerprint, span.start, *self._finished[span])
        receipt.write(self._file(span))

    def _await_finished(self, at_most: int = 0) -> None:
        """Wait until at most ``at_most`` full shards are unfinished."""
        while len(self._finishing) > at_most:
            self._finishing[0].result()  # a failed one stays, and prevents publication
            self._finishing.popleft()

    def _reusable(self, span: range, *, hashed: bool) -> tuple[ShardRecord, Statistics] | None:
        """Return what is known of a shard that an equal writer finished; None: there is none.

        ``hashed``: whether to compare the file's sha256 too, and not only its size.
        """
        receipt, wanted = Receipt.read(self._file(span)), (self.fingerprint, span.start, len(span))
        if receipt is None or not self.fingerprint:
            return None
        if (receipt.fingerprint, receipt.first, receipt.record.samples) != wanted:
            return None
        is_sound = receipt.describes(self._file(span), hashed=hashed)
        return (receipt.record, receipt.statistics) if is_sound else None

    # -- the end ---------------------------------------------------------------------------------

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as cleanup:  # the last one first, whatever happens in between
            cleanup.callback(self._locks.close)
            cleanup.callback(self._leave_scratch, complete=kind is None)
            cleanup.callback(self._finisher.shutdown)  # waits for full shards, after an error, too
            if kind is None:
                self._publish()

    def _leave_scratch(self, *, complete: bool) -> None:
        """Remove unusable files, write missing receipts; the block's error takes precedence."""
        if self._shard is not None:
            with suppress(OSError, RuntimeError):
                self._shard.discard()
            self._shard = None
        if not self.fingerprint:
            shutil.rmtree(self.scratch, ignore_errors=True)
        elif not complete or self._finishing:  # the disk may have been full before the discard
            for span in self._finished:
                if not self._receipt(span).exists():
                    with suppress(StoreWriteError):
                        self._write_receipt(span)

    def _publish(self) -> None:
        if self._announced is None and self._span is not None and self._shard is not None:
            if len(self._shard) < len(self._span):  # the last shard may be short
                with writing(self._shard.path):
                    self._shard = self._shard.shortened()
            self._finish_shard(self._span, self._shard)
        self._await_finished()
        if self.rank != 0:
            return
        for span in self._spans:  # other ranks wrote the rest just now, or checked its hashes
            if span not in self._finished and (shard := self._reusable(span, hashed=False)):
                self._finished[span] = shard
        shards = [self._finished[span] for span in sorted(self._finished, key=lambda s: s.start)]
        samples = sum(record.samples for record, _ in shards)
        if self._announced not in (None, samples):
            missing = self._announced - samples - (len(self._shard) if self._shard else 0)
            raise IncompleteStoreError(
                f"{missing} of the {self._announced} samples that resume() announced"
                " were not appended",
                path=self.path,
                expected=self._announced,
                actual=samples,
            )
        if not shards and self._announced is None:
            raise IncompleteStoreError(
                "no sample was appended; announce an empty store with resume(0)", path=self.path
            )
        parts = [statistics for _, statistics in shards]
        index = Index(
            spec=self.spec,
            fingerprint=self.fingerprint,
            shards=tuple(record for record, _ in shards),
            statistics=Statistics.merge_all(parts) if parts else Statistics.none(self.spec),
        )
        with writing(self.path):
            names = {record.file for record in index.shards}
            for file in self.scratch.iterdir():
                if file.name.removesuffix(RECEIPT_SUFFIX) not in names:
                    file.unlink()  # of a killed writer, or of other inputs
            write_atomically(self.scratch / INDEX_NAME, index.to_text().encode())
            move_into_place(self.scratch, self.path, leave_behind="*" + RECEIPT_SUFFIX)


def clear_after_publication(path: Path, scratch: Path) -> None:
    """Remove what the writer of a finished store leaves if it is killed just after publishing.

    Raises
    ------
    StoreBusyError
        When a writer is writing ``path`` or into ``scratch``.
    """
    with writing(path), ExitStack() as locks:
        for folder in (path, scratch):
            locks.callback(_lock(folder).release)
        clear_after_move(scratch, path, leave_behind="*" + RECEIPT_SUFFIX)


def _lock(folder: Path) -> WriterLock:
    return WriterLock(folder.with_name(f".{folder.name.lstrip('.')}.lock"))
