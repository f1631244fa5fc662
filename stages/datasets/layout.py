"""What every data set tells ``prepare`` of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from stages.data.manifest import Classes, Pair


@dataclass(frozen=True)
class Found:
    """A data set as it lies in its folder.

    Attributes
    ----------
    pairs
        All images with their masks, each in the split that the owners gave it.
    classes
        Names and colours by class index, and the void value of masks that are used as they are.
    convert
        Gives a pair's mask as (H, W) uint8 class indices with 255 for void, or None where the file itself is good. It
        raises ``DataError`` for a file that cannot be read and for a value that the data set does not know.
    """

    pairs: list[Pair]
    classes: Classes
    convert: Callable[[Pair], np.ndarray | None] | None = None


@dataclass(frozen=True)
class Archive:
    """A file that a data set's owners let everyone download.

    Attributes
    ----------
    url, md5
        Where it lies, and its checksum.
    inside
        The folder of the archive that is wanted.
    target
        Where that folder goes.
    has
        A folder that ``target`` holds once the data is there.
    """

    url: str
    md5: str
    inside: str
    target: Path
    has: str


def first_folder(root: Path, names: tuple[str, ...], what: str, where: str) -> Path:
    """The first of several folders below ``root`` that there is: owners and tools unpack the same archive differently.

    Raises
    ------
    DataError
        When there is none; it says what was looked for, and where to get it.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        root / names[0],
        f"there is no such folder{_others(names[1:])}; the {what} belong there ({where})",
    )


def _others(names: tuple[str, ...]) -> str:
    return f", and no {' or '.join(names)} either" if names else ""


def pairs_of(images: Path, masks: Path, split: str, prefix: str = "") -> list[Pair]:
    """Pairs of files of equal names in two folders; a name that one side lacks is reported as missing when it is checked.

    Raises
    ------
    DataError
        When a folder is missing, or two files share a name.
    """
    by_name: dict[str, Path] = {}
    for folder, suffixes, what in (
        (images, IMAGE_SUFFIXES, "images"),
        (masks, MASK_SUFFIXES, "masks"),
    ):
        if not folder.is_dir():
            raise DataError(folder, f"there is no such folder; put the {what} there")
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in suffixes or file.name.startswith("."):
                continue
            key = f"{what}/{file.stem}"
            if key in by_name:
                raise DataError(
                    file,
                    f"has the same id ({file.stem}) as {by_name[key].name}; rename one of them",
                )
            by_name[key] = file
    names = sorted({key.split("/", 1)[1] for key in by_name})
    return [
        Pair(
            prefix + name,
            by_name.get(f"images/{name}", images / f"{name}.jpg"),
            by_name.get(f"masks/{name}", masks / f"{name}.png"),
            split,
        )
        for name in names
    ]
