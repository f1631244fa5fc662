"""All data sets by name, and the pairs of one in their final splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from stages.common.errors import ConfigError, DataError
from stages.data.images import broken_link
from stages.data.manifest import Pair
from stages.datasets import (
    ade20k,
    camvid,
    cityscapes,
    coco_export,
    coco_instances,
    coco_panoptic,
    coco_stuff,
    cvat_masks,
    cvat_xml,
    folder,
    labelme,
    roboflow_masks,
    voc,
    wastesim,
)
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout
from stages.datasets.recognise import recognise, signature
from stages.datasets.remap import kept_classes, remap_classes
from stages.datasets.splits import assign, keep_train_fraction, select_fold
from stages.datasets.unlabelled import find_unlabelled

# Each has ``find(root, config)`` and ``WHERE`` (where to get it); ``archives(root, config)`` only
# where the owners allow a download.
DATASETS: dict[str, ModuleType] = {
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "coco-panoptic": coco_panoptic,
    "coco-stuff": coco_stuff,
    "coco-instances": coco_instances,
    "camvid": camvid,
    "folder": folder,
    "labelme": labelme,
    "cvat-masks": cvat_masks,
    "cvat-xml": cvat_xml,
    "coco": coco_export,
    "roboflow-masks": roboflow_masks,
}


def find(
    config: PrepareConfig, draw: Callable[[], list[Pair]] | None = None
) -> tuple[PrepareConfig, DatasetLayout]:
    """Find the pairs of a data set, in their final splits, without those that are left out.

    Parameters
    ----------
    config
        Name and folder of the data set, and how it is divided.
    draw
        Draws the pairs of wastesim, which has no files of its own.

    Returns
    -------
    PrepareConfig, DatasetLayout
        The settings, with the name of the data set that ``auto`` recognised; the pairs.

    Raises
    ------
    ConfigError
        When the data set is drawn, and nobody draws it; when there are too few pairs for a fold.
    DataError
        When the folder is missing, or has not the layout of ``config.dataset``.
    """
    root, seed = Path(config.root), config.split_seed
    if config.dataset == "auto" and root.is_dir():
        name = recognise(root)
        tqdm.write(f"prepare: dataset {name}, recognised by {signature(name)}")
        config = config.model_copy(update={"dataset": name})
    dataset = DATASETS.get(config.dataset)
    where = f" ({dataset.WHERE})" if dataset is not None else ""
    if link := broken_link(root):
        raise DataError(root, f"is {link}")
    if not root.is_dir():
        message = f"there is no such folder; set prepare.root to the folder of your data set{where}"
        raise DataError(root, message)
    if dataset is not None:
        layout: DatasetLayout = dataset.find(root, config)
        pairs = assign(layout.pairs, split=config.split, ratios=config.ratios, seed=seed)
    elif draw is not None:
        layout = DatasetLayout(pairs := draw(), wastesim.CLASSES)
    else:
        message = f"{config.dataset} is drawn by the prepare stage; there are no files to check"
        raise ConfigError("prepare.dataset", message, actual=config.dataset)
    if config.remap:
        names = ", ".join(kept_classes(layout.classes, config.remap)) or "none"
        tqdm.write(f"prepare: classes that prepare.remap leaves as they are: {names}")
        layout = remap_classes(layout, config.remap)
    if not pairs:
        raise DataError(root, f"holds no images with masks{where}")
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(
                root,
                f"the name {path.name!r} is not in UTF-8, as manifests and stores are; "
                "rename the file",
            ) from None
    kept = keep_train_fraction(pairs, config.train_fraction, seed)
    unlabelled = find_unlabelled(config, pairs, kept)
    pairs = select_fold(kept, config.fold, seed)
    return config, replace(layout, pairs=pairs, unlabelled=unlabelled)
