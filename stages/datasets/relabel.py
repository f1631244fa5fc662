"""Masks of any values or colours, as class indices."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from featurestore import VOID
from stages.common.errors import DataError
from stages.data.images import read_bytes
from stages.data.manifest import Classes

VOID_COLOUR = (224, 224, 192)  # as in Pascal VOC's masks
ONE_CHANNEL = ("P", "L", "1", "I;16", "I")


def open_mask(path: Path) -> Image.Image:
    """A mask's file, whatever its mode.

    Raises
    ------
    DataError
        When it is missing or no whole image.
    """
    content = read_bytes(path, "mask")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise DataError(
            path, f"not a readable mask, or a truncated one ({error}); replace it"
        ) from error
    return image


def is_coloured(path: Path) -> bool:
    """Whether a mask has more than one channel, by its header; files that cannot be read are left to those who read them whole."""
    try:
        with Image.open(path) as image:
            return image.mode not in ONE_CHANNEL
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def read_values(path: Path) -> np.ndarray:
    """A mask of one channel as (H, W) integers.

    Raises
    ------
    DataError
        When it cannot be read, or holds colours.
    """
    image = open_mask(path)
    values = np.asarray(image)
    if values.ndim != 2 or image.mode not in ONE_CHANNEL:
        message = f"the mask has mode {image.mode} (colours), expected one channel of label numbers; take the file as its owners ship it"
        raise DataError(path, message, expected="P or L", actual=image.mode)
    return values


def read_colours(path: Path) -> np.ndarray:
    """A mask of colours as (H, W) numbers ``red + 256 green + 65536 blue``.

    Raises
    ------
    DataError
        When it cannot be read, holds one channel, or is transparent somewhere.
    """
    image = open_mask(path)
    if image.mode not in ("RGB", "RGBA"):
        message = f"the mask has mode {image.mode}, expected colours (mode RGB)"
        raise DataError(path, message, expected="RGB", actual=image.mode)
    pixels = np.asarray(image)
    if image.mode == "RGBA" and (pixels[..., 3] < 255).any():
        row, column = _first(pixels[..., 3] < 255)
        message = f"the pixel in row {row}, column {column} (from 0) is transparent, which is no class; save the mask without transparency"
        raise DataError(path, message)
    return pixels[..., :3].astype(np.int32) @ np.array(
        [1, 256, 65536], np.int32
    )  # (H, W, 3) -> (H, W)


def colour_number(colour: tuple[int, int, int]) -> int:
    """The number by which ``read_colours`` gives a colour."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]


def name_colour(number: int) -> str:
    """The colour of a number, for people."""
    return f"colour ({number & 255}, {number >> 8 & 255}, {number >> 16})"


def relabel(
    values: np.ndarray,
    table: Mapping[int, int],
    path: Path,
    *,
    name: Callable[[int], str],
    remedy: str,
) -> np.ndarray:
    """Class indices for a mask's own values.

    Parameters
    ----------
    values
        (H, W) integers.
    table
        Class index, or 255 for void, by value.
    path, name, remedy
        For the error: the file, how a value is called, and what to do.

    Returns
    -------
    (H, W) uint8

    Raises
    ------
    DataError
        When a value is not in the table; it names the first pixel that has one.
    """
    known = np.array(sorted(table), np.int64)
    indices = np.array([table[value] for value in known.tolist()], np.uint8)
    place = np.searchsorted(known, values).clip(max=len(known) - 1)  # (H, W)
    strange = known[place] != values
    if strange.any():
        row, column = _first(strange)
        found = int(values[row, column])
        message = f"{name(found)} in row {row}, column {column} (from 0) {remedy}"
        raise DataError(path, message, expected=f"one of {len(known)} known ones", actual=found)
    return indices[place]


def _first(where: np.ndarray) -> tuple[int, int]:
    """Row and column of the first pixel that is True, line by line."""
    row, column = divmod(int(where.argmax()), where.shape[1])
    return row, column


def write_indices(path: Path, mask: np.ndarray, classes: Classes) -> None:
    """Write a mask (H, W) uint8, 255 for void, as a PNG of indices with the classes' colours as its palette."""
    palette = np.zeros(
        (256, 3), np.uint8
    )  # whole: with fewer entries Pillow would write fewer bits a pixel
    palette[: len(classes.palette)] = classes.palette
    palette[classes.void_index] = VOID_COLOUR
    image = Image.fromarray(np.where(mask == VOID, np.uint8(classes.void_index), mask)).convert("P")
    image.putpalette(palette.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
