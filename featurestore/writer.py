"""Writing a store: samples in, shards out, the finished folder renamed into place."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np

from featurestore.errors import IncompleteStoreError, SampleError, StoreExistsError
from featurestore.index import Index, ShardRecord, sync_folder, write_atomically, write_index
from featurestore.schema import VIEW_NAMES, StoreSpec
from featurestore.shard import file_sha256, write_shard
from featurestore.statistics import Statistics

SHARD_BYTES = 256 << 20  # uncompressed target size of a shard
OUR_FILES = re.compile(r"(shard-\d+\.h5(\.finished\.json)?|index\.json)(\.partial)?")
RECEIPT_SUFFIX = ".finished.json"  # beside a finished shard, until the store is whole


def create(
    path: str | Path,
    spec: StoreSpec,
    *,
    scratch: str | Path | None = None,
    fingerprint: str = "",
    samples_per_shard: int | None = None,
    overwrite: bool = False,
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

    Raises
    ------
    StoreExistsError
        When there is something at ``path`` and ``overwrite`` is off.
    """
    return StoreWriter(
        Path(path),
        spec,
        scratch=None if scratch is None else Path(scratch),
        fingerprint=fingerprint,
        samples_per_shard=samples_per_shard or max(1, SHARD_BYTES // spec.sample_bytes),
        overwrite=overwrite,
    )


class StoreWriter:
    """Collects samples into shards; see :func:`create`.

    A shard is held in memory until it is full, written under a ``.partial`` name and
    renamed, and a small JSON file beside it then records its hash and statistics. So
    a killed writer loses the shard it was filling and nothing else.
    """

    def __init__(
        self, path: Path, spec: StoreSpec, *, scratch: Path | None, fingerprint: str, samples_per_shard: int, overwrite: bool
    ) -> None:
        if path.exists() and not overwrite:
            raise StoreExistsError("exists already; remove it or write elsewhere", path=path)
        self.path = path
        self.spec = spec
        self.fingerprint = fingerprint
        self.samples_per_shard = samples_per_shard
        self.scratch = scratch or path.with_name(f".{path.name}.unfinished")
        if self.scratch.exists():
            self._refuse_foreign_files()
            if not fingerprint:  # nothing that lies there can be told to be ours
                shutil.rmtree(self.scratch)
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._finished: dict[int, tuple[ShardRecord, Statistics]] = {}
        self._announced: int | None = None
        self._rank = 0
        self._missing: Iterator[tuple[int, int]] = ((number, samples_per_shard) for number in itertools.count())
        self._start_shard()

    def _refuse_foreign_files(self) -> None:
        foreign = [file.name for file in self.scratch.iterdir() if not OUR_FILES.fullmatch(file.name)]
        if foreign:
            message = f"holds {foreign[0]!r}, which no writer left; choose another scratch folder"
            raise StoreExistsError(message, path=self.scratch, found=foreign[0])

    # -- filling ---------------------------------------------------------------------------------

    def resume(self, samples: int, *, rank: int = 0, ranks: int = 1) -> list[range]:
        """Say how many samples there will be, and take over the finished shards that lie in ``scratch``.

        Parameters
        ----------
        samples
            Of the whole store.
        rank, ranks
            This process, of how many that write the store together into one scratch folder: shard i belongs to
            rank i mod ``ranks``. Rank 0 publishes; its block must end after the others' last sample.

        Returns
        -------
        list of range
            The positions (0 to ``samples`` - 1) of the samples still to be appended, one range a missing shard, in
            the order in which :meth:`append` then expects them.
        """
        if ranks > 1 and not self.fingerprint:
            raise ValueError("several writers of one store need a fingerprint")
        self._announced, self._rank = samples, rank
        missing: list[range] = []
        for number, start in enumerate(range(0, samples, self.samples_per_shard)):
            positions = range(start, min(start + self.samples_per_shard, samples))
            if number % ranks == rank and not self._adopt(number, len(positions)):
                missing.append(positions)
        self._missing = iter([(span.start // self.samples_per_shard, len(span)) for span in missing])
        self._start_shard()
        return missing

    def append(self, *, id: str, features: np.ndarray, mask: np.ndarray, image: np.ndarray | None = None, view: str = "identity") -> None:
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
        """
        if self._number is None:
            raise SampleError(f"sample {id!r} comes after the last one that resume() announced", path=self.path)
        stored = self._checked(id, features, mask, image, view)
        self._ids.append(id)
        self._views.append(view)
        row = len(self._ids) - 1
        self._features[row] = stored
        self._masks[row] = mask
        if self._images is not None:
            assert image is not None  # _checked saw to it
            self._images[row] = image
        self._parts.append(Statistics.of_sample(self.spec, stored, mask))
        if len(self._ids) == self._capacity:
            self._finish_shard()

    def _checked(self, id: str, features: np.ndarray, mask: np.ndarray, image: np.ndarray | None, view: str) -> np.ndarray:
        spec = self.spec

        def wrong(message: str, expected: object, found: object) -> SampleError:
            return SampleError(f"sample {id!r}: {message}", path=self.path, expected=expected, found=found)

        if view not in VIEW_NAMES:
            raise wrong(f"view {view!r} is none of {VIEW_NAMES}", VIEW_NAMES, view)
        if not id or "\0" in id:
            raise wrong("an id must have a character, and no NUL", "text", id)
        if features.shape != spec.feature_shape:
            raise wrong(f"features are {features.shape}, expected {spec.feature_shape}", spec.feature_shape, features.shape)
        if mask.shape != spec.mask_shape or mask.dtype != np.uint8:
            found = f"{mask.dtype} {mask.shape}"
            raise wrong(f"mask is {found}, expected uint8 {spec.mask_shape}", spec.mask_shape, found)
        unknown = mask[(mask >= spec.num_classes) & (mask != spec.void_index)]
        if unknown.size:
            message = f"mask value {unknown[0]} is no class (0 to {spec.num_classes - 1}) and not void ({spec.void_index})"
            raise wrong(message, spec.num_classes, int(unknown[0]))
        image_shape = (*spec.mask_shape, 3) if spec.has_images else None
        found_shape = None if image is None else image.shape
        if found_shape != image_shape or (image is not None and image.dtype != np.uint8):
            raise wrong(f"image is {found_shape}, expected {image_shape} uint8", image_shape, found_shape)
        if not np.isfinite(features).all():
            raise wrong("a feature value is not finite (NaN or infinite)", "finite", "not finite")
        with np.errstate(over="ignore"):
            stored = features.astype(spec.feature_dtype)
        if not np.isfinite(stored).all():
            largest = float(np.abs(features).max())
            limit = float(np.finfo(spec.feature_dtype).max)
            raise wrong(f"feature value {largest:g} does not fit {spec.feature_dtype} (largest {limit:g})", limit, largest)
        if spec.nonnegative and stored.min() < 0:
            raise wrong(f"feature value {stored.min():g} is negative, but the spec says >= 0", 0, float(stored.min()))
        return stored

    # -- shards ----------------------------------------------------------------------------------

    def _start_shard(self) -> None:
        """Make room for the next missing shard; its arrays are reused."""
        self._number: int | None
        self._number, self._capacity = next(self._missing, (None, 0))
        self._ids: list[str] = []
        self._views: list[str] = []
        self._parts: list[Statistics] = []
        if self._number is None:  # nothing more to come: give the memory back
            self._features = self._masks = np.empty(0)
            self._images = None
        elif not hasattr(self, "_features"):
            rows = self.samples_per_shard  # pages of rows that stay unused are never touched
            self._features = np.empty((rows, *self.spec.feature_shape), self.spec.feature_dtype)
            self._masks = np.empty((rows, *self.spec.mask_shape), np.uint8)
            self._images = np.empty((rows, *self.spec.mask_shape, 3), np.uint8) if self.spec.has_images else None

    def _finish_shard(self) -> None:
        assert self._number is not None
        rows = len(self._ids)
        record = write_shard(
            self.scratch / shard_name(self._number),
            self.spec,
            ids=self._ids,
            views=self._views,
            features=self._features[:rows],
            masks=self._masks[:rows],
            images=None if self._images is None else self._images[:rows],
        )
        statistics = Statistics.merge_all(self._parts)
        receipt = {"fingerprint": self.fingerprint, "shard": asdict(record), "statistics": statistics.to_dict()}
        write_atomically(self._receipt(self._number), json.dumps(receipt).encode())
        self._finished[self._number] = (record, statistics)
        self._start_shard()

    def _adopt(self, number: int, samples: int) -> bool:
        """Take over shard ``number`` if it is finished, ours, and unchanged since it was written."""
        try:
            receipt = json.loads(self._receipt(number).read_bytes())
            record = ShardRecord(**receipt["shard"])
            statistics = Statistics.from_dict(receipt["statistics"])
            ours = receipt["fingerprint"] == self.fingerprint != "" and record.samples == samples
            if not ours or file_sha256(self.scratch / shard_name(number)) != record.sha256:
                return False
        except (OSError, ValueError, KeyError, TypeError):  # no receipt, or a damaged one: the shard is made again
            return False
        self._finished[number] = (record, statistics)
        return True

    def _receipt(self, number: int) -> Path:
        return self.scratch / (shard_name(number) + RECEIPT_SUFFIX)

    # -- the end ---------------------------------------------------------------------------------

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._publish()
        elif not self.fingerprint:  # nobody could take these shards over
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _publish(self) -> None:
        if self._ids and self._announced is None:
            self._finish_shard()  # the last shard of an open-ended store may be short
        if self._rank != 0:
            return
        for number, start in enumerate(range(0, self._announced or 0, self.samples_per_shard)):  # those of other ranks
            if number not in self._finished:
                self._adopt(number, min(self.samples_per_shard, (self._announced or 0) - start))
        numbers = sorted(self._finished)
        samples = sum(self._finished[number][0].samples for number in numbers)
        if self._announced not in (None, samples):
            missing = self._announced - samples - len(self._ids)
            message = f"{missing} of the {self._announced} samples that resume() announced were not appended"
            raise IncompleteStoreError(message, path=self.path, expected=self._announced, found=samples)
        if not numbers:
            raise IncompleteStoreError("no sample was appended; a store needs at least one", path=self.path)
        index = Index(
            spec=self.spec,
            fingerprint=self.fingerprint,
            shards=tuple(self._finished[number][0] for number in numbers),
            statistics=Statistics.merge_all(self._finished[number][1] for number in numbers),
        )
        for file in self.scratch.glob("*.partial"):
            file.unlink()  # left by a killed writer
        write_index(self.scratch, index)
        move_into_place(self.scratch, self.path)


def shard_name(number: int) -> str:
    """File name of shard ``number``, counted from 0."""
    return f"shard-{number:05d}.h5"


def move_into_place(source: Path, target: Path) -> None:
    """Rename a finished folder to its final name, replacing what is there; across file systems, copy first.

    Receipts are dropped last, so that a kill on the way loses no finished shard.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced, copied = (target.with_name(f".{target.name}.{word}") for word in ("replaced", "copied"))
    for leftover in (replaced, copied):
        if leftover.exists():
            shutil.rmtree(leftover)
    moved = source
    if source.stat().st_dev != target.parent.stat().st_dev:
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns("*" + RECEIPT_SUFFIX), copy_function=_copy_synced)
        moved = copied
    if target.exists():
        os.rename(target, replaced)
    os.rename(moved, target)
    sync_folder(target.parent)
    for leftover in (source, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    for receipt in target.glob("*" + RECEIPT_SUFFIX):
        receipt.unlink()


def _copy_synced(source: str, target: str) -> None:
    """Copy a file and wait until it is on disk: its source is removed next."""
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
