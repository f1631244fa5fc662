"""Images and masks: decoding with exact errors, and the resize rules."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from featurestore import VOID
from stages.common.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
ONE_CHANNEL = ("P", "L", "1", "I;16", "I")  # modes of index masks
UPRIGHT = {  # what turns an image of this EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_bytes(path: Path, what: str) -> bytes:
    """Read a file.

    Parameters
    ----------
    path
        The file.
    what
        Its kind, such as ``image``, for the error message.

    Raises
    ------
    DataError
        When it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            path,
            f"this {what} is missing; add it, or take its id off the list",
        ) from None
    except OSError as error:
        raise DataError(path, f"this {what} cannot be read ({error.strerror})") from error


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Report any failure to decode a file (an image, a mask) as a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        raise DataError(
            path,
            f"not a readable {what}, or a truncated one ({error}); replace it",
        ) from error


def decode_image(content: bytes, path: Path) -> Image.Image:
    """Decode an image to RGB, turned as its EXIF tag says.

    Parameters
    ----------
    content
        Bytes of the file.
    path
        For error messages.

    Raises
    ------
    DataError
        When the bytes are not a whole image, or it has more than 8 bits a channel.
    """
    with readable(path, "image"), Image.open(io.BytesIO(content)) as file:
        file.load()
        if depth := too_deep(file):
            raise DataError(path, f"this image {depth}", expected="RGB or L", actual=file.mode)
        return upright(file)


def too_deep(image: Image.Image) -> str:
    """Say what is wrong with 16 or 32 bits a channel, which RGB would cut off; empty for 8 bits.

    Only the owner of the image knows which of its values are black and white.
    """
    if not image.mode.startswith(("I", "F")):
        return ""
    return (
        f"has more than 8 bits a channel (mode {image.mode}); "
        "convert it to 8 bits, black at 0 and white at 255"
    )


def upright(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB, turned as its EXIF tag says.

    Pillow's ``exif_transpose`` is not used: it writes all tags anew, which fails for some cameras.
    """
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image = image if turn is None else image.transpose(turn)
    return image if image.mode == "RGB" else image.convert("RGB")


def index_values(content: bytes, path: Path) -> np.ndarray:
    """Decode a mask of one channel as (H, W) integers, whatever its values.

    Raises
    ------
    DataError
        When the bytes are not a whole image, or hold colours.
    """
    with readable(path, "mask"), Image.open(io.BytesIO(content)) as image:
        image.load()
        mode, values = image.mode, np.asarray(image)
    if mode not in ONE_CHANNEL or values.ndim != 2:
        raise DataError(
            path,
            f"the mask has mode {mode} (colours), expected one channel of class indices "
            "(mode P or L); convert it",
            expected="P or L",
            actual=mode,
        )
    return values


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
        When the bytes are not a whole image, hold colours instead of indices, or a value that is
        neither a class nor void.
    """
    mask = index_values(content, path)
    eight_bits = mask.dtype == np.uint8
    # Counting is faster than sorting.
    values = np.bincount(mask.reshape(-1)).nonzero()[0] if eight_bits else np.unique(mask)
    unknown = values[((values < 0) | (values >= num_classes)) & (values != void_index)]
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


def scaled_size(image: tuple[int, int], *, size: tuple[int, int], rule: str) -> tuple[int, int]:
    """Return the (height, width) to which a rule scales an image before it pads or crops it.

    Parameters
    ----------
    image
        (height, width) of the image.
    size
        (H, W) after padding or cropping.
    rule
        ``stretch``, ``pad`` or ``crop``; see :func:`resize_pair`.
    """
    height, width = size
    if rule == "stretch":
        return height, width
    ratios = (height / image[0], width / image[1])
    # Rounding must not exceed the frame (pad), or leave a gap in it (crop).
    ratio, fit = (min(ratios), min) if rule == "pad" else (max(ratios), max)
    return max(1, fit(height, round(image[0] * ratio))), max(1, fit(width, round(image[1] * ratio)))


def fill_up(pixels: np.ndarray, size: tuple[int, int], value: int = 0) -> np.ndarray:
    """Fill (rows, columns, ...) pixels up to (H, W, ...) with a value, below and right."""
    missing = [(0, side - n) for side, n in zip(size, pixels.shape, strict=False)]
    return np.pad(pixels, [*missing, (0, 0)][: pixels.ndim], constant_values=value)


def resize_pair(
    image: Image.Image, mask: np.ndarray, *, size: tuple[int, int], rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image and its mask: bilinear with antialiasing, the mask by nearest neighbour.

    Parameters
    ----------
    image
        RGB image.
    mask
        (height, width) uint8, of the image's size.
    size
        (H, W) of the result.
    rule
        ``stretch`` ignores the aspect ratio. ``pad`` keeps it and fills up with black and void,
        right and below. ``crop`` keeps it, covers (H, W) and cuts the centre out.

    Returns
    -------
    (H, W, 3) uint8, (H, W) uint8
    """
    height, width = size
    rows, columns = scaled_size((image.height, image.width), size=size, rule=rule)
    box = (columns, rows)
    small_image = np.asarray(image.resize(box, Image.Resampling.BILINEAR))
    small_mask = np.asarray(Image.fromarray(mask).resize(box, Image.Resampling.NEAREST))
    if rule == "pad":
        small_image, small_mask = fill_up(small_image, size), fill_up(small_mask, size, VOID)
    elif rule == "crop":
        top, left = (rows - height) // 2, (columns - width) // 2
        centre = np.s_[top : top + height, left : left + width]
        small_image, small_mask = small_image[centre], small_mask[centre]
    return small_image, small_mask
