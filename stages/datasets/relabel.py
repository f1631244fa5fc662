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
from stages.data.images import ONE_CHANNEL, index_values, read_bytes, readable
from stages.data.manifest import Classes, Pair

VOID_COLOUR = (224, 224, 192)  # as in Pascal VOC's masks


def is_coloured(path: Path) -> bool:
    """Whether a mask has several channels, by its header; False for a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.mode not in ONE_CHANNEL
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


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

    Raises
    ------
    DataError
        When it cannot be read, holds one channel, or has a transparent pixel.
    """
    content = read_bytes(path, "mask")
    with readable(path, "mask"), Image.open(io.BytesIO(content)) as image:
        image.load()
        mode, pixels = image.mode, np.asarray(image)
    if mode not in ("RGB", "RGBA"):
        raise DataError(
            path,
            f"the mask has mode {mode}, expected colours (mode RGB)",
            expected="RGB",
            actual=mode,
        )
    if mode == "RGBA" and (pixels[..., 3] < 255).any():
        row, column = _first(pixels[..., 3] < 255)
        raise DataError(
            path,
            f"the pixel in row {row}, column {column} (from 0) is transparent, which is no class; "
            "save the mask without transparency",
        )
    # (H, W, 3) -> (H, W)
    return pixels[..., :3].astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def colour_number(colour: tuple[int, int, int]) -> int:
    """Return the number that :func:`read_colours` gives a colour."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]


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
        values = self.read(pair.mask)
        known = np.array(sorted(self.table), np.int64)
        indices = np.array([self.table[value] for value in known.tolist()], np.uint8)
        place = np.searchsorted(known, values).clip(max=len(known) - 1)  # (H, W)
        unknown = known[place] != values
        if unknown.any():
            row, column = _first(unknown)
            value = int(values[row, column])
            raise DataError(
                pair.mask,
                f"{self.name(value)} in row {row}, column {column} (from 0) {self.remedy}",
                expected=f"one of {len(known)} known ones",
                actual=value,
            )
        return indices[place]


def write_indices(path: Path, mask: np.ndarray, classes: Classes) -> None:
    """Write a mask as a PNG of class indices with the classes' colours as its palette.

    Parameters
    ----------
    path
        The new file.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def _first(where: np.ndarray) -> tuple[int, int]:
    """Return row and column of the first True pixel, line by line."""
    row, column = divmod(int(where.argmax()), where.shape[1])
    return row, column
