"""Copying rows of an array into a batch; large batches bypass the processor's caches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

LARGE = 8 << 20  # bytes; a loader's batches of this size fill the last-level cache
LINE = 64  # bytes of a cache line, and of the widest store instruction


def take_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray, *, past_caches: bool) -> None:
    """Copy ``source[rows[i]]`` to ``out[i]``, without Python's lock.

    An ordinary store first reads the line that it overwrites. A non-temporal store, past the
    caches, does not: a large copy then moves two thirds of the bytes over the memory bus, which
    limits its speed.

    Parameters
    ----------
    source
        (N, ...), contiguous.
    rows
        (B,) int64, each in 0..N-1.
    out
        (B, ...) of the row's shape and type, contiguous, writable.
    past_caches
        Whether the batch is too large to be read from the caches afterwards.

    Raises
    ------
    ValueError, TypeError
        When shape, type or memory layout of ``out`` do not fit the rows.
    """
    if not past_caches:  # rows are in range, and mode="raise" would copy twice
        np.take(source, rows, axis=0, out=out, mode="clip")
        return
    expected = (len(rows), *source.shape[1:])
    if not (source.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("source and out must be contiguous, and out writable")
    if out.shape != expected or out.dtype != source.dtype:
        raise ValueError(
            f"out is {out.dtype} {out.shape}, but the rows are {source.dtype} {expected}"
        )
    _kernel()(_row_bytes(source), rows, _row_bytes(out))


def _row_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1).view(np.uint8)  # (N, ...) -> (N, bytes of a row)


@functools.cache
def _kernel() -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """Compile the copying loop on first use."""
    import numba
    from llvmlite import ir
    from numba.core.types import int64, void
    from numba.extending import intrinsic

    nothing = ir.Constant(ir.IntType(8).as_pointer(), None)  # the value of a void function

    @intrinsic
    def move_line(_: object, target: object, source: object) -> tuple[object, object]:
        def generate(
            _: object, builder: ir.IRBuilder, __: object, addresses: list[ir.Value]
        ) -> ir.Value:
            line = ir.VectorType(ir.IntType(8), LINE).as_pointer()
            to, start = (builder.inttoptr(address, line) for address in addresses)
            store = builder.store(builder.load(start, align=1), to, align=LINE)
            one = ir.Constant(ir.IntType(32), 1)
            store.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return nothing

        return void(int64, int64), generate

    @intrinsic
    def fence(_: object) -> tuple[object, object]:
        def generate(_: object, builder: ir.IRBuilder, *__: object) -> ir.Value:
            builder.fence("seq_cst")
            return nothing

        return void(), generate

    @numba.njit(nogil=True)
    def copy(source: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        size = out.shape[1]
        for number in range(len(rows)):
            row, target = source[rows[number]], out[number]
            start, to = np.int64(row.ctypes.data), np.int64(target.ctypes.data)
            head = min(-to % LINE, size)  # up to the first whole line of the target
            tail = size - (size - head) % LINE
            target[:head] = row[:head]
            for position in range(head, tail, LINE):
                move_line(to + position, start + position)  # type: ignore[call-arg]
            target[tail:] = row[tail:]
        fence()  # type: ignore[call-arg]  # now other threads see the non-temporal stores

    return copy
