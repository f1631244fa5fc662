"""Roboflow's "Semantic Segmentation Masks": images, masks and a list of classes in each split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Pair
from stages.datasets.class_list import Label, as_classes, check_names
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, pairs_by_stem, split_of_subset
from stages.datasets.relabel import Relabel
from stages.datasets.text_files import read_table

LIST = "_classes.csv"
WHERE = f"train/NAME.jpg, train/NAME_mask.png and train/{LIST}; docs/datasets.md"
VALUE, CLASS = "pixel value", "class"


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``SPLIT/NAME.jpg`` and ``SPLIT/NAME_mask.png``, with ``train``, ``valid`` and ``test``.

    Raises
    ------
    DataError
        When there is no list of classes, or it differs between splits.
    """
    lists = sorted(root.glob(f"*/{LIST}"))
    if not lists:
        raise DataError(root, f"holds no {LIST} in a folder; expected {WHERE}")
    values = _read_values(lists[0])
    for path in lists[1:]:
        if _read_values(path) != values:
            message = f"differs from {lists[0]}; export all splits in one version"
            raise DataError(path, message)
    labels = [Label(name, None) for name in values.values()]
    classes = as_classes(labels, VOID, lists[0])
    index = {name: number for number, name in enumerate(classes.names)}
    table = {value: index.get(name, VOID) for value, name in values.items()}
    relabel = Relabel({VOID: VOID, **table}, f"is not in {lists[0]}; add it, or correct the mask")
    is_unchanged = all(value == number for value, number in table.items())
    pairs = [
        pair
        for folder in (path.parent for path in lists)
        for pair in pairs_by_stem(
            folder,
            folder,
            split_of_subset(folder.name, folder, config.split),
            f"{folder.name}/",
            "{name}_mask",
        )
    ]

    def convert(pair: Pair) -> np.ndarray | None:
        return None if is_unchanged else relabel(pair)

    return DatasetLayout(pairs, classes, convert)


def _read_values(path: Path) -> dict[int, str]:
    """Read the class names by mask value."""
    rows = read_table(path, "the class list", VALUE, "Pixel Value, Class")
    check_names([row.get(CLASS, "") for row in rows], path)
    try:
        return {int(row[VALUE]): row[CLASS] for row in rows if row[CLASS]}
    except (KeyError, ValueError) as error:
        message = f"must have lines `0, background` below `Pixel Value, Class` ({error})"
        raise DataError(path, message) from error
