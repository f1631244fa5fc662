"""Feature stores in PyTorch: assembled maps, and a training loader."""

from __future__ import annotations

import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from featurestore.batch_order import BatchOrder
from featurestore.copying import LARGE, LINE, take_rows
from featurestore.errors import StoreMemoryError
from featurestore.layouts import IMAGES, MASKS
from featurestore.prefetch import prefetch
from featurestore.reader import FeatureStore
from featurestore.schema import StoreSpec

CACHES = ("none", "host", "device")
AHEAD = 4  # batches that wait for the training, beyond those that threads are reading
Tensors: TypeAlias = dict[str, torch.Tensor]  # a batch as it is stored, by dataset


@dataclass
class Batch:
    """B samples.

    Attributes
    ----------
    positions
        (B,) int64 positions of the samples in the store, on the CPU.
    features
        (B, C, h, w) of the store's type; float32 where layers were assembled.
    masks
        (B, H, W) uint8.
    images
        (B, 3, H, W) uint8, channels last in memory; None where they are not read.
    extra
        Further samples, see :class:`ExtraSamples`; None where there are none.
    unlabelled
        Samples of another store, see :class:`PairedLoader`; None where there are none.
    """

    positions: torch.Tensor
    features: torch.Tensor
    masks: torch.Tensor
    images: torch.Tensor | None
    extra: Batch | None = None
    unlabelled: Batch | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice) -> Batch:
        """Take some samples, without the extra ones; they share this batch's memory."""
        images = None if self.images is None else self.images[rows]
        return Batch(self.positions[rows], self.features[rows], self.masks[rows], images)

    def chunk(self, count: int) -> list[Batch]:
        """Split into ``count`` batches of equal size, extra and unlabelled samples too."""
        size = len(self) // count
        chunks = [self[start : start + size] for start in range(0, size * count, size)]
        for name in ("extra", "unlabelled"):
            others: Batch | None = getattr(self, name)
            if others is not None:
                for chunk, part in zip(chunks, others.chunk(count), strict=True):
                    setattr(chunk, name, part)
        return chunks


@dataclass(frozen=True)
class ExtraSamples:
    """Further samples of a store that a loader reads together with each batch.

    Attributes
    ----------
    positions
        (E,) positions of all samples that may be chosen.
    choose
        Called with the epoch, the number of the batch, and its positions on this rank; returns the
        positions of the batch's extra samples, any number. Equal arguments give equal results.
    """

    positions: np.ndarray
    choose: Callable[[int, int, list[int]], list[int]]


