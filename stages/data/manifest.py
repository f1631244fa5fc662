"""The manifest: which images there are, which split each is in, and which classes they show."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from stages.common.errors import DataError
from stages.data.images import VOID, decode_image, read_bytes, resize_pair
from stages.data.masks import decode_mask

SPLITS = ("train", "val", "test")  # of labelled images
UNLABELLED = "unlabelled"
MANIFEST_NAME = "manifest.csv"
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class Classes:
    """Names and colours (red, green, blue; 0..255) by mask value, and the value for no label."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    void_index: int = 255


@dataclass(frozen=True)
class Pair:
    """One image with its mask, before anything was checked."""

    id: str
    image: Path
    mask: Path
    split: str


@dataclass(frozen=True)
class Entry:
    """One line of the manifest; sizes in pixels, hashes are sha256 of the files.

    An image without labels has no mask: both of its texts are empty.
    """

    id: str
    image: str
    mask: str
    split: str
    width: int
    height: int
    image_sha256: str
    mask_sha256: str


def write_manifest(folder: Path, entries: list[Entry], summary: Mapping[str, object]) -> None:
    """Write ``manifest.csv`` and ``summary.json`` into a folder."""
    with open(folder / MANIFEST_NAME, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(entry) for entry in entries)
    (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[list[Entry], Classes]:
    """Read the entries in order, and the classes.

    Raises
    ------
    DataError
        When there is no manifest, or ``prepare`` did not write it.
    """
    path = folder / MANIFEST_NAME
    try:
        with open(path, newline="", encoding="utf-8") as file:
            entries = [
                Entry(width=int(row.pop("width")), height=int(row.pop("height")), **row)
                for row in csv.DictReader(file)
            ]
        summary = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
        classes = Classes(
            names=tuple(summary["classes"]),
            palette=tuple((red, green, blue) for red, green, blue in summary["palette"]),
            void_index=summary["void_index"],
        )
    except FileNotFoundError as error:
        raise DataError(
            error.filename,
            "there is no manifest here; run the prepare stage first",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            path,
            f"is not a manifest that prepare wrote ({error}); run the prepare stage again",
        ) from error
    return entries, classes


def read_original(entry: Entry, classes: Classes) -> tuple[Image.Image, np.ndarray]:
    """Read an image and its mask at their original size, and check them against the manifest.

    Returns
    -------
    RGB image, (height, width) uint8
        Image and mask; an image without labels has a mask of void.

    Raises
    ------
    DataError
        When a file is missing, damaged, or changed since the prepare stage.
    """
    # The prepare stage allowed this size, and the bytes are the same.
    image_path, pixels = Path(entry.image), entry.width * entry.height
    content = _read_unchanged(image_path, "image", entry.image_sha256)
    image = decode_image(content, image_path, max_pixels=pixels)
    if not entry.mask:
        return image, np.full((image.height, image.width), VOID, np.uint8)
    mask_path = Path(entry.mask)
    mask = decode_mask(
        _read_unchanged(mask_path, "mask", entry.mask_sha256),
        mask_path,
        num_classes=len(classes.names),
        void_index=classes.void_index,
    )
    return image, mask


def _read_unchanged(path: Path, what: str, sha256: str) -> bytes:
    content = read_bytes(path, what)
    if hashlib.sha256(content).hexdigest() != sha256:
        message = "this file changed since the prepare stage; run `dvc repro`, or prepare again"
        raise DataError(path, message)
    return content


def read_pair(
    entry: Entry, classes: Classes, *, size: tuple[int, int], rule: str
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask as :func:`read_original` does, and resize them.

    Returns
    -------
    (H, W, 3) uint8, (H, W) uint8
        Image and mask.
    """
    return resize_pair(*read_original(entry, classes), size=size, rule=rule)
