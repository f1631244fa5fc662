"""Lists of image ids, one a line, as in Pascal VOC's ``ImageSets/Segmentation``."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from stages.data.manifest import Pair
from stages.datasets.layout import file_of_stem
from stages.datasets.text_files import read_text

LISTS = Path("ImageSets", "Segmentation")
IMAGES, MASKS = "JPEGImages", "SegmentationClass"
FLAGS = ("-1", "0", "1")  # of the lists of one class in ImageSets/Main
Files = tuple[str, ...]  # an image and its mask where the line names both, else empty


def read_ids(path: Path) -> dict[str, Files]:
    """Read a list of ids.

    A line has an id, an image's name or path, or an image and its mask. Names with spaces are in
    double quotes, as CVAT writes them.

    Returns
    -------
    dict
        By id, the paths of image and mask below the root; empty where the line has no mask.

    Raises
    ------
    DataError
        When the list cannot be read, names an id twice, or is a list of one class with flags.
    """
    found: dict[str, Files] = {}
    text = read_text(path, "this id list", "is prepare.root a VOC folder?").replace("\\", "/")
    for line in text.splitlines():
        words = [quoted or word for quoted, word in re.findall(r'"([^"]+)"|(\S+)', line)]
        if len(words) == 2 and words[1] in FLAGS:
            raise DataError(
                path,
                f"the line {line.strip()!r} has a flag, as lists of one class in ImageSets/Main; "
                "use the list of ImageSets/Segmentation, or write one id a line",
                actual=line.strip(),
            )
        pairs = _is_pair(words)
        for word in words[:1] if pairs else words:
            id = _id(word)
            if id in found:
                message = f"id {id} is listed twice; remove one of them"
                raise DataError(path, message, expected="unique ids", actual=id)
            found[id] = (_below(words[0], IMAGES), _below(words[1], MASKS)) if pairs else ()
    return found


def listed_pair(root: Path, id: str, files: Files, split: str) -> Pair:
    """Return a pair of a list, with the default places of image and mask where it names none."""
    if files:
        return Pair(id, root / files[0], root / files[1], split)
    image = file_of_stem(root / IMAGES, id, IMAGE_SUFFIXES)
    return Pair(id, image, root / MASKS / f"{id}.png", split)


def _is_pair(words: list[str]) -> bool:
    """Whether a line names an image and its mask; several ids may share a line, too."""
    if len(words) != 2:
        return False
    suffix = PurePosixPath(words[1]).suffix.lower()
    return "/" in words[1] or suffix in MASK_SUFFIXES or _id(words[0]) == _id(words[1])


def _id(word: str) -> str:
    name = PurePosixPath(word.rpartition(f"{IMAGES}/")[2].lstrip("/"))
    return (name.with_suffix("") if name.suffix.lower() in IMAGE_SUFFIXES else name).as_posix()


def _below(word: str, folder: str) -> str:
    suffix = {IMAGES: ".jpg", MASKS: ".png"}[folder]
    path = word.lstrip("/") if "/" in word else f"{folder}/{word}"
    return path if PurePosixPath(path).suffix else f"{path}{suffix}"
