"""Copying rows of an array into a batch, past the processor's caches where the batch would not stay in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

LARGE = (
    8 << 20
)  # bytes; several batches of this size, which a loader keeps in flight, fill a last-level cache
LINE = 64  # bytes of a cache line, and of the widest store instruction


def take_rows(source: np.ndarray, rows: np.ndarray, out: np.ndarray, *, past_caches: bool) -> None:
    """``out[i] = source[rows[i]]``, without Python's lock.

    An ordinary store first reads the line that it overwrites. One that goes past the caches (a non-temporal store) does
    not, so that a large copy moves two thirds of the bytes over the memory bus, which is what it waits for.

    Parameters
    ----------
    source
        (N, ...), contiguous.
    rows
        (B,) int64, each in 0..N-1.
    out
        (B, ...) of the same row, contiguous, writable.
    past_caches
        Whether the batch is too large to be read from the caches afterwards.

    Raises
    ------
    ValueError, TypeError
        When ``out`` cannot take the rows as they are.
    """
    if not past_caches:
        np.take(
            source, rows, axis=0, out=out, mode="clip"
        )  # rows are inside; "raise" would copy twice
        return
    expected = (len(rows), *source.shape[1:])
    if not (source.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("source and out must be contiguous, and out writable")
    if out.shape != expected or out.dtype != source.dtype:
        raise ValueError(
            f"out is {out.dtype} {out.shape}, but the rows are {source.dtype} {expected}"
        )
    _kernel()(source.ctypes.data, rows, out.ctypes.data, out.nbytes // len(rows))


@functools.cache
def _kernel() -> Callable[..., Any]:
    """The copying loop, compiled on first use."""
    import numba
    from llvmlite import ir
    from numba.core.types import uintp, void
    from numba.extending import intrinsic

    def mover(width: int, *, past_caches: bool) -> Any:
        """A function that moves ``width`` bytes from one address to another, as one instruction where the machine has it."""

        @intrinsic
        def move(_: Any, target: Any, source: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                kind = ir.VectorType(ir.IntType(8), width)
                to, frm = (builder.inttoptr(address, kind.as_pointer()) for address in arguments)
                stored = builder.store(
                    builder.load(frm, align=1), to, align=width if past_caches else 1
                )
                if past_caches:
                    stored.set_metadata(
                        "nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                    )
                return context.get_dummy_value()

            return void(uintp, uintp), generate

        return move

    @intrinsic
    def finish(_: Any) -> Any:
        """Stores past the caches are seen by other threads only after a fence."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return void(), generate

    move_line, move_byte = mover(LINE, past_caches=True), mover(1, past_caches=False)

    @numba.njit(void(uintp, numba.int64[:], uintp, uintp), nogil=True)
    def copy(source: int, rows: np.ndarray, target: int, size: int) -> None:
        for number in range(len(rows)):
            frm, to = source + uintp(rows[number]) * size, target + uintp(number) * size
            end = to + size
            while to < end and to % uintp(LINE):  # up to the first whole line of the target
                move_byte(to, frm)
                to, frm = to + uintp(1), frm + uintp(1)
            for _ in range((end - to) // uintp(LINE)):
                move_line(to, frm)
                to, frm = to + uintp(LINE), frm + uintp(LINE)
            while to < end:
                move_byte(to, frm)
                to, frm = to + uintp(1), frm + uintp(1)
        finish()  # type: ignore[call-arg]

    return copy
