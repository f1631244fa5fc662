"""Your own data: ``images/`` and ``masks/`` with equal names, and a list of classes.

Masks are indices (one channel: modes L and P, whatever the palette) or colours (mode RGB, as CVAT
exports them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID
from stages.data.manifest import SPLITS, Classes, Pair
from stages.data.masks import TRANSPARENT
from stages.datasets.class_list import (
    LABELME_VOID,
    Label,
    as_classes,
    listed_classes,
    read_labels,
)
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Convert, DatasetLayout, pairs_by_stem
from stages.datasets.relabel import (
    Relabel,
    colour_number,
    grey_values,
    is_coloured,
    name_colour,
    read_colours,
)

WHERE = "images/, masks/ and classes.csv; docs/datasets.md"


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``images/NAME.*`` and ``masks/NAME.*``, or ``images/SPLIT/NAME.*`` and so on.

    A class named void, ignore or unlabeled is not a class: its colour, and the number of its line,
    mean that a pixel has no label.

    Raises
    ------
    DataError
        When a folder or the list of classes is missing or wrong, or two files share a name.
    """
    labels = listed_classes(config) or read_labels(root)
    classes, convert = read_masks(labels, root, config)
    return DatasetLayout(_pairs(root, config), classes, convert)


def read_masks(
    labels: Sequence[Label], root: Path, config: PrepareConfig
) -> tuple[Classes, Convert]:
    """Return the classes of a list, and what converts masks of its indices or colours.

    Raises
    ------
    DataError
        When the list has no class, or too many.
    """
    classes = as_classes(labels, config.void_index, root)
    indices = [VOID if label.is_void else classes.names.index(label.name) for label in labels]
    first_value = -1 if labels[0].name == LABELME_VOID else 0
    if config.binary and len(classes.names) != 2:
        raise ConfigError(
            "prepare.binary",
            f"needs two classes, background and object; {root} has {len(classes.names)}",
            expected=2,
            actual=len(classes.names),
        )
    extra = {255: 1} if config.binary else {}
    if config.transparent == "void":
        extra[TRANSPARENT] = VOID
    by_value = Relabel(
        {config.void_index: VOID, **dict(enumerate(indices, first_value)), **extra},
        "is no line of the list of classes; correct the mask or the list",
    )
    by_colour = Relabel(
        {
            colour_number(label.colour): index
            for label, index in zip(labels, indices, strict=True)
            if label.colour is not None
        }
        | {value: index for value, index in extra.items() if value == TRANSPARENT},
        "is that of no class; "
        "correct the mask, or add the class (or one named void) to the list of classes",
        name_colour,
        read_colours,
    )
    problem = _problem_with_colours(labels)
    # A grey of the list whose value is also the index of another class is ambiguous.
    doubtful = {
        value
        for value, index in by_value.table.items()
        if by_colour.table.get(colour_number((value, value, value)), index) != index
    }

    def convert(pair: Pair) -> np.ndarray | None:
        if not is_coloured(pair.mask):
            return by_value(pair) if VOID in indices or extra else None
        colours = read_colours(pair.mask)
        grey = grey_values(colours)
        if grey is not None and (problem or _is_index(grey, colours, by_colour.table, doubtful)):
            return by_value.indices(grey, pair)
        if problem:
            raise DataError(pair.mask, f"the mask is of colours (mode RGB), but {problem}")
        return by_colour.indices(colours, pair)

    return classes, convert


def _pairs(root: Path, config: PrepareConfig) -> list[Pair]:
    images, masks, pattern = root / "images", root / "masks", config.mask_pattern
    if (images / "train").is_dir():
        return [
            pair
            for name in SPLITS
            if (images / name).is_dir()
            for pair in pairs_by_stem(images / name, masks / name, name, f"{name}/", pattern)
        ]
    if config.split == "random":
        return pairs_by_stem(images, masks, "train", pattern=pattern)
    raise DataError(
        images / "train",
        "there is no such folder; for pairs directly in images/ and masks/ "
        "set prepare.split to random",
    )


def _is_index(
    grey: np.ndarray, colours: np.ndarray, known: Mapping[int, int], doubtful: set[int]
) -> bool:
    """Return whether greys (H, W) of a data set with colours are class indices.

    Some grey must be none of the known colours, and all must mean one class by either reading.
    Black is no sign: it is also the colour of what nobody painted.
    """
    unknown = set(np.unique(grey[~np.isin(colours, list(known))]).tolist()) - {0}
    return bool(unknown) and doubtful.isdisjoint(np.unique(grey).tolist())


def _problem_with_colours(labels: Sequence[Label]) -> str:
    """Say what is wrong with the list's colours; it matters only to masks of colours."""
    first: dict[tuple[int, int, int], str] = {}
    for label in labels:
        if label.colour is None:
            return (
                f"the class {label.name!r} has no colour; "
                "add columns red,green,blue to the list of classes"
            )
        other = first.setdefault(label.colour, label.name)
        if other != label.name:
            return (
                f"the classes {other!r} and {label.name!r} share the colour {label.colour}; "
                "give them different ones"
            )
    return ""