def assemble(layers: Sequence[torch.Tensor], spec: StoreSpec) -> torch.Tensor:
    """Assemble the layers of B samples into one map.

    Parameters
    ----------
    layers
        (B, c, h', w') of each layer of ``spec``, on one device.
    spec
        Properties of the store.

    Returns
    -------
    torch.Tensor
        (B, C, h, w). The only layer is returned as it is, unless it is folded. Otherwise float32,
        channels last in memory: coarser layers are upsampled bilinearly, and finer ones folded.
        Folding is ``pixel_unshuffle``: channel c*r*r + y*r + x is pixel (y, x) of each square of
        channel c.
    """
    folds = [factor for _, factor in spec.folds]
    if folds == [1]:
        return layers[0]
    # The grid is that of the finest layer after folding.
    sides = [layer.shape[1] // factor for layer, factor in zip(spec.layers, folds, strict=True)]
    finest = sides.index(max(sides))
    size = [side // folds[finest] for side in layers[finest].shape[2:]]
    blocks = []
    for layer, factor in zip(layers, folds, strict=True):
        block = layer.float().contiguous(memory_format=torch.channels_last)
        if factor > 1:
            block = F.pixel_unshuffle(block, factor)
        elif list(block.shape[2:]) != size:
            block = F.interpolate(block, size, mode="bilinear", align_corners=False)
        blocks.append(block)
    return torch.cat(blocks, dim=1).contiguous(memory_format=torch.channels_last)


def split_map(maps: torch.Tensor, spec: StoreSpec) -> list[torch.Tensor]:
    """Split assembled maps (B, C, h, w) into their layers: folded ones unfolded, all others as is.

    Assembling the result gives the maps again.
    """
    blocks = torch.split(maps, [count * factor**2 for count, factor in spec.folds], dim=1)
    return [
        F.pixel_shuffle(block, factor) if factor > 1 else block
        for block, (_, factor) in zip(blocks, spec.folds, strict=True)
    ]


def gather_maps(
    store: FeatureStore, positions: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Read the assembled maps of the samples at ``positions``: (B, C, h, w) float32 on a device."""
    layers = [
        torch.from_numpy(store.gather(name, positions)).to(device)
        for name in store.spec.feature_names
    ]
    return assemble(layers, store.spec).float()


class FeatureLoader:
    """Batches of a store, shuffled in each epoch, read ahead by threads, on a device.

    Threads and not processes: copying and decoding run without Python's lock, and each sample
    goes straight into the batch's memory, page-locked for a GPU (``benchmarks/loader.py``
    compares both).

    Parameters
    ----------
    store
        The store.
    batch_size
        Samples a batch, of all ranks together.
    positions
        (S,) positions of the samples to read; default: all. Or (S, V), the views of each sample,
        of which each repeat draws one.
    seed, drop_last, repeats, rank, ranks
        See :class:`BatchOrder`.
    images
        Whether to read the images too; default: False.
    workers
        Threads, default 2; up to four more batches than threads are in memory beside the
        caller's. Order and contents do not depend on it.
    device
        Device of the batches; default: the CPU.
    cache
        ``none`` (default) reads the files, which the operating system keeps in memory where it
        can. ``host`` and ``device`` read the samples once, into the memory of the machine or of
        the device: worth it where training waits for decoding, or for the copy to the device.
    extra
        Further samples of each batch; default: none.

    Raises
    ------
    SpecMismatchError
        When there are no images.
    StoreMemoryError
        When the samples do not fit into the free memory.
    """

    def __init__(
        self,
        store: FeatureStore,
        batch_size: int,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        positions: Sequence[int] | np.ndarray | None = None,
        repeats: int = 1,
        images: bool = False,
        workers: int = 2,
        device: torch.device | str = "cpu",
        cache: str = "none",
        rank: int = 0,
        ranks: int = 1,
        extra: ExtraSamples | None = None,
    ) -> None:
        if images:
            store.check_images()
        self.store = store
        self.positions = np.arange(len(store)) if positions is None else np.asarray(positions)
        self.order = BatchOrder(
            len(self.positions),
            batch_size,
            seed=seed,
            drop_last=drop_last,
            repeats=repeats,
            views=self.positions.shape[1] if self.positions.ndim > 1 else 1,
            rank=rank,
            ranks=ranks,
        )
        self.extra = extra
        read = self.positions if extra is None else np.append(self.positions, extra.positions)
        self._read_positions = np.unique(read)  # by row of the resident tensors
        self.workers = workers
        self.device = torch.device(device)
        self.names = names_of(store.spec, images)
        self._buffers = _Buffers()
        self._resident: Tensors = {}
        if cache != "none":
            self._read_all(self.device if cache == "device" else torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Read the batches of an epoch from number ``first`` on.

        Without a seed all epochs are equal.
        """
        positions = self.positions.reshape(-1)
        batches = [positions[batch].tolist() for batch in self.order.epoch(epoch)[first:]]
        extra: list[list[int]] = [[]] * len(batches)
        if self.extra is not None:
            extra = [self.extra.choose(epoch, i, batch) for i, batch in enumerate(batches, first)]
        read = [batch + more for batch, more in zip(batches, extra, strict=True)]
        ready: Iterable[Tensors]
        if any(tensor.device.type != "cpu" for tensor in self._resident.values()):
            ready = map(self._gather_resident, read)  # on the stream that computes
        else:
            ready = prefetch(self._gather, read, workers=self.workers, ahead=AHEAD)
            if self.device.type == "cuda":
                ready = copied_ahead(ready, self.device)
        for count, chosen, tensors in zip(map(len, batches), read, ready, strict=True):
            samples = _as_batch(tensors, chosen, self.store.spec)
            batch = samples[:count]
            batch.extra = samples[count:] if len(samples) > count else None
            yield batch

    def _gather(self, positions: list[int]) -> Tensors:
        tensors: Tensors = {}
        rows = np.searchsorted(self._read_positions, positions).astype(np.int64)
        for name in self.names:
            resident = self._resident.get(name)
            tensors[name] = self._empty(name, len(positions))
            out = tensors[name].numpy()
            if resident is None:
                self.store.gather(name, positions, out=out)
            else:  # not PyTorch, which would start further threads
                take_rows(resident.numpy(), rows, out, past_caches=out.nbytes >= LARGE)
        return tensors

    def _gather_resident(self, positions: list[int]) -> Tensors:
        """Gather samples that are on the device; nothing waits for it."""
        rows = torch.from_numpy(np.searchsorted(self._read_positions, positions))
        rows = rows.pin_memory().to(self.device, non_blocking=True)
        return {name: tensor[rows] for name, tensor in self._resident.items()}

    def _empty(self, name: str, samples: int) -> torch.Tensor:
        """Allocate host memory for a batch of a dataset, page-locked if it goes to a GPU."""
        shape, dtype = self.store.spec.row(name)
        if self.device.type == "cuda":  # PyTorch uses page-locked memory again by itself
            return torch.empty((samples, *shape), dtype=getattr(torch, dtype), pin_memory=True)
        return torch.from_numpy(self._buffers.take((samples, *shape), dtype))

    def _read_all(self, device: torch.device) -> None:
        """Read all samples into tensors on ``device``, a few at a time."""
        count = len(self._read_positions)
        row = {name: self.store.spec.row(name) for name in self.names}
        row_bytes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in row.values())
        needed = count * sum(row_bytes)
        place, free = _free_memory(device)
        if needed > 0.9 * free:
            raise StoreMemoryError(
                f"{needed / 1e9:.1f} GB do not fit into {place} ({free / 1e9:.1f} GB are free);"
                " use --cache none",
                path=self.store.path,
                expected=needed,
                actual=free,
            )
        self._resident = {
            name: torch.empty((count, *shape), dtype=getattr(torch, dtype), device=device)
            for name, (shape, dtype) in row.items()
        }

        def read(rows: slice) -> None:
            for name, tensor in self._resident.items():
                on_cpu = tensor[rows].numpy() if device.type == "cpu" else None
                gathered = self.store.gather(name, self._read_positions[rows], out=on_cpu)
                if on_cpu is None:
                    tensor[rows].copy_(torch.from_numpy(gathered))

        pieces = [slice(start, min(start + 8, count)) for start in range(0, count, 8)]
        list(prefetch(read, pieces, workers=self.workers))


class PairedLoader:
    """Each batch of a loader together with a batch of another one, as its ``unlabelled``.

    Parameters
    ----------
    labelled
        Gives the batches and their number.
    unlabelled
        Has no fewer batches per epoch.
    first_epoch
        Epoch from which the other loader is read; default: 0.
    """

    def __init__(
        self, labelled: FeatureLoader, unlabelled: FeatureLoader, *, first_epoch: int = 0
    ) -> None:
        assert len(unlabelled) >= len(labelled)
        self.labelled, self.unlabelled, self.first_epoch = labelled, unlabelled, first_epoch

    def __len__(self) -> int:
        return len(self.labelled)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Read the batches of an epoch from number ``first`` on."""
        batches = self.labelled.epoch(epoch, first)
        if epoch < self.first_epoch:
            yield from batches
            return
        for batch, other in zip(batches, self.unlabelled.epoch(epoch, first), strict=False):
            batch.unlabelled = other
            yield batch


def _free_memory(device: torch.device) -> tuple[str, int]:
    """Name a device's memory for a message, and count its free bytes for this process."""
    if device.type == "cuda":
        return "the device", torch.cuda.mem_get_info(device)[0]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun; each reads all samples
    free = psutil.virtual_memory().available // processes
    if processes == 1:
        return "memory", free
    return f"this process's share of memory, one of {processes}", free


def copied_ahead(batches: Iterable[Tensors], device: torch.device) -> Iterator[Tensors]:
    """Copy batches to a CUDA device, the next one while the caller computes with this one.

    The copies have a separate stream. On the stream that computes, a copy would wait for
    earlier computations, and later computations for the copy.
    """
    copying = _copying_stream(device)

    def copy(batch: Tensors) -> tuple[Tensors, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            return moved, copying.record_event()

    # A copy is yielded only after the next one has started.
    for started, _ in itertools.pairwise(itertools.chain(map(copy, batches), [None])):
        assert started is not None
        batch, copied = started
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in batch.values():  # the copying stream reuses its memory only after this one
            tensor.record_stream(computing)
        yield batch


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """Return this process's one stream for copies: PyTorch caches memory by stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def names_of(spec: StoreSpec, images: bool) -> tuple[str, ...]:
    """Name the datasets of a batch."""
    return (*spec.feature_names, MASKS, *([IMAGES] if images else []))


def _as_batch(tensors: Tensors, positions: Sequence[int], spec: StoreSpec) -> Batch:
    """Make a batch of tensors by name; (B, H, W, 3) images become a (B, 3, H, W) view."""
    images = tensors.get(IMAGES)
    return Batch(
        torch.tensor(positions, dtype=torch.int64),
        assemble([tensors[name] for name in spec.feature_names], spec),
        tensors[MASKS],
        None if images is None else images.permute(0, 3, 1, 2),
    )


class _Buffers:
    """Memory for batches that is used again once no array or tensor refers to it.

    New memory costs a page fault every 4 KB, which takes as long as the copy into it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an uninitialised array that starts on a cache line, in any thread."""
        free = self._free.setdefault((shape, np.dtype(dtype)), [])
        try:
            memory = free.pop()  # atomic: threads need no lock
        except IndexError:
            # NumPy asks the kernel for huge pages where an array is large; PyTorch does not.
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raw = np.empty(size + LINE, np.uint8)
            start = -raw.ctypes.data % LINE
            memory = raw[start : start + size].view(dtype).reshape(shape)
        array = memory.view()
        # Whatever shares the memory, tensors too, keeps this view alive.
        weakref.finalize(array, free.append, memory).atexit = False
        return array
