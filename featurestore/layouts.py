"""Layouts of a shard: how each value of ``compression`` stores a sample's features.

Decoding must keep pace with training, so numba compiles the inner loops. It is imported when
a store of such a layout is first written or read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import h5py
import numpy as np
from typing_extensions import override

from featurestore.bitshuffle import LARGEST_RATIO, check_frame
from featurestore.float16 import as_float32

FEATURES, MASKS, IMAGES = "features", "masks", "images"
BITS, VALUES, STARTS = "feature_bits", "feature_values", "feature_starts"  # of ``zeros``
SCALES = "feature_scales"  # of ``int8``

Rows: TypeAlias = dict[str, tuple[tuple[int, ...], str]]  # shape and type by dataset name


@dataclass(frozen=True)
class Layout:
    """``none``: features as they are, contiguous, read in place from a memory map.

    Base class of the other layouts, which override what they do differently.

    Parameters
    ----------
    shape
        (C, h, w) of a sample's features.
    dtype
        ``float16`` or ``float32``.
    nonnegative
        Whether all features are >= 0.

    Attributes
    ----------
    in_place
        Names of the datasets that are read from the memory map as they are.
    mapped
        Whether the file is mapped; otherwise its datasets are read through h5py.
    largest_ratio
        Largest number of sample bytes per file byte; 1: :attr:`sample_bytes` is exact.
    """

    shape: tuple[int, int, int]
    dtype: str
    nonnegative: bool

    in_place: ClassVar[tuple[str, ...]] = (FEATURES, MASKS, IMAGES)
    mapped: ClassVar[bool] = True
    largest_ratio: ClassVar[int] = 1

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's features; where they are packed, before packing."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def rows(self) -> Rows:
        """Shape and type of a sample's row in each dataset of features, in the file's order."""
        return {FEATURES: (self.shape, self.dtype)}

    def storage_options(self, shape: tuple[int, ...]) -> dict[str, object]:
        """Return h5py's ``create_dataset`` options for rows of a shape."""
        return {}

    def expected_datasets(self, mapped: Callable[[str], np.ndarray], count: int) -> Rows:
        """Return shape and type of each dataset of features in a shard of ``count`` samples.

        ``mapped`` returns a contiguous dataset of the shard.
        """
        return {name: ((count, *shape), dtype) for name, (shape, dtype) in self.rows.items()}

    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Return a sample's row in each dataset of features."""
        return {FEATURES: features}

    def decode(
        self, arrays: Mapping[str, h5py.Dataset], name: str, row: int, out: np.ndarray
    ) -> None:
        """Read a row of a dataset that is not read in place.

        Parameters
        ----------
        arrays
            The shard's datasets by name: arrays in the memory map, or h5py's.
        name
            ``features``, ``masks`` or ``images``.
        row
            Number of the sample in the shard.
        out
            Contiguous array of the row's shape and type that receives the values.

        Raises
        ------
        ValueError, OSError
            When the row is damaged.
        """
        arrays[name].read_direct(out, np.s_[row])


