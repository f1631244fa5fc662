"""COCO's object instances (Lin et al. 2014) as semantic masks: background and 80 things."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets import coco
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout
from stages.datasets.palette import bit_colour

WHERE = f"{coco.IMAGES} and annotations_trainval2017.zip {coco.SITE}"
BACKGROUND = 0


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find the images of ``annotations/instances_{train,val}2017.json``.

    An image without an object is all background.

    Raises
    ------
    ConfigError
        When pycocotools is not installed.
    DataError
        When a folder or an annotation file is missing or damaged.
    """
    try:
        import pycocotools.mask  # noqa: F401 - so that it is missed before anything is read
    except ImportError as error:
        raise ConfigError(
            "prepare.dataset", "coco-instances needs pycocotools; pip install -e '.[coco]'"
        ) from error
    files = coco.read_annotations(root, "instances", WHERE)
    names = ("background", *(category["name"] for category in files[0].categories))
    index = {category["id"]: number for number, category in enumerate(files[0].categories, 1)}
    sizes: dict[str, tuple[int, int]] = {}
    objects: dict[str, list[coco.Entry]] = defaultdict(list)
    pairs = []
    for file in files:
        folder = coco.image_folder(root, file.folder, WHERE)
        with coco.complete_entries(file.path, "entry"):
            paths = {image["id"]: folder / Path(image["file_name"]).name for image in file.images}
            for image in file.images:
                path = paths[image["id"]]
                sizes[path.stem] = (image["height"], image["width"])
                pairs.append(Pair(path.stem, path, file.path, file.split))
            for annotation in file.annotations:
                objects[paths[annotation["image_id"]].stem].append(
                    {**annotation, "index": index[annotation["category_id"]]}
                )

    def convert(pair: Pair) -> np.ndarray:
        return draw(objects.get(pair.id, []), sizes[pair.id], pair)

    classes = Classes(names, tuple(bit_colour(value) for value in range(len(names))))
    return DatasetLayout(sorted(pairs, key=lambda pair: pair.id), classes, convert)


def draw(objects: list[coco.Entry], size: tuple[int, int], pair: Pair) -> np.ndarray:
    """Draw a mask of instances: crowds first, as void, then objects from large to small.

    A smaller object stays visible on a larger one.

    Parameters
    ----------
    objects
        COCO's annotations (polygons, or run lengths), each with its class as ``index``.
    size
        (H, W) in pixels.
    pair
        For error messages.

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
                shape = rasteriser.merge(rasteriser.frPyObjects(shape, *size))
            elif isinstance(shape["counts"], list):  # run lengths, not compressed
                shape = rasteriser.frPyObjects(shape, *size)
            inside = rasteriser.decode(shape).astype(bool)
            if inside.shape != size:
                raise ValueError(f"of {inside.shape} pixels, in an image of {size}")
        except Exception as error:  # pycocotools raises bare Exception among others
            number = annotation.get("id")
            raise DataError(
                pair.mask,
                f"the shape of annotation {number} of {pair.id} cannot be drawn ({error}); "
                "replace the file",
                actual=number,
            ) from error
        order = (not annotation.get("iscrowd"), -int(inside.sum()), annotation["index"])
        regions.append((order, inside))
    mask = np.full(size, BACKGROUND, np.uint8)
    for (labelled, _, index), inside in sorted(regions, key=lambda region: region[0]):
        mask[inside] = index if labelled else VOID
    return mask
