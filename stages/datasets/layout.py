"""What every data set tells ``prepare`` about itself, and how its files are paired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES, broken_link
from stages.data.manifest import Classes, Pair
from stages.datasets.findings import Finding


@dataclass(frozen=True)
class DatasetLayout:
    """The content of a data set's folder.

    Attributes
    ----------
    pairs
        All images with their masks, each in the split of the data set's owners.
    classes
        Names and colours by class index, and the void value of masks that are used unchanged.
    convert
        Returns a pair's mask as (H, W) uint8 class indices with 255 for void, or None where the
        file holds such indices already. Raises ``DataError`` for a file that cannot be read and
        for a value that the data set does not define.
    findings
        What the reader left out or doubts, such as annotations without an outline.
    """

    pairs: list[Pair]
    classes: Classes
    convert: Callable[[Pair], np.ndarray | None] | None = None
    findings: Sequence[Finding] = ()


@dataclass(frozen=True)
class Archive:
    """A file that everyone may download.

    Attributes
    ----------
    url, md5
        Address and checksum.
    inside
        Folder of the archive that is needed.
    target
        Destination of that folder.
    has
        A folder that ``target`` holds once the data is there.
    """

    url: str
    md5: str
    inside: str
    target: Path
    has: str


def first_folder(root: Path, names: tuple[str, ...], what: str, where: str) -> Path:
    """Return the first existing folder below ``root``; tools unpack one archive differently.

    Parameters
    ----------
    root, names
        Folder of the data set, and paths below it in order of preference.
    what, where
        For the error message: the content of the folder, and where to get it.

    Raises
    ------
    DataError
        When there is none of them.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    others = f", and no {' or '.join(names[1:])} either" if names[1:] else ""
    raise DataError(
        root / names[0],
        f"there is no such folder{others}; the {what} belong there ({where})",
    )


def pairs_by_suffix(
    images: Path,
    masks: Path,
    split: str,
    *,
    image_suffix: str = ".jpg",
    mask_suffix: str = ".png",
    below: str = "",
) -> list[Pair]:
    """Pair files of two folders by the text before their suffixes, which is the id.

    A missing partner is reported when the pair is checked.

    Parameters
    ----------
    images, masks
        Folders of the images and the masks.
    split
        ``train``, ``val`` or ``test``.
    image_suffix, mask_suffix
        Ends of the file names.
    below
        Pattern of folders in between, such as ``*/``; they are not part of the id.
    """
    names = {
        file.relative_to(folder).as_posix().removesuffix(suffix)
        for folder, suffix in ((images, image_suffix), (masks, mask_suffix))
        for file in folder.glob(f"{below}*{suffix}")
    }
    return [
        Pair(
            Path(name).name, images / f"{name}{image_suffix}", masks / f"{name}{mask_suffix}", split
        )
        for name in sorted(names)
    ]


def pairs_by_stem(images: Path, masks: Path, split: str, prefix: str = "") -> list[Pair]:
    """Pair files of two folders by their stems, whatever their formats.

    A missing partner is reported when the pair is checked.

    Raises
    ------
    DataError
        When a folder is missing, or two files of a folder share a stem.
    """
    for folder, content in ((images, "images"), (masks, "masks")):
        if link := broken_link(folder):
            raise DataError(folder, f"is {link}")
        if not folder.is_dir():
            raise DataError(folder, f"there is no such folder; put the {content} there")
    image_files = files_by_stem(images, IMAGE_SUFFIXES)
    mask_files = files_by_stem(masks, MASK_SUFFIXES)
    return [
        Pair(
            prefix + stem,
            image_files.get(stem, images / f"{stem}.jpg"),
            mask_files.get(stem, masks / f"{stem}.png"),
            split,
        )
        for stem in sorted({*image_files, *mask_files})
    ]


def files_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """List the files of a folder with one of these suffixes, by stem, sorted by name.

    Raises
    ------
    DataError
        When two files share a stem.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in suffixes and not file.name.startswith("."):
            other = files.setdefault(file.stem, file)
            if other != file:
                raise DataError(
                    file,
                    f"has the same id ({file.stem}) as {other.name}; rename one of them",
                )
    return files
