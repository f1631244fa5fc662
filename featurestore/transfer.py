"""The way of batches to a device: host memory that is used again, and copies that run beside the computation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch


class Movable(Protocol):
    """A batch."""

    def to(self: Moved, device: torch.device) -> Moved:
        """The same on another device; copies from pinned memory do not block."""

    def tensors(self) -> list[torch.Tensor]:
        """All that was moved."""


Moved = TypeVar("Moved", bound=Movable)


def moved(batches: Iterable[Moved], device: torch.device) -> Iterator[Moved]:
    """Batches on ``device``; on a CUDA device the next one is copied while the caller computes with this one.

    On the stream that computes, a copy would wait for what was asked for before it, and all that comes after would wait for the copy.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying = torch.cuda.Stream(device)
    waiting: tuple[Moved, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            upcoming = batch.to(device), copying.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = upcoming
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: Moved, copied: torch.cuda.Event, device: torch.device) -> Moved:
    """A batch that the current stream may use: what is asked of it from now on waits for the copy."""
    using = torch.cuda.current_stream(device)
    using.wait_event(copied)
    for tensor in batch.tensors():
        tensor.record_stream(using)  # its memory belongs to the other stream, which must not use it again before this one is done
    return batch


class Pool:
    """Memory for batches that is used again once nothing refers to a batch any more.

    Fresh memory costs a page fault every 4 KB, which is as dear as the copy into it.
    PyTorch's allocator of page-locked memory keeps a pool of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU."""
        if self.pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()  # atomic, so threads need no lock
        except IndexError:
            memory = _aligned(shape, dtype)
        view = memory.view()
        weakref.finalize(view, free.append, memory).atexit = False  # the tensor and all tensors that share its memory hold the view
        return torch.from_numpy(view)


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Fresh memory that starts on a cache line. NumPy asks the kernel for huge pages where it is large, PyTorch does not."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(str(dtype).removeprefix("torch.")).reshape(shape)
