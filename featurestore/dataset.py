"""Feature stores in PyTorch: a map-style data set, an order of batches, and a loader that gathers them ahead."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset

from featurestore.buffers import Buffers
from featurestore.copying import LARGE, take_rows
from featurestore.errors import SpecMismatchError, StoreMemoryError
from featurestore.prefetch import prefetch
from featurestore.reader import FeatureStore
from featurestore.schema import FEATURES, IMAGES, MASKS

CACHES = ("none", "host", "device")


@dataclass
class Batch:
    """B samples: features (B, C, h, w) of the store's type, masks (B, H, W) uint8, images (B, 3, H, W) uint8 or None.

    ``positions`` (B,) int64 are the samples' places in the store, on the CPU.
    """

    positions: torch.Tensor
    features: torch.Tensor
    masks: torch.Tensor
    images: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, parts: int) -> list[Batch]:
        """Batches of equally many samples, ``parts`` of them, that share this one's memory."""
        size = len(self) // parts
        starts = range(0, size * parts, size)

        def part(tensor: torch.Tensor, start: int) -> torch.Tensor:
            return tensor[start : start + size]

        images = [None if self.images is None else part(self.images, start) for start in starts]
        return [
            Batch(
                part(self.positions, start),
                part(self.features, start),
                part(self.masks, start),
                image,
            )
            for start, image in zip(starts, images, strict=True)
        ]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not block."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        return Batch(
            self.positions,
            self.features.to(device, non_blocking=True),
            self.masks.to(device, non_blocking=True),
            images,
        )


class FeatureDataset(Dataset[Batch]):
    """A store for a :class:`torch.utils.data.DataLoader` of your own (``collate_fn=lambda batch: batch``).

    Training uses :class:`FeatureLoader`, which copies a sample once; a DataLoader's
    worker processes copy it again into shared memory.

    Parameters
    ----------
    store
        The store.
    images
        Whether to read the images too.

    Raises
    ------
    SpecMismatchError
        When there are no images.
    """

    def __init__(self, store: FeatureStore, *, images: bool = False) -> None:
        self.store = store
        self.images = images
        check_images(store, images)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """Batch of the samples at ``positions``, in that order."""
        arrays = {name: self.store.gather(name, positions) for name in names_of(self.images)}
        return as_batch(
            positions, {name: torch.from_numpy(array) for name, array in arrays.items()}
        )


