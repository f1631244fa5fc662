"""COCO's JSON as labelling tools export it, with the user's own categories.

CVAT writes ``annotations/instances_SUBSET.json`` and ``images/SUBSET``. Roboflow writes
``SUBSET/_annotations.coco.json`` beside the images. Label Studio and LabelMe's ``labelme2coco``
write one file in the root.
"""

from __future__ import annotations

from pathlib import Path

from stages.common.errors import DataError
from stages.datasets import coco
from stages.datasets.coco_objects import find_objects, require_pycocotools
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_file, image_id, split_of_subset

WHERE = (
    "annotations/instances_default.json and images/ (CVAT), train/_annotations.coco.json "
    "(Roboflow), or one JSON beside images/; docs/datasets.md"
)
ROBOFLOW = "_annotations.coco.json"
PATTERNS = ("annotations/*.json", f"*/{ROBOFLOW}", "*.json")


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find the annotation files of any tool, and their images.

    Raises
    ------
    ConfigError
        When pycocotools is not installed.
    DataError
        When there is no annotation file, or one is damaged or has other categories.
    """
    require_pycocotools("coco")
    paths = next((found for name in PATTERNS if (found := sorted(root.glob(name)))), [])
    if not paths:
        raise DataError(root, f"holds no annotations in COCO's JSON; expected {WHERE}")
    subsets = {path: _subset(path) for path in paths}
    files = [
        coco.read_file(path, name, split_of_subset(name, path, config.split), WHERE)
        for path, name in subsets.items()
    ]
    coco.check_categories(files)

    def locate(file: coco.Annotations, name: str) -> tuple[str, Path]:
        beside = () if file.path.parent.name == "annotations" else (file.path.parent,)
        images = root / "images"
        folders = (*beside, images / file.folder, images, root / file.folder, root)
        return image_id(name), first_file(folders, name)

    return find_objects(files, locate, crowd_is_void=False)


def _subset(path: Path) -> str:
    """Return the name of the tool's subset: that of Roboflow's folder, or of CVAT's file."""
    if path.name == ROBOFLOW:
        return path.parent.name
    name = path.stem.rpartition("instances_")[2]
    return name if path.parent.name == "annotations" and name != "default" else ""
