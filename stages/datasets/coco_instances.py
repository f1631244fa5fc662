"""COCO's object instances (Lin et al. 2014), drawn into semantic masks: background and 80 things."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets import coco
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found
from stages.datasets.palette import bit_colour

WHERE = f"{coco.IMAGES} and annotations_trainval2017.zip {coco.SITE}"
BACKGROUND = 0


def find(root: Path, config: PrepareConfig) -> Found:
    """All images of ``annotations/instances_{train,val}2017.json``; those without an object are all background.

    Raises
    ------
    ConfigError
        When pycocotools is not installed.
    DataError
        When a folder or an annotation file is missing or damaged.
    """
    try:
        import pycocotools.mask  # noqa: F401 - here, so that it is missed before anything is read
    except ImportError as error:
        raise ConfigError(
            "prepare.dataset", "coco-instances needs pycocotools; pip install -e '.[coco]'"
        ) from error
    contents = {
        path: coco.read_annotations(path, WHERE)
        for path in (_annotations(root, folder) for folder, _ in coco.SPLITS)
    }
    categories = coco.read_categories(contents)
    names = ("background", *(category["name"] for category in categories))
    index = {category["id"]: number for number, category in enumerate(categories, start=1)}
    sizes: dict[str, tuple[int, int]] = {}
    objects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    pairs = []
    for folder, split in coco.SPLITS:
        path, images = _annotations(root, folder), coco.image_folder(root, folder, WHERE)
        try:
            ids = {image["id"]: Path(image["file_name"]).stem for image in contents[path]["images"]}
            for image in contents[path]["images"]:
                id = ids[image["id"]]
                sizes[id] = (image["height"], image["width"])
                pairs.append(Pair(id, images / Path(image["file_name"]).name, path, split))
            for annotation in contents[path]["annotations"]:
                objects[ids[annotation["image_id"]]].append(
                    {**annotation, "index": index[annotation["category_id"]]}
                )
        except (KeyError, TypeError) as error:
            raise DataError(
                path,
                f"an entry lacks {error}, or names one that the file does not describe; replace it",
            ) from error

    def convert(pair: Pair) -> np.ndarray:
        return draw(objects.get(pair.id, []), sizes[pair.id], pair)

    classes = Classes(names, tuple(bit_colour(value) for value in range(len(names))))
    return Found(sorted(pairs, key=lambda pair: pair.id), classes, convert)


def draw(objects: list[dict[str, Any]], size: tuple[int, int], pair: Pair) -> np.ndarray:
    """A mask of instances: crowds lowest, as void; then the larger an object the lower, so that small ones stay visible.

    Parameters
    ----------
    objects
        COCO's annotations (polygons, or run lengths), each with its class as ``index``.
    size
        (H, W)
    pair
        For errors.

    Returns
    -------
    (H, W) uint8
    """
    from pycocotools import mask as rasteriser

    regions = []
    for annotation in objects:
        try:
            shape = annotation["segmentation"]
            if isinstance(shape, list):  # polygons
                region = rasteriser.merge(rasteriser.frPyObjects(shape, *size))
            elif isinstance(shape["counts"], list):
                region = rasteriser.frPyObjects(shape, *size)
            else:
                region = shape
            inside = rasteriser.decode(region).astype(bool)
            if inside.shape != size:
                raise ValueError(f"of {inside.shape} pixels, in a image of {size}")
        except Exception as error:  # pycocotools raises bare Exception among others
            message = f"the shape of annotation {annotation.get('id')} of {pair.id} cannot be drawn ({error}); replace the file"
            raise DataError(pair.mask, message, actual=annotation.get("id")) from error
        regions.append(
            (not annotation.get("iscrowd"), -int(inside.sum()), annotation["index"], inside)
        )
    mask = np.full(size, BACKGROUND, np.uint8)
    for labelled, _, index, inside in sorted(regions, key=lambda region: region[:3]):
        mask[inside] = index if labelled else VOID
    return mask


def _annotations(root: Path, folder: str) -> Path:
    return root / "annotations" / f"instances_{folder}.json"
