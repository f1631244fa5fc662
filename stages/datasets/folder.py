"""Your own data: ``images/`` and ``masks/`` with equal names, and a list of classes.

Masks are indices (one channel: modes L and P, whatever the palette) or colours (mode RGB, as CVAT exports them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import SPLITS, Pair
from stages.datasets.class_list import Label, as_classes, by_line, first_value, read_labels
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found, pairs_of
from stages.datasets.relabel import (
    colour_number,
    is_coloured,
    name_colour,
    read_colours,
    read_values,
    relabel,
)

WHERE = "images/, masks/ and classes.csv; docs/datasets.md"


def find(root: Path, config: PrepareConfig) -> Found:
    """All pairs of ``images/NAME.*`` and ``masks/NAME.*``, or of ``images/SPLIT/NAME.*`` and ``masks/SPLIT/NAME.*``.

    A class named void, ignore or unlabeled is none: its colour, and the number of its line, mean that there is no label.

    Raises
    ------
    DataError
        When a folder or the list of classes is missing or wrong, or two files share a name.
    """
    labels = [
        Label(name, colour) for line in config.classes for name, colour in line.items()
    ] or read_labels(root)
    classes = as_classes(labels, config.void_index, root)
    converter = _Converter(labels, config.void_index)
    return Found(_pairs(root, config.split), classes, converter.convert)


def _pairs(root: Path, split: str) -> list[Pair]:
    images, masks = root / "images", root / "masks"
    if not (images / "train").is_dir():
        if split == "random":
            return pairs_of(images, masks, "train")
        message = "there is no such folder; for pairs directly in images/ and masks/ set prepare.split to random"
        raise DataError(images / "train", message)
    return [
        pair
        for name in SPLITS
        if (images / name).is_dir()
        for pair in pairs_of(images / name, masks / name, name, f"{name}/")
    ]


class _Converter:
    """Gives masks that are not used as they are: those in colours, and all where the list has a line for void."""

    def __init__(self, labels: Sequence[Label], void_index: int) -> None:
        indices = by_line(labels)
        self.values = {void_index: VOID, **dict(enumerate(indices, first_value(labels)))}
        self.has_void = VOID in indices
        self.colours = {
            colour_number(label.colour): index
            for label, index in zip(labels, indices, strict=True)
            if label.colour is not None
        }
        # What is wrong with the colours matters to masks that have them alone.
        self.problem = ""
        shared = [
            colour
            for colour, count in Counter(label.colour for label in labels).items()
            if colour is not None and count > 1
        ]
        if shared:
            names = " and ".join(repr(label.name) for label in labels if label.colour == shared[0])
            self.problem = (
                f"the classes {names} share the colour {shared[0]}; give them different ones"
            )
        without = [label.name for label in labels if label.colour is None]
        if without:
            self.problem = f"the class {without[0]!r} has no colour; add columns red,green,blue to the list of classes"

    def convert(self, pair: Pair) -> np.ndarray | None:
        """The mask as (H, W) uint8 class indices, 255 for void; None where the file holds just that."""
        if not is_coloured(pair.mask):
            if not self.has_void:
                return None
            remedy = "is no line of the list of classes; correct the mask or the list"
            return relabel(
                read_values(pair.mask),
                self.values,
                pair.mask,
                name="mask value {}".format,
                remedy=remedy,
            )
        colours = read_colours(pair.mask)
        if self.problem:
            raise DataError(pair.mask, f"the mask is of colours (mode RGB), but {self.problem}")
        remedy = "is that of no class; correct the mask, or add the class (or one named void) to the list of classes"
        return relabel(colours, self.colours, pair.mask, name=name_colour, remedy=remedy)