class PackedZeros(Layout):
    """``zeros``: a bit for each value says whether it is zero; nonzero values follow. Lossless.

    ``feature_bits`` (N, ceil(C·h·w / 8)) uint8: bit i % 8 (of value 2**(i % 8)) of byte i // 8 is
    set where value i is not +0.0. ``feature_values`` holds the values of all samples with set
    bits, in order; those of sample n start at ``feature_starts[n]``.
    """

    in_place = (MASKS, IMAGES)
    largest_ratio = 32  # a bit for a value of 4 bytes

    @property
    @override
    def rows(self) -> Rows:
        return {BITS: ((-(-math.prod(self.shape) // 8),), "uint8")}

    @override
    def expected_datasets(self, mapped: Callable[[str], np.ndarray], count: int) -> Rows:
        total = int(mapped(STARTS)[-1])
        packed: Rows = {STARTS: ((count + 1,), "int64"), VALUES: ((total,), self.dtype)}
        return super().expected_datasets(mapped, count) | packed

    @override
    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        words = _words(np.ascontiguousarray(features))
        bits, values = (
            np.zeros(-(-len(words) // 8), np.uint8),
            np.empty(len(words) + 1, words.dtype),
        )
        count = _kernels()["pack_zeros"](words, bits, values)
        return {BITS: bits, VALUES: values[:count].copy().view(features.dtype)}

    @override
    def decode(
        self, arrays: Mapping[str, h5py.Dataset], name: str, row: int, out: np.ndarray
    ) -> None:
        start, end = arrays[STARTS][row : row + 2]
        values = _words(arrays[VALUES][start:end])
        if _kernels()["unpack_zeros"](arrays[BITS][row], values, _words(out)) != len(values):
            raise ValueError("the number of values is not the number of set bits")


class Lz4(Layout):
    """``lz4``: every dataset in bit-shuffled, compressed chunks of one sample. Lossless."""

    codec: ClassVar[Literal["lz4", "zstd"]] = "lz4"
    in_place = ()
    mapped = False
    largest_ratio = LARGEST_RATIO

    @override
    def storage_options(self, shape: tuple[int, ...]) -> dict[str, object]:
        import hdf5plugin

        compression = hdf5plugin.Bitshuffle(cname=self.codec)
        return {"chunks": (1, *shape), "compression": compression, "fletcher32": True}

    @override
    def expected_datasets(self, mapped: Callable[[str], np.ndarray], count: int) -> Rows:
        import hdf5plugin  # noqa: F401  (registers the filter with HDF5)

        return super().expected_datasets(mapped, count)

    @override
    def decode(
        self, arrays: Mapping[str, h5py.Dataset], name: str, row: int, out: np.ndarray
    ) -> None:
        check_frame(arrays[name], row)
        super().decode(arrays, name, row, out)


class Zstd(Lz4):
    """``zstd``: like ``lz4``, with another codec: smaller files, slower to read."""

    codec = "zstd"


class Int8(Layout):
    """``int8``: each channel of a sample is divided by its scale and rounded to 8 bits. Lossy.

    ``features`` (N, C, h, w) holds the codes: uint8 where all features are >= 0, else int8 in
    -127..127. ``feature_scales`` (N, C) float32: a value is its code times its channel's scale,
    with an error of half a scale at most.
    """

    in_place = (MASKS, IMAGES)

    @property
    @override
    def sample_bytes(self) -> int:
        return math.prod(self.shape) + 4 * self.shape[0]  # codes and scales

    @property
    @override
    def rows(self) -> Rows:
        codes = "uint8" if self.nonnegative else "int8"
        return {FEATURES: (self.shape, codes), SCALES: (self.shape[:1], "float32")}

    @override
    def encode(self, features: np.ndarray) -> dict[str, np.ndarray]:
        values = as_float32(features)
        top, dtype = (255, np.uint8) if self.nonnegative else (127, np.int8)
        scales = np.abs(values).max(axis=(1, 2)) / np.float32(top)
        divisors = np.where(scales > 0, scales, np.float32(1))
        codes = np.rint(values / divisors[:, None, None]).astype(dtype)
        return {FEATURES: codes, SCALES: scales}

    @override
    def decode(
        self, arrays: Mapping[str, h5py.Dataset], name: str, row: int, out: np.ndarray
    ) -> None:
        codes, scales = arrays[FEATURES][row], arrays[SCALES][row]
        every_code = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)
        tables = (scales[:, None] * every_code).astype(out.dtype)  # (C, 256)
        channels = len(scales)
        _kernels()["look_up"](
            codes.view(np.uint8).reshape(channels, -1),
            _words(tables).reshape(channels, 256),
            _words(out).reshape(channels, -1),
        )


LAYOUTS: dict[str, type[Layout]] = {
    "none": Layout,
    "zeros": PackedZeros,
    "lz4": Lz4,
    "zstd": Zstd,
    "int8": Int8,
}


def _words(array: np.ndarray) -> np.ndarray:
    """View an array as (n,) unsigned integers that share its bytes."""
    return array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))


@functools.cache
def _kernels() -> dict[str, Callable[..., int]]:
    """Compile the loops on first use; they release Python's lock, so that threads run at once."""
    import numba

    def pack_zeros(words: np.ndarray, bits: np.ndarray, values: np.ndarray) -> int:
        taken = 0
        for position in range(len(words)):
            # Always written, kept only where not zero: no branch that the processor must predict.
            values[taken] = words[position]
            present = words[position] != 0  # compares bits: -0.0 is kept, so packing is exact
            bits[position >> 3] |= present << (position & 7)
            taken += present
        return taken

    def unpack_zeros(bits: np.ndarray, values: np.ndarray, out: np.ndarray) -> int:
        taken, last = 0, len(values) - 1
        for position in range(len(out)):
            bit = (bits[position >> 3] >> (position & 7)) & 1
            # No branch to predict. The index stays inside ``values`` even when bits are damaged.
            out[position] = values[min(taken, last)] * bit if last >= 0 else 0
            taken += bit
        return taken

    def look_up(codes: np.ndarray, tables: np.ndarray, out: np.ndarray) -> int:
        for channel in range(codes.shape[0]):
            for position in range(codes.shape[1]):
                out[channel, position] = tables[channel, codes[channel, position]]
        return codes.size

    return {
        kernel.__name__: numba.njit(nogil=True)(kernel)
        for kernel in (pack_zeros, unpack_zeros, look_up)
    }
