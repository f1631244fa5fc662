"""What the three kinds of COCO masks (Lin et al. 2014) have in common: where images lie, and the annotations' JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.common.errors import DataError
from stages.data.images import read_bytes
from stages.datasets.layout import first_folder

IMAGES = "train2017.zip and val2017.zip"
SITE = "of cocodataset.org, whose terms you accept there"
SPLITS = (("train2017", "train"), ("val2017", "val"))  # the labels of test are not public


def image_folder(root: Path, name: str, where: str) -> Path:
    """The folder of images ``train2017`` or ``val2017``, in the root itself or in ``images``."""
    return first_folder(root, (name, f"images/{name}"), "images", where)


def read_annotations(path: Path, where: str) -> dict[str, Any]:
    """An annotation file: lists ``images``, ``annotations`` and ``categories``.

    Raises
    ------
    DataError
        When it is missing, damaged or of another kind; ``where`` says where to get it.
    """
    if not path.is_file():
        raise DataError(path, f"these annotations are missing ({where})")
    try:
        content = json.loads(read_bytes(path, "annotation file"))
        if all(isinstance(content[key], list) for key in ("images", "annotations", "categories")):
            return dict(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            path,
            f"is not COCO's JSON, or a truncated one ({type(error).__name__}: {error}); replace it",
        ) from error
    raise DataError(
        path, "is not COCO's JSON; it must hold lists named images, annotations and categories"
    )


def read_categories(contents: dict[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """The categories of all annotation files, by id.

    Raises
    ------
    DataError
        When two files have not the same ones.
    """
    first: list[dict[str, Any]] | None = None
    for path, content in contents.items():
        categories = sorted(content["categories"], key=lambda category: category["id"])
        names = [(category["id"], category["name"]) for category in categories]
        if first is not None and names != [
            (category["id"], category["name"]) for category in first
        ]:
            raise DataError(
                path,
                "has other categories than the annotations of the other split; take both from one release",
            )
        first = categories
    assert first is not None
    return first
