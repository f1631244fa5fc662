"""COCO panoptic (Kirillov et al. 2019) as semantic masks: 80 things and 53 stuff, named and coloured by the annotations' JSON.

A pixel's colour in the PNGs is the number of its segment; the JSON says of which category a segment is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets import coco
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found, first_folder
from stages.datasets.palette import bit_colour
from stages.datasets.relabel import read_colours, relabel

WHERE = (
    f"{coco.IMAGES} and panoptic_annotations_trainval2017.zip {coco.SITE}; "
    "unpack annotations/panoptic_train2017.zip and panoptic_val2017.zip, which lie inside it, too"
)
UNLABELLED = 0


def find(root: Path, config: PrepareConfig) -> Found:
    """All pairs of the images and ``annotations/panoptic_{train,val}2017``.

    Crowds are of their category: what kind of thing a pixel shows is known, only not which one of them.

    Raises
    ------
    DataError
        When a folder or an annotation file is missing, damaged, or does not fit the other.
    """
    contents = {
        path: coco.read_annotations(path, WHERE)
        for path in (_annotations(root, folder) for folder, _ in coco.SPLITS)
    }
    categories = coco.read_categories(contents)
    index = {category["id"]: number for number, category in enumerate(categories)}
    segments: dict[
        str, tuple[str, dict[int, int]]
    ] = {}  # name of the annotation file; class by segment
    pairs = []
    for folder, split in coco.SPLITS:
        path = _annotations(root, folder)
        images = coco.image_folder(root, folder, WHERE)
        masks = first_folder(
            root, (f"annotations/panoptic_{folder}", f"panoptic_{folder}"), "masks", WHERE
        )
        try:
            names = {
                image["id"]: Path(image["file_name"]).name for image in contents[path]["images"]
            }
            for annotation in contents[path]["annotations"]:
                id = Path(annotation["file_name"]).stem
                segments[id] = (
                    path.name,
                    {
                        segment["id"]: index[segment["category_id"]]
                        for segment in annotation["segments_info"]
                    },
                )
                pairs.append(
                    Pair(
                        id,
                        images / names[annotation["image_id"]],
                        masks / Path(annotation["file_name"]).name,
                        split,
                    )
                )
        except (KeyError, TypeError) as error:
            raise DataError(
                path,
                f"an annotation lacks {error}, or names one that the file does not describe; replace it",
            ) from error
    palette = tuple(
        tuple(category.get("color") or bit_colour(number + 1))
        for number, category in enumerate(categories)
    )
    classes = Classes(
        tuple(category["name"] for category in categories),
        tuple((red, green, blue) for red, green, blue in palette),
    )

    def convert(pair: Pair) -> np.ndarray:
        name, table = segments[pair.id]
        remedy = f"is not described in {name}; take both as their owners ship them"
        return relabel(
            read_colours(pair.mask),
            {UNLABELLED: VOID, **table},
            pair.mask,
            name="segment {}".format,
            remedy=remedy,
        )

    return Found(sorted(pairs, key=lambda pair: pair.id), classes, convert)


def _annotations(root: Path, folder: str) -> Path:
    return root / "annotations" / f"panoptic_{folder}.json"
