"""Masks: files of class indices or colours, decoded with exact errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags

from featurestore import VOID
from stages.common.errors import DataError
from stages.data.images import UPRIGHT, check_frames, opened, too_deep

# Modes of index masks: one channel, or one channel beside transparency.
ONE_CHANNEL = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L", "LA", "PA")
ALPHA = ("LA", "PA", "RGBA")
TRANSPARENT = 1 << 32  # value of a transparent pixel; no index and no colour has it
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


def mask_pixels(content: bytes, path: Path) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Decode a mask file as it is stored.

    Returns
    -------
    mode
        Pillow's mode, such as ``P``.
    pixels
        (H, W) values, or (H, W, channels) without alpha.
    transparent
        (H, W) bool, alpha of 0; None where the file has no alpha.

    Raises
    ------
    DataError
        When the bytes are not one whole image; when the format may have changed values (JPEG,
        floats, half transparent pixels), or says that the mask be turned.
    """
    with opened(content, path, "mask") as image:
        check_frames(image, path, "mask")
        compressed = str(image.info.get("compression", "")).upper()
        if image.format in LOSSY or compressed in LOSSY:
            kind = image.format if image.format in LOSSY else f"{image.format} ({compressed})"
            raise DataError(
                path,
                f"the mask is a {kind} file, whose compression changes values; "
                "export it anew as PNG, because a conversion keeps the false values",
                expected="PNG",
                actual=kind,
            )
        deep = image.mode == "F" or (image.mode not in ONE_CHANNEL and too_deep(image))
        if deep:
            kind = "32-bit floats" if image.mode == "F" else "colours of 16 bits a channel"
            raise DataError(
                path,
                f"the mask holds {kind}, expected class indices; save it with 8-bit integers",
                expected="P or L",
                actual=image.mode,
            )
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        if turn in UPRIGHT:
            raise DataError(
                path,
                f"the mask has an EXIF orientation of its own ({turn}), which tools read "
                "differently; save it turned, without the tag",
                expected=1,
                actual=turn,
            )
        image.load()
        mode, pixels = image.mode, np.asarray(image)
    if mode not in ALPHA:
        return mode, pixels, None
    alpha = pixels[..., -1]
    if (half := (alpha > 0) & (alpha < 255)).any():
        row, column = first_pixel(half)
        raise DataError(
            path,
            f"the pixel in row {row}, column {column} (from 0) is half transparent, which is no "
            "class; save the mask without antialiasing and transparency",
        )
    channels = pixels[..., :-1]
    return mode, channels[..., 0] if channels.shape[-1] == 1 else channels, alpha == 0


def first_pixel(where: np.ndarray) -> tuple[int, int]:
    """Return row and column of the first True pixel of (H, W), line by line."""
    row, column = divmod(int(where.argmax()), where.shape[1])
    return row, column


def index_values(content: bytes, path: Path) -> np.ndarray:
    """Decode a mask of one channel as (H, W) integers, whatever its values.

    Colours with equal red, green and blue are read as one channel. Transparent pixels have the
    value ``TRANSPARENT``.

    Raises
    ------
    DataError
        When the mask cannot be read (:func:`mask_pixels`), or holds colours.
    """
    mode, values, transparent = mask_pixels(content, path)
    if mode in ("RGB", "RGBA") and (values == values[..., :1]).all():
        values = values[..., 0]
    elif mode not in ONE_CHANNEL:
        raise DataError(
            path,
            f"the mask has mode {mode} (colours), expected one channel of class indices "
            "(mode P or L); convert it",
            expected="P or L",
            actual=mode,
        )
    return mark_transparent(values, transparent)


def mark_transparent(values: np.ndarray, transparent: np.ndarray | None) -> np.ndarray:
    """Give transparent pixels (H, W) the value ``TRANSPARENT``; without any, values are kept."""
    if transparent is None or not transparent.any():
        return values
    return np.where(transparent, np.int64(TRANSPARENT), values)


def decode_mask(content: bytes, path: Path, *, num_classes: int, void_index: int) -> np.ndarray:
    """Decode a mask of class indices.

    Parameters
    ----------
    content
        Bytes of the file.
    path
        For error messages.
    num_classes
        Number of classes; values from 0 to one less are allowed.
    void_index
        Value of pixels without a label in the file, 1..255; it becomes 255.

    Returns
    -------
    (H, W) uint8

    Raises
    ------
    DataError
        When the mask cannot be read, holds colours instead of indices, or a value that is neither
        a class nor void.
    """
    mask = index_values(content, path)
    eight_bits = mask.dtype == np.uint8
    # Counting is faster than sorting.
    values = np.bincount(mask.reshape(-1)).nonzero()[0] if eight_bits else np.unique(mask)
    unknown = values[((values < 0) | (values >= num_classes)) & (values != void_index)]
    if TRANSPARENT in unknown:
        raise transparent_pixel(path, mask)
    if unknown.size:
        raise DataError(
            path,
            f"mask value {int(unknown[0])} is no class (0 to {num_classes - 1}) and not void "
            f"({void_index}); correct the mask or the class list",
            expected=num_classes,
            actual=int(unknown[0]),
        )
    if eight_bits and void_index == VOID:
        return mask
    return np.where(mask == void_index, VOID, mask).astype(np.uint8)


def transparent_pixel(path: Path, values: np.ndarray) -> DataError:
    """Return the error for a mask (H, W) in which ``TRANSPARENT`` is no class."""
    row, column = first_pixel(values == TRANSPARENT)
    return DataError(
        path,
        f"the pixel in row {row}, column {column} (from 0) is transparent, which is no class; "
        "save the mask without transparency, or set prepare.transparent to void (dataset folder)",
    )
