"""One image with its mask: read as later stages see it, checked, and what is doubtful in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.common.errors import DataError
from stages.data.images import (
    MASK_SUFFIXES,
    UPRIGHT,
    VOID,
    decode_image,
    orientation_of,
    read_bytes,
)
from stages.data.manifest import Classes, Entry, Pair
from stages.data.masks import decode_mask
from stages.datasets.config import PrepareConfig
from stages.datasets.findings import Finding
from stages.datasets.interpolation import false_borders
from stages.datasets.layout import DatasetLayout
from stages.datasets.relabel import encode_indices

QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
Store = Callable[[Pair, bytes], Path]  # writes the PNG of a converted mask


@dataclass(frozen=True)
class Checked:
    """A pair without a problem.

    Attributes
    ----------
    pair, entry
        The pair, and its line of the manifest.
    pixels
        (256,) int, number of the mask's pixels by value; 255 is void.
    findings
        What is doubtful.
    turned
        Whether the image has an EXIF orientation.
    doubtful
        Fraction of the mask's pixels, 0..1, that may be wrong.
    """

    pair: Pair
    entry: Entry
    pixels: np.ndarray
    findings: list[Finding]
    turned: bool
    doubtful: float


@dataclass(frozen=True)
class ReadPair:
    """A pair as later stages see it.

    Attributes
    ----------
    image, image_bytes
        RGB, turned as its EXIF orientation says; the file's bytes.
    orientation
        EXIF orientation, 1 to 8; 1 is upright.
    mask
        (H, W) uint8 class indices, 255 for void.
    converted
        Whether the mask's file holds anything else, and has to be written anew.
    """

    image: Image.Image
    image_bytes: bytes
    orientation: int
    mask: np.ndarray
    converted: bool


def read_pair(pair: Pair, layout: DatasetLayout, config: PrepareConfig) -> ReadPair:
    """Read and convert an image and its mask.

    Raises
    ------
    DataError
        When a file is missing or damaged, or the two do not fit each other.
    """
    convert, is_mask = layout.convert, _is_mask(pair)
    # A fault in a file of outlines is named before a missing image.
    mask = convert(pair) if convert is not None and not is_mask else None
    content = read_bytes(pair.image, "image")
    image = decode_image(
        content,
        pair.image,
        max_pixels=config.max_pixels,
        remedy="increase prepare.max_pixels, or make the image smaller",
    )
    orientation = orientation_of(content, pair.image)
    turn = UPRIGHT.get(orientation) if is_mask and config.exif == "ignore" else None
    if convert is not None and is_mask:
        mask = convert(pair)
    converted = mask is not None or turn is not None
    if mask is None:
        classes = layout.classes
        mask = decode_mask(
            read_bytes(pair.mask, "mask"),
            pair.mask,
            num_classes=len(classes.names),
            void_index=classes.void_index,
        )
    (height, width), size = mask.shape, (image.height, image.width)
    if turn is not None:
        mask = np.asarray(Image.fromarray(mask).transpose(turn))
    if mask.shape != size:
        remedy = "they must be of one size"
        if is_mask and orientation in QUARTER_TURNS and mask.shape == size[::-1]:
            drawn_on, other = ("turned", "apply") if turn is not None else ("stored", "ignore")
            remedy = (
                f"the image is turned by its EXIF orientation {orientation}, and the mask has the "
                f"size of the {drawn_on} pixels: set prepare.exif to {other}"
            )
        raise DataError(
            pair.mask,
            f"the mask is {width} x {height} pixels, its image {pair.image} is "
            f"{image.width} x {image.height}; {remedy}",
            expected=size,
            actual=(height, width),
        )
    return ReadPair(image, content, orientation, mask, converted)


def _is_mask(pair: Pair) -> bool:
    """Whether masks are image files; outlines of annotation files are drawn on the turned image."""
    return pair.mask.suffix.lower() in MASK_SUFFIXES


def check_pair(
    pair: Pair, layout: DatasetLayout, config: PrepareConfig, store: Store | None
) -> Checked:
    """Read, convert and check a pair; errors name the owners' mask, not the converted one."""
    read, mask_path = read_pair(pair, layout, config), pair.mask
    if read.converted:
        mask_bytes = encode_indices(read.mask, layout.classes)
        mask_path = store(pair, mask_bytes) if store is not None else pair.mask
    else:
        mask_bytes = read_bytes(pair.mask, "mask")
    entry = Entry(
        id=pair.id,
        image=pair.image.as_posix(),
        mask=mask_path.as_posix(),
        split=pair.split,
        width=read.image.width,
        height=read.image.height,
        image_sha256=hashlib.sha256(read.image_bytes).hexdigest(),
        mask_sha256=hashlib.sha256(mask_bytes).hexdigest(),
    )
    pixels = np.bincount(read.mask.reshape(-1), minlength=256)
    findings, wrong = _doubts_of_mask(pair, read.mask, pixels, layout.classes)
    if not _is_mask(pair) and pixels[0] == read.mask.size:
        findings.append(
            Finding(
                "images without an outline",
                pair.image,
                f"has no outline, so all of it is {layout.classes.names[0]!r}; where it is not "
                "labelled yet, leave it out of the export",
            )
        )
    turned = read.orientation != 1
    keeps_size = read.orientation not in QUARTER_TURNS or entry.width == entry.height
    if turned and keeps_size and _is_mask(pair) and config.exif == "apply":
        wrong = read.mask.size
        findings.append(
            Finding(
                "images whose EXIF orientation keeps their size",
                pair.image,
                f"is turned by its EXIF orientation {read.orientation}; look whether its mask is: "
                "where masks were drawn on the stored pixels, set prepare.exif to ignore",
            )
        )
    return Checked(pair, entry, pixels, findings, turned, wrong / read.mask.size)


def _doubts_of_mask(
    pair: Pair, mask: np.ndarray, pixels: np.ndarray, classes: Classes
) -> tuple[list[Finding], int]:
    """Find what is doubtful in a mask, and how many of its pixels; ``pixels`` is by value."""
    borders = false_borders(mask)
    if borders.any():
        names = ", ".join(classes.names[value] for value in borders.nonzero()[0])
        message = (
            f"{borders.sum()} pixels of {names} are thin borders between a lower and a higher "
            "class, as after a bilinear resize; resize masks with nearest neighbour"
        )
        kind = "masks with classes that occur only as thin borders"
        return [Finding(kind, pair.mask, message)], int(borders.sum())
    if pixels[VOID] and not pixels[1:VOID].any():
        remedy = "set prepare.binary to true" if len(classes.names) == 2 else "write its index"
        message = (
            f"holds only {classes.names[0]!r} and pixels without a label (value "
            f"{classes.void_index} of index masks); where these are your object, {remedy}"
        )
        kind = "masks that hold only the first class and void"
        return [Finding(kind, pair.mask, message)], int(pixels[VOID])
    return [], 0
