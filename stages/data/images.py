"""Images: reading files with exact errors, and the resize rules."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from featurestore import VOID
from stages.common.errors import DataError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".gif",
)  # fmt: skip
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES = {"image": IMAGE_SUFFIXES, "mask": MASK_SUFFIXES}
MAX_PIXELS = 178_956_970  # where Pillow refuses an image by default: 512 MB as RGB
SUBFILE_TYPE, REDUCED = 254, 0b101  # TIFF's tag, and its bits for previews and transparency
UPRIGHT = {  # what turns an image of this EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_lifting, _limits = Lock(), list[int | None]()


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
        raise DataError(path, f"this {what} is {_absence(path, what)}") from None
    except OSError as error:
        raise DataError(path, f"this {what} cannot be read ({error.strerror})") from error


def broken_link(path: Path) -> str:
    """Describe a symbolic link whose target is not there; empty for any other path."""
    if path.exists() or not path.is_symlink():
        return ""
    return f"a broken symbolic link to {os.readlink(path)}; restore its target or remove it"


def _absence(path: Path, what: str) -> str:
    """Say why a file is not there: a broken link, another format, or nothing of that name."""
    if link := broken_link(path):
        return link
    for other in sorted(path.parent.glob("*")) if what in SUFFIXES else ():
        if other.stem == path.stem:
            false = "; a JPEG converted to PNG keeps its false values" if what == "mask" else ""
            return (
                f"missing; {other.name} is not of a format that is read as {what} "
                f"({', '.join(SUFFIXES[what])}); export it as PNG{false}"
            )
    return "missing; add it, or take its id off the list"


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


@contextmanager
def _own_limit() -> Iterator[None]:
    """Lift Pillow's pixel limit, which all threads share, until the last thread leaves."""
    with _lifting:
        _limits.append(Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lifting:
            before = _limits[0]
            _limits.pop()
            if not _limits:
                Image.MAX_IMAGE_PIXELS = before


@contextmanager
def opened(content: bytes, path: Path, what: str) -> Iterator[ImageFile.ImageFile]:
    """Open an image file by its header; errors inside become a DataError that names the file."""
    with readable(path, what), _own_limit():
        try:
            file = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            raise DataError(
                path,
                f"not a readable {what}: its first bytes, {content[:24]!r}, are of no format "
                "that is read; replace it, or convert it to PNG",
            ) from error
        with file:
            yield file


def check_frames(image: ImageFile.ImageFile, path: Path, what: str) -> None:
    """Refuse several frames or pages; previews of phones (MPO) and of TIFF do not count."""
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.format == "TIFF":
        kinds = []
        for number in range(frames):
            image.seek(number)
            kinds.append(image.tag_v2.get(SUBFILE_TYPE, 0))  # type: ignore[attr-defined]
        frames -= sum(bool(kind & REDUCED) for kind in kinds[1:])
        image.seek(0)
    if frames > 1:
        raise DataError(
            path,
            f"this {what} has {frames} frames or pages ({image.format}); save the one to use "
            "as a file of its own",
            expected=1,
            actual=frames,
        )


def decode_image(
    content: bytes,
    path: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    remedy: str = "make it smaller, or cut it into parts",
) -> Image.Image:
    """Decode an image to RGB, turned as its EXIF tag says.

    Parameters
    ----------
    content
        Bytes of the file.
    path
        For error messages.
    max_pixels
        Most pixels; a larger image is refused by its header, before it takes memory.
    remedy
        What to do about a larger image, for the error message.

    Raises
    ------
    DataError
        When the bytes are not one whole image, or it has too many pixels or more than 8 bits a
        channel.
    """
    with opened(content, path, "image") as file:
        if (pixels := file.width * file.height) > max_pixels:
            raise DataError(
                path,
                f"this image of {file.width} x {file.height} has {pixels} pixels, more than the "
                f"limit of {max_pixels} that protects the memory; {remedy}",
                expected=max_pixels,
                actual=pixels,
            )
        check_frames(file, path, "image")
        if depth := too_deep(file):
            raise DataError(path, f"this image {depth}", expected="RGB or L", actual=file.mode)
        file.load()
        return upright(file)


def too_deep(image: Image.Image) -> str:
    """Say what is wrong with 16 or 32 bits a channel, which RGB would cut off; empty for 8 bits.

    Only the owner of the image knows which of its values are black and white.
    """
    mode = image.mode
    if not mode.startswith(("I", "F")):
        # Pillow opens colours of 16 bits as RGB; what its decoder reads has the depth.
        tiles = getattr(image, "tile", ())
        mode = next((raw for tile in tiles if ";16" in (raw := _raw_mode(tile))), "")
    if not mode:
        return ""
    return (
        f"has more than 8 bits a channel (mode {mode}); "
        "convert it to 8 bits, black at 0 and white at 255"
    )


def _raw_mode(tile: tuple[object, ...]) -> str:
    """Return what a decoder of Pillow reads, such as ``RGB;16B``, of ``(decoder, ..., args)``."""
    args = tile[3]
    return str(args[0] if isinstance(args, tuple) and args else args)


def orientation_of(content: bytes, path: Path) -> int:
    """Read the EXIF orientation of an image file, 1 to 8; 1 where it has none or a wrong one."""
    with opened(content, path, "image") as file:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in UPRIGHT else 1


def upright(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB, turned as its EXIF tag says; transparency is dropped.

    Pillow's ``exif_transpose`` is not used: it writes all tags anew, which fails for some cameras.
    """
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of a direct way to RGB
    return image if image.mode == "RGB" else image.convert("RGB")


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
