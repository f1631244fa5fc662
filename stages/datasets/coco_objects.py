"""Outlines of objects in COCO's JSON as semantic masks: background and the categories."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets import coco
from stages.datasets.class_list import Label, drawn_classes
from stages.datasets.findings import Finding
from stages.datasets.layout import DatasetLayout
from stages.datasets.shapes import Size, decode_segmentation, drop_rings, turn_with_image

BACKGROUND = 0
NO_OUTLINE = "annotations without an outline"
RINGS = "polygons of fewer than three points"
Locate = Callable[[coco.Annotations, str], tuple[str, Path]]


def require_pycocotools(dataset: str) -> None:
    """Require the optional pycocotools before anything is read.

    Raises
    ------
    ConfigError
        When it is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "prepare.dataset", f"{dataset} needs pycocotools; pip install -e '.[coco]'"
        ) from error


def find_objects(
    files: Sequence[coco.Annotations], locate: Locate, *, crowd_is_void: bool
) -> DatasetLayout:
    """Return the images of annotation files with masks that are drawn when they are needed.

    An image without an object is all background. Where two splits have an image of one name, all
    ids begin with the split.

    Parameters
    ----------
    files
        Annotation files with the same categories.
    locate
        Id and path of an image by its annotation file and ``file_name``.
    crowd_is_void
        Whether pixels of ``iscrowd`` annotations are void, as COCO's instances have it. Tools set
        ``iscrowd`` for every annotation with run lengths; then the pixels are of its category.

    Raises
    ------
    DataError
        When an entry is not complete, or no annotation of a file has an outline.
    """
    classes, index = _classes(files)
    located = []
    for file in files:
        with coco.complete_entries(file.path, "entry"):
            located.append({image["id"]: locate(file, image["file_name"]) for image in file.images})
    names = Counter(id for images in located for id in {id for id, _ in images.values()})
    twice = max(names.values(), default=1) > 1
    pairs: list[Pair] = []
    findings: list[Finding] = []
    sizes: dict[str, Size] = {}
    objects: dict[str, list[coco.Entry]] = defaultdict(list)
    for file, images in zip(files, located, strict=True):
        ids = {key: f"{file.split}/{id}" if twice else id for key, (id, _) in images.items()}
        left_out: Counter[str] = Counter()
        with coco.complete_entries(file.path, "entry"):
            for image in file.images:
                key = image["id"]
                sizes[ids[key]] = (image["height"], image["width"])
                pairs.append(Pair(ids[key], images[key][1], file.path, file.split))
            for annotation in file.annotations:
                outline, rings = drop_rings(annotation.get("segmentation"))
                left_out[RINGS] += rings
                left_out[NO_OUTLINE] += not outline and not rings
                if outline:
                    objects[ids[annotation["image_id"]]].append(
                        {
                            **annotation,
                            "segmentation": outline,
                            "index": index[annotation["category_id"]],
                        }
                    )
        if file.annotations and left_out[NO_OUTLINE] == len(file.annotations):
            message = "no annotation has an outline; export polygons or masks, not only boxes"
            raise DataError(file.path, message)
        findings += [
            Finding(kind, file.path, f"{count} {kind} are left out", count)
            for kind, count in left_out.items()
            if count
        ]

    def convert(pair: Pair) -> np.ndarray:
        mask = draw(objects.get(pair.id, []), sizes[pair.id], pair, crowd_is_void=crowd_is_void)
        return turn_with_image(mask, pair.image, stored=True)

    return DatasetLayout(sorted(pairs, key=lambda pair: pair.id), classes, convert, findings)


def _classes(files: Sequence[coco.Annotations]) -> tuple[Classes, dict[int, int]]:
    """Return the classes in the order of category ids, and each category's class index.

    Roboflow adds a category that is only the parent of all others; it is not a class.
    """
    first = files[0]
    with coco.complete_entries(first.path, "annotation"):
        used = {annotation["category_id"] for file in files for annotation in file.annotations}
    parents = {category.get("supercategory") for category in first.categories}
    labelled = [
        category
        for category in first.categories
        if category["id"] in used
        or category.get("supercategory") != "none"
        or category["name"] not in parents
    ]
    labels = [Label(category["name"], None) for category in labelled]
    classes, index = drawn_classes(labels, first.path)
    return classes, {category["id"]: index[category["name"]] for category in labelled}


def draw(
    objects: Sequence[coco.Entry], size: Size, pair: Pair, *, crowd_is_void: bool
) -> np.ndarray:
    """Draw a mask of objects from large to small, so that small ones stay visible on large ones.

    Void crowds are below all objects.

    Parameters
    ----------
    objects
        COCO's annotations (polygons, or run lengths), each with its class as ``index``.
    size
        (H, W) in pixels.
    pair
        For error messages.
    crowd_is_void
        As in :func:`find_objects`.

    Returns
    -------
    (H, W) uint8

    Raises
    ------
    DataError
        For an outline that cannot be drawn; the error names its annotation.
    """
    regions = []
    for annotation in objects:
        try:
            inside = decode_segmentation(annotation["segmentation"], size)
        except Exception as error:  # pycocotools raises bare Exception among others
            number = annotation.get("id")
            raise DataError(
                pair.mask,
                f"the shape of annotation {number} of {pair.id} cannot be drawn ({error}); "
                "replace the file",
                actual=number,
            ) from error
        labelled = not (crowd_is_void and annotation.get("iscrowd"))
        order = (labelled, -int(inside.sum()), annotation["index"])
        regions.append((order, inside))
    mask = np.full(size, BACKGROUND, np.uint8)
    for (labelled, _, index), inside in sorted(regions, key=lambda region: region[0]):
        mask[inside] = index if labelled else VOID
    return mask
