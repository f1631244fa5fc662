"""Reading a store: random access to samples, zero copy where the shards are uncompressed."""

from __future__ import annotations

import bisect
import copy
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featurestore.copying import LARGE
from featurestore.errors import (
    IncompleteStoreError,
    ShardCorruptError,
    SpecMismatchError,
    StoreNotFoundError,
)
from featurestore.files import allow_open_files, file_sha256, file_state
from featurestore.index import INDEX_NAME, ShardRecord, read_index
from featurestore.layouts import FEATURES, IMAGES, MASKS
from featurestore.prefetch import prefetch
from featurestore.shard import Shard, read_error
from featurestore.statistics import Statistics

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes
    ----------
    id, view
        Id of the image, and name of its view, such as ``identity``.
    layers
        (c, h, w) features of each layer by its name, which is empty where the store names none.
    mask
        (H, W) uint8.
    image
        (H, W, 3) uint8, or None.
    """

    id: str
    view: str
    layers: dict[str, np.ndarray]
    mask: np.ndarray
    image: np.ndarray | None

    @property
    def features(self) -> np.ndarray:
        """(C, h, w) features of the only layer.

        Raises
        ------
        ValueError
            When there are several layers.
        """
        (features,) = self.layers.values()
        return features


def open(path: str | Path) -> FeatureStore:
    """Open a store's folder, or one shard of a store.

    Opening is fast: it reads the index and compares the shards' sizes. It does not read their
    contents; :meth:`FeatureStore.verify` does.

    Raises
    ------
    StoreNotFoundError
        When there is nothing at ``path``.
    IncompleteStoreError, FormatVersionError, ShardCorruptError
        When ``path`` is not a whole store.
    """
    return FeatureStore(Path(path))


class FeatureStore:
    """A store of samples, open for reading; made by :func:`featurestore.open`.

    Shards are opened at the first read of a sample, one file descriptor each (the process's soft
    limit is raised for them). A store can be handed to worker processes: no handle crosses a fork
    or a pickle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[int, Shard] = {}
        self._pid = os.getpid()
        self._statistics: Statistics | None = None
        self._written: tuple[int, int, int] | None = None
        if path.is_dir():
            if not (path / INDEX_NAME).is_file():
                raise IncompleteStoreError(
                    f"no {INDEX_NAME} in this folder, so no finished store; write it again",
                    path=path,
                )
            self._written = file_state(path / INDEX_NAME)
            index = read_index(path)
            self.folder, self.spec, self.records = path, index.spec, index.shards
            self.fingerprint, self._statistics = index.fingerprint, index.statistics
            self._check_sizes()
            allow_open_files(len(index.shards))
        elif path.is_file():
            shard = Shard(path)
            record = ShardRecord(path.name, len(shard), path.stat().st_size, "")
            self.folder, self.spec, self.records = path.parent, shard.spec, (record,)
            self.fingerprint = ""
        else:
            raise StoreNotFoundError(
                "there is no feature store here; run the extract stage first", path=path
            )
        self._stored_spec = self.spec  # of all layers; ``spec`` may have fewer
        counts = (record.samples for record in self.records)
        self._ends = list(itertools.accumulate(counts))  # position after each shard's last sample

    def _check_sizes(self) -> None:
        for record in self.records:
            file = self.folder / record.file
            if not file.is_file():
                raise IncompleteStoreError(
                    "the index lists this shard, but it is gone; write the store again", path=file
                )
            size = file.stat().st_size
            if size != record.bytes:
                raise IncompleteStoreError(
                    f"{size} bytes long, but the index says {record.bytes}; write the store again",
                    path=file,
                    expected=record.bytes,
                    actual=size,
                )

    # -- samples ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Sample:
        """Read the sample at ``position`` (negative ones count from the end).

        Raises
        ------
        IndexError
            When there is no such position.
        """
        shard, row = self._locate(position)
        return Sample(
            shard.ids[row],
            shard.views[row],
            {layer.name: shard.read(layer.dataset(FEATURES), row) for layer in self.spec.layers},
            shard.read(MASKS, row),
            shard.read(IMAGES, row) if self.spec.has_images else None,
        )

    def features(self, position: int, layer: str = "") -> np.ndarray:
        """Read the features of a sample.

        Parameters
        ----------
        position
            Position of the sample.
        layer
            Name of the layer; default: the only one.

        Returns
        -------
        np.ndarray
            (c, h, w); a read-only view of the file's pages where uncompressed.

        Raises
        ------
        SpecMismatchError
            When there are several layers and none is named, or there is no such layer.
        """
        names = [each.name for each in self.spec.layers]
        if len(names) == 1 and not layer:
            layer = names[0]
        if layer not in names:
            text = f"has no layer {layer!r}" if layer else "has several layers; name one"
            raise SpecMismatchError(f"{text} of {', '.join(names)}", path=self.path)
        return self._read(self.spec.layers[names.index(layer)].dataset(FEATURES), position)

    def select(self, layers: Sequence[str]) -> FeatureStore:
        """Return this store with only some of its layers; none: all.

        Raises
        ------
        SpecMismatchError
            When a layer is not stored.
        """
        selected = copy.copy(self)
        try:
            selected.spec = self.spec.select(layers)
        except ValueError as error:
            message = f"{error}; extract it with extract.layers"
            raise SpecMismatchError(message, path=self.path) from error
        return selected

    def mask(self, position: int) -> np.ndarray:
        """Read a mask, (H, W) uint8."""
        return self._read(MASKS, position)

    def image(self, position: int) -> np.ndarray:
        """Read an image, (H, W, 3) uint8.

        Raises
        ------
        SpecMismatchError
            When the store was written without images.
        """
        self.check_images()
        return self._read(IMAGES, position)

    def _read(self, name: str, position: int) -> np.ndarray:
        shard, row = self._locate(position)
        return shard.read(name, row)

    def check_images(self) -> None:
        """Refuse a store without images where they are needed.

        Raises
        ------
        SpecMismatchError
            When the store was written without images.
        """
        if not self.spec.has_images:
            raise SpecMismatchError(
                "this store has no images; extract with store_images: true", path=self.path
            )

    def gather(
        self, name: str, positions: Sequence[int] | np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Copy or decode several samples, each once, into one array.

        Parameters
        ----------
        name
            ``masks``, ``images`` or one of the spec's ``feature_names``.
        positions
            (B,) positions in any order.
        out
            (B, ...) contiguous array of the right type that receives the samples, such as
            page-locked memory; default: a new one.

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
            self.check_images()
        if out is None:
            shape, dtype = self.spec.row(name)
            out = np.empty((len(positions), *shape), dtype)
        where = np.asarray(positions, np.int64).tolist()
        if where and not (min(where) >= 0 and max(where) < len(self)):
            raise IndexError(f"samples {where} of a store with {len(self)}")
        # Neighbours in one shard are read by one call, during which other threads run.
        first = 0
        for number, group in itertools.groupby(where, partial(bisect.bisect_right, self._ends)):
            start = self._ends[number] - self.records[number].samples
            rows = np.array(list(group), np.int64) - start
            last = first + len(rows)
            self._shard(number).gather_into(
                name, rows, out[first:last], past_caches=out.nbytes >= LARGE
            )
            first = last
        return out

    @property
    def ids(self) -> list[str]:
        """Id of every sample, in order."""
        return [id for shard in self._all_shards() for id in shard.ids]

    @property
    def views(self) -> list[str]:
        """View of every sample (``identity``, ``hflip``, ...), in order."""
        return [view for shard in self._all_shards() for view in shard.views]

    def positions(self, view: str) -> np.ndarray:
        """Find the ascending (n,) int64 positions of a view, such as ``identity``."""
        return np.flatnonzero(np.array(self.views) == view)

    @property
    def stats(self) -> Statistics:
        """Statistics of each class, and of each channel of the assembled map.

        Channels folded from one stored channel share its statistics. Statistics of a single
        shard or a subset are computed on first use.
        """
        stored = self._stored_spec
        if self._statistics is None:
            self._statistics = Statistics.merge_all(
                Statistics.of_sample(
                    stored,
                    [shard.read(name, row) for name in stored.feature_names],
                    shard.read(MASKS, row),
                )
                for shard, row in map(self._locate, range(len(self)))
            )
        if not stored.layer_names:
            return self._statistics
        ends = itertools.accumulate(layer.shape[0] for layer in stored.layers)
        end_of = dict(zip(stored.layer_names, ends, strict=True))
        channels = [
            np.repeat(np.arange(end_of[name] - count, end_of[name]), factor**2)
            for name, (count, factor) in zip(self.spec.layer_names, self.spec.folds, strict=True)
        ]
        return self._statistics.at(np.concatenate(channels))

    def to_frame(self) -> pandas.DataFrame:
        """Make a table with a row for each sample.

        Returns
        -------
        pandas.DataFrame
            Columns ``id``, ``view``, ``shard``; for each class, and ``void``, the fraction of the
            mask's pixels (0..1).
        """
        import pandas

        masks = map(self.mask, range(len(self)))
        fractions = np.stack(
            [np.bincount(mask.reshape(-1), minlength=256) / mask.size for mask in masks]
        )
        files = [self._locate(position)[0].path.name for position in range(len(self))]
        classes = {name: fractions[:, value] for value, name in enumerate(self.spec.class_names)}
        columns = {"id": self.ids, "view": self.views, "shard": files, **classes}
        return pandas.DataFrame({**columns, "void": fractions[:, self.spec.void_index]})

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
            Threads that read and hash, one shard each; default: 2.
        progress
            Called with the number of bytes of each block that was read, from one thread at a
            time.
        rank, ranks
            Number of this process, and of all that divide the work: shard i is read by rank i mod
            ``ranks``, and opened by all. Default: 0 of 1.

        Raises
        ------
        ShardCorruptError
            For the first shard whose sha256 differs from the recorded one.
        StoreReadError
            When the operating system does not let a shard be read.
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
                actual = file_sha256(file, count)
            except OSError as error:
                raise read_error(file, error) from error
            if actual != record.sha256:
                raise ShardCorruptError(
                    f"damaged: sha256 {actual[:12]}..., but the index says"
                    f" {record.sha256[:12]}...; write the store again",
                    path=file,
                    expected=record.sha256,
                    actual=actual,
                )

        list(prefetch(check, self.records[rank::ranks], workers=workers))
        list(self._all_shards())  # opening compares a shard's attributes with the index

    # -- shards, opened on first use, once a process ---------------------------------------------

    def _locate(self, position: int) -> tuple[Shard, int]:
        index = int(position) + (len(self) if position < 0 else 0)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {position} of a store with {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._shard(number), index - self._ends[number] + self.records[number].samples

    def _all_shards(self) -> Iterator[Shard]:
        return map(self._shard, range(len(self.records)))

    def _shard(self, number: int) -> Shard:
        if self._pid != os.getpid():  # HDF5 handles from before a fork give wrong data
            self._shards, self._pid = {}, os.getpid()
        if number not in self._shards:
            record = self.records[number]
            shard = Shard(self.folder / record.file)
            if self._written is not None and file_state(self.path / INDEX_NAME) != self._written:
                raise IncompleteStoreError(
                    "the store was written anew since it was opened; open it again", path=self.path
                )
            if (shard.spec, len(shard)) != (self._stored_spec, record.samples):
                raise ShardCorruptError(
                    "the shard's own description is not the index's; write the store again",
                    path=shard.path,
                    expected=self._stored_spec,
                    actual=shard.spec,
                )
            self._shards[number] = shard
        return self._shards[number]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shards": {}}

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.spec.feature_shape))
        return f"FeatureStore('{self.path}': {len(self)} samples of {size}, {self.spec.backbone})"