class BatchOrder:
    """Which samples make up which batch: a pure function of seed and epoch, and the same for any number of ranks.

    Parameters
    ----------
    samples
        How many there are to choose from.
    batch_size
        Samples a batch, of all ranks together.
    seed
        None: in the store's order. Else shuffled anew each epoch.
    drop_last
        Leave out a last batch that is not full.
    passes
        How often an epoch goes over the samples, each time in another order where it shuffles.
    views
        Of each sample, of which every pass takes one at random; more than one wants a seed.
    rank, ranks
        Which part of each batch is this process's, of how many.

    Raises
    ------
    ValueError
        When the ranks cannot share the batches evenly, or views cannot be drawn.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        passes: int = 1,
        views: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise ValueError(
                f"a batch of {batch_size} cannot be divided evenly over {ranks} processes"
            )
        if views > 1 and seed is None:
            raise ValueError("one of several views is drawn at random; give a seed")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.passes = passes
        self.views = views
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        seen = self.passes * self.samples
        return seen // self.batch_size if self.drop_last else -(-seen // self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """Numbers of each batch of an epoch, this rank's part of them (which a short last batch may leave empty).

        Of sample s they are s * views to s * views + views - 1. Within a batch, where order means nothing, they ascend: files
        are read forwards, neighbours at once.
        """
        order = np.tile(np.arange(self.samples), self.passes)
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, epoch])
            order = np.concatenate([rng.permutation(self.samples) for _ in range(self.passes)])
            if self.views > 1:
                order = order * self.views + rng.integers(self.views, size=len(order))
        batches = (
            np.sort(order[number * self.batch_size : (number + 1) * self.batch_size])
            for number in range(len(self))
        )
        return [np.array_split(batch, self.ranks)[self.rank].tolist() for batch in batches]


class FeatureLoader:
    """A store's batches, shuffled each epoch, gathered ahead by threads, on a device.

    Threads and not processes: gathering is copying (or decoding), which runs without
    Python's lock, and each sample goes straight into the batch's own memory, page-locked
    where the device is a GPU (``benchmarks/store.py`` compares both).

    Parameters
    ----------
    store
        The store.
    batch_size
        Samples a batch, of all ranks together.
    positions
        (S,) of the samples that take part; default: all. Or (S, V), each sample's views, of which one is drawn each time.
    seed, drop_last, passes, rank, ranks
        See :class:`BatchOrder`.
    images
        Whether to read the images too.
    workers
        Threads; up to three times as many batches are in memory beside the caller's. Neither order nor contents depend on it.
    device
        Where the batches are wanted.
    cache
        ``none``: read the files (the operating system keeps what it can in memory). ``host``, ``device``: read the
        store once into memory of the machine or of the device, then only pick from there; worth it where decoding a
        compressed store, or the copy to the device, is what training waits for.

    Raises
    ------
    SpecMismatchError
        When there are no images.
    StoreMemoryError
        When the store does not fit into the memory that is free there.
    """

    def __init__(
        self,
        store: FeatureStore,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        positions: Sequence[int] | np.ndarray | None = None,
        passes: int = 1,
        images: bool = False,
        workers: int = 2,
        device: torch.device | str = "cpu",
        cache: str = "none",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        check_images(store, images)
        self.store = store
        self.positions = np.arange(len(store)) if positions is None else np.asarray(positions)
        order = partial(BatchOrder, views=self.positions.shape[1] if self.positions.ndim > 1 else 1)
        self.order = order(
            len(self.positions),
            batch_size,
            seed=seed,
            drop_last=drop_last,
            passes=passes,
            rank=rank,
            ranks=ranks,
        )
        self._known = np.unique(self.positions)
        self.workers = workers
        self.device = torch.device(device)
        self.names = names_of(images)
        self._buffers = Buffers()
        self._resident = (
            None
            if cache == "none"
            else self._read_all(self.device if cache == "device" else torch.device("cpu"))
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``first`` on; without a seed all epochs are the same."""
        batches = [
            self.positions.reshape(-1)[batch].tolist() for batch in self.order.epoch(epoch)[first:]
        ]
        ready = prefetch(self._gather, batches, workers=self.workers, ahead=2 * self.workers)
        yield from (
            moved(ready, self.device)
            if self.device.type == "cuda"
            else map(partial(Batch.to, device=self.device), ready)
        )

    def _gather(self, positions: list[int]) -> Batch:
        tensors: dict[str, torch.Tensor] = {}
        rows = np.searchsorted(self._known, positions).astype(np.int64)  # of what is resident
        for name in self.names:
            if self._resident is not None and self._resident[name].device.type != "cpu":
                whole = self._resident[name]
                tensors[name] = whole[torch.from_numpy(rows).to(whole.device)]
                continue
            tensors[name] = self._memory(name, len(positions))
            out = tensors[name].numpy()
            if self._resident is None:
                self.store.gather(name, positions, out=out)
            else:  # not by PyTorch: its own threads would come on top of ours
                take_rows(self._resident[name].numpy(), rows, out, past_caches=out.nbytes >= LARGE)
        return as_batch(positions, tensors)

    def _memory(self, name: str, samples: int) -> torch.Tensor:
        """Uninitialised memory of this machine for a batch of a dataset, page-locked where it goes on to a GPU."""
        shape, dtype = self.store.spec.row(name)
        if self.device.type == "cuda":  # PyTorch keeps page-locked memory that it used before
            return torch.empty((samples, *shape), dtype=getattr(torch, dtype), pin_memory=True)
        return torch.from_numpy(self._buffers.take((samples, *shape), dtype))

    def _read_all(self, device: torch.device) -> dict[str, torch.Tensor]:
        """All samples that take part as tensors on ``device``, a few at a time."""
        rows = {name: self.store.spec.row(name) for name in self.names}
        count = len(self._known)
        needed = count * sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in rows.values()
        )
        if device.type == "cuda":
            where, free = "the device", torch.cuda.mem_get_info(device)[0]
        else:  # each of torchrun's processes on this machine reads all
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            where = (
                "memory"
                if processes == 1
                else f"this process's share of memory, one of {processes}"
            )
            free = psutil.virtual_memory().available // processes
        if needed > 0.9 * free:
            message = f"{needed / 1e9:.1f} GB do not fit into {where} ({free / 1e9:.1f} GB are free); use --cache none"
            raise StoreMemoryError(message, path=self.store.path, expected=needed, actual=free)
        whole = {
            name: torch.empty((count, *shape), dtype=getattr(torch, dtype), device=device)
            for name, (shape, dtype) in rows.items()
        }

        def read(rows: slice) -> None:
            for name, tensor in whole.items():
                if device.type == "cpu":
                    self.store.gather(name, self._known[rows], out=tensor[rows].numpy())
                else:
                    tensor[rows].copy_(torch.from_numpy(self.store.gather(name, self._known[rows])))

        parts = [slice(start, min(start + 8, count)) for start in range(0, count, 8)]
        for _ in prefetch(read, parts, workers=self.workers):
            pass
        return whole


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a CUDA device; the next one is copied while the caller computes with this one.

    On the stream that computes, a copy would wait for what was asked for before it, and all that comes after would wait for the copy.
    """
    copying = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            upcoming = batch.to(device), copying.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = upcoming
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """A batch that the current stream may use: what is asked of it from now on waits for the copy."""
    using = torch.cuda.current_stream(device)
    using.wait_event(copied)
    for tensor in (batch.features, batch.masks, batch.images):
        if tensor is not None:
            tensor.record_stream(
                using
            )  # its memory is the other stream's, which must not use it again before this one is done
    return batch


def names_of(images: bool) -> tuple[str, ...]:
    """Datasets of a batch."""
    return (FEATURES, MASKS, IMAGES) if images else (FEATURES, MASKS)


def as_batch(positions: Sequence[int], tensors: dict[str, torch.Tensor]) -> Batch:
    """A batch of the tensors by name; images (B, H, W, 3) become (B, 3, H, W), channels last in memory."""
    images = tensors.get(IMAGES)
    where = torch.tensor(positions, dtype=torch.int64)
    return Batch(
        where,
        tensors[FEATURES],
        tensors[MASKS],
        None if images is None else images.permute(0, 3, 1, 2),
    )


def check_images(store: FeatureStore, images: bool) -> None:
    """Refuse a store without images where they are wanted.

    Raises
    ------
    SpecMismatchError
        When there are none.
    """
    if images and not store.spec.has_images:
        raise SpecMismatchError(
            "this store has no images; extract with store_images: true", path=store.path
        )
