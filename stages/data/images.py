"""Images and masks: decoding with exact errors, and the resize rules."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from featurestore import VOID
from stages.common.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
UPRIGHT = {  # what turns a image of this EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")


def read_bytes(path: Path, what: str) -> bytes:
    """A file's bytes.

    Raises
    ------
    DataError
        When it is missing or cannot be read; ``what`` says what it was to be.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            path, f"this {what} is missing; add it, or take its id off the list"
        ) from None
    except OSError as error:
        raise DataError(path, f"this {what} cannot be read ({error.strerror})") from error


def decode_image(content: bytes, path: Path) -> Image.Image:
    """A image in RGB, turned as its EXIF tag says.

    Raises
    ------
    DataError
        When the bytes are no whole image, or one of more than 8 bits a channel.
    """
    try:
        with Image.open(io.BytesIO(content)) as file:
            file.load()
            if depth := too_deep(file):
                raise DataError(path, f"this image {depth}", expected="RGB or L", actual=file.mode)
            return upright(file)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many kinds, and the file's name is what is needed
        raise DataError(
            path, f"not a readable image, or a truncated one ({error}); replace it"
        ) from error


def too_deep(image: Image.Image) -> str:
    """What is wrong with pixels of 16 or 32 bits, which RGB of 8 bits would cut off; empty for others.

    Which of their values are black and white, their owner alone knows.
    """
    if not image.mode.startswith(("I", "F")):
        return ""
    return f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits, black at 0 and white at 255"


def upright(image: Image.Image) -> Image.Image:
    """An opened image in RGB, turned as its EXIF tag says.

    Not by Pillow's ``exif_transpose``: it writes all tags anew, and fails at those of some cameras.
    """
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image = image if turn is None else image.transpose(turn)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_mask(content: bytes, path: Path, *, num_classes: int, void_index: int) -> np.ndarray:
    """A mask as (height, width) uint8 class indices; whatever void value the files use, it becomes 255.

    Raises
    ------
    DataError
        When the bytes are no whole image, hold colours instead of indices, or a value that is no class and not void.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            mode, mask = image.mode, np.asarray(image)
    except Exception as error:  # as above
        raise DataError(
            path, f"not a readable mask, or a truncated one ({error}); replace it"
        ) from error
    if mode not in ("P", "L", "1", "I;16", "I") or mask.ndim != 2:
        message = f"the mask has mode {mode} (colours), expected one channel of class indices (mode P or L); convert it"
        raise DataError(path, message, expected="P or L", actual=mode)
    values = (
        np.bincount(mask.reshape(-1)).nonzero()[0] if mask.dtype == np.uint8 else np.unique(mask)
    )  # counting beats sorting
    unknown = values[((values < 0) | (values >= num_classes)) & (values != void_index)]
    if unknown.size:
        message = (
            f"mask value {int(unknown[0])} is no class (0 to {num_classes - 1}) and not void ({void_index}); "
            "correct the mask or the class list"
        )
        raise DataError(path, message, expected=num_classes, actual=int(unknown[0]))
    return (
        mask
        if mask.dtype == np.uint8 and void_index == VOID
        else np.where(mask == void_index, VOID, mask).astype(np.uint8)
    )


def scaled_size(image: tuple[int, int], *, size: tuple[int, int], rule: str) -> tuple[int, int]:
    """Height and width to which a rule scales a image of (height, width), before it pads or crops it to (H, W) = ``size``."""
    height, width = size
    if rule == "stretch":
        return height, width
    ratios = (height / image[0], width / image[1])
    ratio = min(ratios) if rule == "pad" else max(ratios)
    fit = min if rule == "pad" else max  # rounding must not leave the frame, or a gap in it
    return max(1, fit(height, round(image[0] * ratio))), max(1, fit(width, round(image[1] * ratio)))


def resize_pair(
    image: Image.Image, mask: np.ndarray, *, size: tuple[int, int], rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Bring a image and its mask to (H, W) = ``size``: bilinear with antialiasing, nearest for the mask.

    ``stretch`` ignores the aspect ratio; ``pad`` keeps it and fills up with black and void, right and below;
    ``crop`` keeps it, covers (H, W) and cuts the centre out.

    Returns
    -------
    (H, W, 3) uint8, (H, W) uint8
    """
    height, width = size
    labels = Image.fromarray(mask)
    rows, columns = scaled_size((image.height, image.width), size=size, rule=rule)
    box = (columns, rows)
    small_image = np.asarray(image.resize(box, Image.Resampling.BILINEAR))
    small_mask = np.asarray(labels.resize(box, Image.Resampling.NEAREST))
    if rule == "pad":
        below, right = height - box[1], width - box[0]
        small_image = np.pad(small_image, ((0, below), (0, right), (0, 0)))
        small_mask = np.pad(small_mask, ((0, below), (0, right)), constant_values=VOID)
    elif rule == "crop":
        top, left = (box[1] - height) // 2, (box[0] - width) // 2
        small_image = small_image[top : top + height, left : left + width]
        small_mask = small_mask[top : top + height, left : left + width]
    return small_image, small_mask
