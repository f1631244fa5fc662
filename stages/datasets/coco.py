"""What the three kinds of COCO masks (Lin et al. 2014) share: image folders and annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.errors import DataError
from stages.data.images import read_bytes
from stages.datasets.layout import first_folder

IMAGES = "train2017.zip and val2017.zip"
SITE = "of cocodataset.org, whose terms you accept there"
SPLITS = (("train2017", "train"), ("val2017", "val"))  # the labels of test are not public
Entry = dict[str, Any]  # an object of the annotations' JSON


@dataclass(frozen=True)
class Annotations:
    """An annotation file, with the folder (``train2017`` or ``val2017``) and split of its images.

    Attributes
    ----------
    path, folder, split
        The file, its images' folder and their split.
    images, annotations, categories
        Lists of the file; categories are sorted by id.
    """

    path: Path
    folder: str
    split: str
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]


def image_folder(root: Path, name: str, where: str) -> Path:
    """Return the folder of images ``train2017`` or ``val2017``, in the root or in ``images``."""
    return first_folder(root, (name, f"images/{name}"), "images", where)


def read_annotations(root: Path, kind: str, where: str) -> list[Annotations]:
    """Read ``annotations/KIND_{train,val}2017.json``.

    Parameters
    ----------
    root
        Folder of the data set.
    kind
        ``panoptic`` or ``instances``.
    where
        For the error message: where to get the files.

    Raises
    ------
    DataError
        When a file is missing or damaged, or the categories of the two differ.
    """
    files = [
        read_file(root / "annotations" / f"{kind}_{folder}.json", folder, split, where)
        for folder, split in SPLITS
    ]
    check_categories(files)
    return files


def check_categories(files: Sequence[Annotations]) -> None:
    """Refuse annotation files of different categories.

    Raises
    ------
    DataError
        With the first file that differs.
    """
    known = None
    for file in files:
        with complete_entries(file.path, "category"):
            names = [(category["id"], category["name"]) for category in file.categories]
        known = names if known is None else known
        if names != known:
            raise DataError(
                file.path,
                "has other categories than the annotations of the other split; "
                "take both from one release",
            )


def read_file(path: Path, folder: str, split: str, where: str) -> Annotations:
    """Read an annotation file.

    Parameters
    ----------
    path
        The file.
    folder, split
        Folder of its images, and their split.
    where
        For the error message: where to get the file.

    Raises
    ------
    DataError
        When it is missing or damaged.
    """
    if not path.is_file():
        raise DataError(path, f"these annotations are missing ({where})")
    try:
        content = json.loads(read_bytes(path, "annotation file"))
        images, annotations = content["images"], content["annotations"]
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            path,
            f"is not COCO's JSON, or a truncated one ({type(error).__name__}: {error}); replace it",
        ) from error
    if not (isinstance(images, list) and isinstance(annotations, list)):
        raise DataError(
            path, "is not COCO's JSON; it must hold lists named images, annotations and categories"
        )
    return Annotations(path, folder, split, images, annotations, categories)


@contextmanager
def complete_entries(path: Path, what: str) -> Iterator[None]:
    """Report an entry (``what``) of an annotation file that lacks a key, or names no known id."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise DataError(
            path,
            f"an {what} lacks {error}, or names one that the file does not describe; replace it",
        ) from error
