"""CVAT's "Segmentation mask 1.1": Pascal VOC's folders with a list of the user's own classes."""

from __future__ import annotations

from pathlib import Path

from stages.common.errors import DataError
from stages.data.images import IMAGE_SUFFIXES
from stages.data.manifest import Pair
from stages.datasets.class_list import LABELMAP_NAME, listed_classes, read_labels
from stages.datasets.config import PrepareConfig
from stages.datasets.folder import read_masks
from stages.datasets.id_lists import IMAGES, LISTS, MASKS, read_ids
from stages.datasets.layout import DatasetLayout, file_of_stem, split_of_subset

WHERE = (
    f"{LABELMAP_NAME}, {MASKS}/ and {IMAGES}/ or images/, as CVAT exports 'Segmentation mask 1.1'; "
    "docs/datasets.md"
)
DEFAULT = "default"  # subset of images that are in none


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``SegmentationClass/ID.png`` with its image in ``JPEGImages`` or ``images``.

    Ids are those of ``ImageSets/Segmentation/SUBSET.txt``, else those of all masks.

    Raises
    ------
    DataError
        When a folder or the list of classes is missing, or an id is in two subsets.
    """
    masks = root / MASKS
    folders = [root / IMAGES, root / "images"]
    images = next((folder for folder in folders if folder.is_dir()), None)
    if images is None:
        message = f"there is no such folder, and no {folders[1]} either; {_images_remedy()}"
        raise DataError(folders[0], message)
    if not masks.is_dir():
        raise DataError(masks, f"there is no such folder; expected {WHERE}")
    classes, convert = read_masks(listed_classes(config) or read_labels(root), root, config)
    subsets = _subsets(root, config.split)
    pairs = [
        Pair(id, file_of_stem(images, id, IMAGE_SUFFIXES), masks / f"{id}.png", split)
        for id, split in sorted(subsets.items())
    ]
    return DatasetLayout(pairs, classes, convert)


def _images_remedy() -> str:
    return "export with 'Save images', or put the images there"


def _subsets(root: Path, split: str) -> dict[str, str]:
    """Return the split of each id."""
    lists = sorted((root / LISTS).glob("*.txt"))
    if not lists:
        masks = root / MASKS
        ids = [path.relative_to(masks).with_suffix("") for path in masks.rglob("*.png")]
        return {id.as_posix(): split_of_subset("", root, split) for id in ids}
    splits: dict[str, str] = {}
    for path in lists:
        name = split_of_subset("" if path.stem.lower() == DEFAULT else path.stem, path, split)
        for id in read_ids(path):
            if id in splits:
                raise DataError(path, f"id {id} is in another list, too; remove one of them")
            splits[id] = name
    return splits
