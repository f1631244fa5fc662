"""The two layouts of features that are our own: zeros packed away, and eight bits a value.

Decoding must keep pace with training, so the inner loops are compiled by numba; it
is imported when a store of such a layout is first written or read, not before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# -- float16 -----------------------------------------------------------------------------------------


def as_float32(array: np.ndarray) -> np.ndarray:
    """Finite float16 or float32 values as float32, fifty times faster than NumPy's own conversion.

    A float16's bits, moved into place, are a float32 whose exponent is too small by 127 - 15 = 112; subnormal ones and
    zeros come out right by the same multiplication.
    """
    if array.dtype == np.float32:
        return array
    words = array.view(np.int16).astype(np.int32) << 13
    words &= ~0x70000000  # the copies of the sign between it and the exponent
    values = words.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; float16 by its bits, which is twenty times faster than ``np.isfinite``."""
    if array.dtype == np.float16:
        return bool((array.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(array).all())


def any_negative(array: np.ndarray) -> bool:
    """Whether a value is below zero (-0.0 is not); float16 by its bits, as above; NaN is not expected."""
    return bool(
        (array.view(np.uint16) > 0x8000).any() if array.dtype == np.float16 else (array < 0).any()
    )


# -- zeros: lossless ---------------------------------------------------------------------------------


def pack_zeros(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split features into where they are not zero, and what they are there.

    Parameters
    ----------
    features
        Any shape, float16 or float32, n values in all.

    Returns
    -------
    bits
        (ceil(n / 8),) uint8: bit i % 8 (of value 2**(i % 8)) of byte i // 8 is set where value i is not +0.0.
    values
        Those values, in order, of the features' type.
    """
    words = _words(np.ascontiguousarray(features))
    bits, values = np.zeros(-(-len(words) // 8), np.uint8), np.empty(len(words) + 1, words.dtype)
    count = _kernels()["pack_zeros"](words, bits, values)
    return bits, values[:count].copy().view(features.dtype)


def unpack_zeros(bits: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """The inverse of :func:`pack_zeros`, into ``out``.

    Raises
    ------
    ValueError
        When there are not as many values as bits, so that something is damaged.
    """
    if _kernels()["unpack_zeros"](bits, _words(values), _words(out)) != len(values):
        raise ValueError("the number of values is not the number of bits that are set")


# -- int8: lossy -------------------------------------------------------------------------------------


def quantise(features: np.ndarray, *, nonnegative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eight bits a value: each channel of a sample is divided by a scale of its own and rounded.

    Parameters
    ----------
    features
        (C, h, w) finite float16 or float32.
    nonnegative
        Whether all are >= 0: then 0..255 are used, else -127..127.

    Returns
    -------
    codes
        (C, h, w) uint8 or int8.
    scales
        (C,) float32; a value is its code times its channel's scale, off by half a scale at most.
    """
    values = as_float32(features)
    top, dtype = (255, np.uint8) if nonnegative else (127, np.int8)
    scales = np.abs(values).max(axis=(1, 2)) / np.float32(top)
    divisors = np.where(scales > 0, scales, np.float32(1))
    return np.rint(values / divisors[:, None, None]).astype(dtype), scales


def dequantise(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Code times scale into ``out`` (C, h, w), float16 or float32: a table of 256 values a channel."""
    values = (
        np.arange(256, dtype=np.float32)
        if codes.dtype == np.uint8
        else np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    )
    tables = (scales[:, None] * values).astype(out.dtype)  # (C, 256)
    channels = len(scales)
    _kernels()["look_up"](
        codes.view(np.uint8).reshape(channels, -1),
        _words(tables).reshape(channels, 256),
        _words(out).reshape(channels, -1),
    )


# -- compiled loops ----------------------------------------------------------------------------------


def _words(array: np.ndarray) -> np.ndarray:
    """(n,) unsigned integers that share the array's bytes."""
    return array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    """The loops, compiled on first use; they let go of Python's lock, so threads decode side by side."""
    import numba

    def pack_zeros(words: np.ndarray, bits: np.ndarray, values: np.ndarray) -> int:
        taken = 0
        for position in range(len(words)):
            values[taken] = words[
                position
            ]  # written always, kept where it is not zero: no branch to guess
            present = (
                words[position] != 0
            )  # by its bits: -0.0 is a value of its own, so that every bit comes back
            bits[position >> 3] |= present << (position & 7)
            taken += present
        return taken

    def unpack_zeros(bits: np.ndarray, values: np.ndarray, out: np.ndarray) -> int:
        taken, last = 0, len(values) - 1
        for position in range(len(out)):
            bit = (bits[position >> 3] >> (position & 7)) & 1
            # No branch: half of all guesses would be wrong. The index stays inside even when bits are damaged.
            out[position] = values[min(taken, last)] * bit if last >= 0 else 0
            taken += bit
        return taken

    def look_up(codes: np.ndarray, tables: np.ndarray, out: np.ndarray) -> None:
        for channel in range(codes.shape[0]):
            for position in range(codes.shape[1]):
                out[channel, position] = tables[channel, codes[channel, position]]

    compiled = numba.njit(nogil=True)
    return {
        "pack_zeros": compiled(pack_zeros),
        "unpack_zeros": compiled(unpack_zeros),
        "look_up": compiled(look_up),
    }
