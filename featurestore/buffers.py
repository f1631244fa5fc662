"""Memory for batches that is used again."""

from __future__ import annotations

import weakref

import numpy as np

from featurestore.copying import LINE


class Buffers:
    """Arrays whose memory is used again once nothing refers to them, or to their memory, any more.

    Fresh memory costs a page fault every 4 KB, which is as dear as the copy into it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype | str) -> np.ndarray:
        """An uninitialised array that starts on a cache line; any thread may ask for one."""
        dtype = np.dtype(dtype)
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()  # atomic, so threads need no lock
        except IndexError:
            memory = _aligned(shape, dtype)
        array = memory.view()
        weakref.finalize(
            array, free.append, memory
        ).atexit = False  # all that shares the memory, a tensor too, holds the view
        return array


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Fresh memory. NumPy asks the kernel for huge pages where it is large, PyTorch does not."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)
