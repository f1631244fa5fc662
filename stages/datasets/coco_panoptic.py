"""COCO panoptic (Kirillov et al. 2019) as semantic masks: 80 things and 53 stuff.

A pixel's colour in the PNGs is the number of its segment; the annotations' JSON has each segment's
category, and the categories' names and colours.
"""

from __future__ import annotations

from pathlib import Path

from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets import coco
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_folder
from stages.datasets.palette import bit_colour
from stages.datasets.relabel import Relabel, read_colours

WHERE = (
    f"{coco.IMAGES} and panoptic_annotations_trainval2017.zip {coco.SITE}; "
    "unpack annotations/panoptic_train2017.zip and panoptic_val2017.zip, which are inside it, too"
)
UNLABELLED = 0


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find the images and ``annotations/panoptic_{train,val}2017``.

    Crowds are of their category: the class of each pixel is known, only not its object.

    Raises
    ------
    DataError
        When a folder or an annotation file is missing, damaged, or does not fit the other.
    """
    files = coco.read_annotations(root, "panoptic", WHERE)
    categories = files[0].categories
    index = {category["id"]: number for number, category in enumerate(categories)}
    pairs: list[Pair] = []
    relabel: dict[str, Relabel] = {}  # by id
    for file in files:
        places = (f"annotations/panoptic_{file.folder}", f"panoptic_{file.folder}")
        images = coco.image_folder(root, file.folder, WHERE)
        masks = first_folder(root, places, "masks", WHERE)
        remedy = f"is not described in {file.path.name}; take both as their owners ship them"
        with coco.complete_entries(file.path, "annotation"):
            names = {image["id"]: Path(image["file_name"]).name for image in file.images}
            for entry in file.annotations:
                mask, image = masks / Path(entry["file_name"]).name, names[entry["image_id"]]
                segments = {
                    segment["id"]: index[segment["category_id"]]
                    for segment in entry["segments_info"]
                }
                relabel[mask.stem] = Relabel(
                    {UNLABELLED: VOID, **segments}, remedy, "segment {}".format, read_colours
                )
                pairs.append(Pair(mask.stem, images / image, mask, file.split))
    colours = [
        category.get("color") or bit_colour(number) for number, category in enumerate(categories, 1)
    ]
    classes = Classes(
        tuple(category["name"] for category in categories),
        tuple((red, green, blue) for red, green, blue in colours),
    )
    pairs.sort(key=lambda pair: pair.id)
    return DatasetLayout(pairs, classes, lambda pair: relabel[pair.id](pair))
