"""COCO's object instances (Lin et al. 2014) as semantic masks: background and 80 things."""

from __future__ import annotations

from pathlib import Path

from stages.datasets import coco
from stages.datasets.coco_objects import find_objects, require_pycocotools
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout

WHERE = f"{coco.IMAGES} and annotations_trainval2017.zip {coco.SITE}"


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
    require_pycocotools("coco-instances")
    files = coco.read_annotations(root, "instances", WHERE)
    folders = {file.folder: coco.image_folder(root, file.folder, WHERE) for file in files}

    def locate(file: coco.Annotations, name: str) -> tuple[str, Path]:
        path = folders[file.folder] / Path(name).name
        return path.stem, path

    return find_objects(files, locate, crowd_is_void=True)
