"""Masks of any values or colours, as class indices."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from featurestore import VOID
from stages.common.errors import DataError
from stages.data.images import opened, read_bytes
from stages.data.manifest import Classes, Pair
from stages.data.masks import (
    ONE_CHANNEL,
    TRANSPARENT,
    first_pixel,
    index_values,
    mark_transparent,
    mask_pixels,
    transparent_pixel,
)

VOID_COLOUR = (224, 224, 192)  # as in Pascal VOC's masks


def is_coloured(path: Path) -> bool:
    """Whether a mask has several channels, by its header.

    Raises
    ------
    DataError
        When the file is missing, or is no image.
    """
    with opened(read_bytes(path, "mask"), path, "mask") as image:
        return image.mode not in ONE_CHANNEL


def read_values(path: Path) -> np.ndarray:
    """Read a mask of one channel as (H, W) integers.

    Raises
    ------
    DataError
        When it cannot be read, or holds colours.
    """
    return index_values(read_bytes(path, "mask"), path)


def read_colours(path: Path) -> np.ndarray:
    """Read a mask of colours as (H, W) numbers ``red + 256 green + 65536 blue``.

    Transparent pixels have the number ``TRANSPARENT``.

    Raises
    ------
    DataError
        When it cannot be read, or holds one channel.
    """
    mode, pixels, transparent = mask_pixels(read_bytes(path, "mask"), path)
    if mode not in ("RGB", "RGBA"):
        raise DataError(
            path,
            f"the mask has mode {mode}, expected colours (mode RGB)",
            expected="RGB",
            actual=mode,
        )
    # (H, W, 3) -> (H, W)
    numbers = pixels.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    return mark_transparent(numbers, transparent)


def colour_number(colour: tuple[int, int, int]) -> int:
    """Return the number that :func:`read_colours` gives a colour."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]


def grey_values(colours: np.ndarray) -> np.ndarray | None:
    """Return the grey (H, W) of numbers whose red, green and blue are equal; None for colours."""
    grey = np.where(colours == TRANSPARENT, TRANSPARENT, colours & 255)
    equal = (colours == TRANSPARENT) | (colours == grey * colour_number((1, 1, 1)))
    return grey if equal.all() else None


def name_colour(number: int) -> str:
    """Write the colour of a number for an error message."""
    return f"colour ({number & 255}, {number >> 8 & 255}, {number >> 16})"


@dataclass(frozen=True)
class Relabel:
    """Convert masks from a data set's values to class indices.

    Attributes
    ----------
    table
        Class index, or 255 for void, by value.
    remedy
        End of the error message for a value that is not in the table: what is wrong, what to do.
    name
        Writes a value for the error message.
    read
        :func:`read_values` or :func:`read_colours`.
    """

    table: Mapping[int, int]
    remedy: str
    name: Callable[[int], str] = "mask value {}".format
    read: Callable[[Path], np.ndarray] = read_values

    def __call__(self, pair: Pair) -> np.ndarray:
        """Read a pair's mask as (H, W) uint8 class indices.

        Raises
        ------
        DataError
            When the mask cannot be read, or a value is not in the table; the error names the first
            pixel that has it.
        """
        return self.indices(self.read(pair.mask), pair)

    def indices(self, values: np.ndarray, pair: Pair) -> np.ndarray:
        """Convert values (H, W) of a pair's mask, as :meth:`__call__` does."""
        known = np.array(sorted(self.table), np.int64)
        indices = np.array([self.table[value] for value in known.tolist()], np.uint8)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)  # (H, W)
        unknown = known[place] != values
        if unknown.any():
            row, column = first_pixel(unknown)
            value = int(values[row, column])
            if value == TRANSPARENT:
                raise transparent_pixel(pair.mask, values)
            raise DataError(
                pair.mask,
                f"{self.name(value)} in row {row}, column {column} (from 0) {self.remedy}",
                expected=f"one of {len(known)} known ones",
                actual=value,
            )
        return indices[place]


def encode_indices(mask: np.ndarray, classes: Classes) -> bytes:
    """Encode a mask as a PNG of class indices with the classes' colours as its palette.

    Parameters
    ----------
    mask
        (H, W) uint8 class indices, 255 for void.
    classes
        Colours, and the value that stands for void in the file.
    """
    palette = np.zeros((256, 3), np.uint8)  # with fewer entries Pillow writes fewer bits a pixel
    palette[: len(classes.palette)] = classes.palette
    palette[classes.void_index] = VOID_COLOUR
    image = Image.fromarray(np.where(mask == VOID, np.uint8(classes.void_index), mask)).convert("P")
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
