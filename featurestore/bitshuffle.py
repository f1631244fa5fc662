"""Checks before HDF5's Bitshuffle filter decodes a chunk.

The filter trusts the sizes in a chunk: a wrong one makes it read and write outside its memory.
Fletcher32 detects damage, but whoever makes a file can make its checksum too.

A frame is: bytes after decoding (uint64), bytes of a block (uint32), then for each block its
packed bytes (uint32) and these bytes, all big-endian; up to 7 values that fill no group of 8
follow as they are. Fletcher32 appends 4 bytes.
"""

from __future__ import annotations

import math
import struct

import h5py

BITSHUFFLE = 32008  # the filter's number
BLOCK_BYTES = 8192  # before packing
LARGEST_RATIO = 2048  # of bytes before and after packing: a block takes 5 bytes or more
CODECS = {"lz4": 2, "zstd": 3}
HEADER, LENGTH, CHECKSUM = struct.Struct(">QI"), struct.Struct(">I"), 4


def check_filters(dataset: h5py.Dataset, codec: str) -> None:
    """Refuse a dataset that is not in chunks of one row through Bitshuffle and Fletcher32.

    Raises
    ------
    ValueError
        When chunks or filters differ from the format's.
    """
    storage = dataset.id.get_create_plist()
    filters = [storage.get_filter(number) for number in range(storage.get_nfilters())]
    numbers = [number for number, *_ in filters]
    if dataset.chunks != (1, *dataset.shape[1:]):
        raise ValueError(f"{dataset.name!r} has chunks of {dataset.chunks}, not of one sample")
    if numbers != [BITSHUFFLE, h5py.h5z.FILTER_FLETCHER32]:
        raise ValueError(f"{dataset.name!r} has the filters {numbers}, not those of {codec}")
    options, expected = filters[0][2][2:5], (dataset.dtype.itemsize, 0, CODECS[codec])
    if options != expected:
        raise ValueError(f"{dataset.name!r} is packed with the options {options}, not {expected}")


def check_frame(dataset: h5py.Dataset, row: int) -> None:
    """Refuse a chunk whose sizes do not add up; :func:`check_filters` has passed.

    Raises
    ------
    ValueError, OSError
        When the chunk is missing, skips a filter, or has a wrong size.
    """
    place = (row, *[0] * (dataset.ndim - 1))
    chunk = dataset.id.get_chunk_info_by_coord(place)
    if chunk.byte_offset is None or chunk.filter_mask:
        raise ValueError("the chunk is missing or skips a filter")
    if chunk.byte_offset + chunk.size > dataset.file.id.get_filesize():
        raise ValueError("the chunk is larger than the file")
    frame = dataset.id.read_direct_chunk(place)[1]
    width, count = dataset.dtype.itemsize, math.prod(dataset.shape[1:])
    if len(frame) < HEADER.size or HEADER.unpack_from(frame) != (count * width, BLOCK_BYTES):
        raise ValueError("the chunk has a wrong header")
    blocks = -(-(count - count % 8) * width // BLOCK_BYTES)
    end, start = len(frame) - CHECKSUM - count % 8 * width, HEADER.size
    for _ in range(blocks):
        if start + LENGTH.size > end:
            break
        start += LENGTH.size + LENGTH.unpack_from(frame, start)[0]
    if start != end:
        raise ValueError("the chunk's blocks do not fill it")
