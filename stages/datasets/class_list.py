"""Lists of classes that people write or annotation tools export.

These are ``classes.csv``, CVAT's ``labelmap.txt`` and LabelMe's ``labels.txt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Classes
from stages.datasets.config import PrepareConfig
from stages.datasets.palette import Colour, bit_colour, hue_colour
from stages.datasets.text_files import read_table, read_text

CSV_NAME, LABELMAP_NAME = "classes.csv", "labelmap.txt"
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "__ignore__", "_ignore_")
BACKGROUND_NAMES = ("background", "_background_", "__background__")
LABELME_VOID = "__ignore__"  # first line of LabelMe's lists; its mask value is -1
WHAT = "the class list"


@dataclass(frozen=True)
class Label:
    """One line of a list; the mask value is the line's number, from 0."""

    name: str
    colour: Colour | None

    @property
    def is_void(self) -> bool:
        """Whether pixels of this name or colour have no label."""
        return self.name.lower() in VOID_NAMES


def listed_classes(config: PrepareConfig) -> list[Label]:
    """Return the classes of ``prepare.classes``, in its order; empty where it lists none."""
    return [Label(name, colour) for line in config.classes for name, colour in line.items()]


def read_labels(root: Path) -> list[Label]:
    """Read the list in ``root``: ``classes.csv``, else ``labelmap.txt``.

    Raises
    ------
    DataError
        When there is none, or it is empty, names a class twice, or has a colour out of range.
    """
    path = root / CSV_NAME
    if not path.exists() and (root / LABELMAP_NAME).exists():
        path = root / LABELMAP_NAME
    if not path.exists():
        raise DataError(
            path,
            "the class list is missing; write `name` and then one class name a line, "
            f"mask value 0 first, or put CVAT's {LABELMAP_NAME} there",
        )
    rows = _csv_rows(path) if path.name == CSV_NAME else _labelmap_rows(path)
    labels = [Label(name, _colour(path, name, texts)) for name, texts in rows]
    if not labels or not all(label.name for label in labels):
        raise DataError(
            path, "must have a name on every line (in classes.csv below a header line with `name`)"
        )
    check_names([label.name for label in labels], path)
    return labels


def check_names(names: Sequence[str], path: Path) -> None:
    """Refuse a list that names a class twice.

    Raises
    ------
    DataError
        With the name.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(path, f"the class {twice!r} occurs twice; names must differ", actual=twice)


def drawn_classes(labels: Sequence[Label], path: Path) -> tuple[Classes, dict[str, int]]:
    """Return the classes of masks that are drawn from outlines, and each name's class index.

    Pixels outside of all outlines are of the class 0, ``background``. A label of such a name is
    this class. A label with a name that means void has the index 255.

    Parameters
    ----------
    labels
        Names of the tool, in the order of the other classes.
    path
        For the error message.

    Raises
    ------
    DataError
        When a name occurs twice, or there are more than 255 classes.
    """
    check_names([label.name for label in labels], path)
    named = [label for label in labels if label.name.lower() in BACKGROUND_NAMES]
    background = named[0] if named else Label("background", None)
    ordered = [background, *(label for label in labels if label is not background)]
    real = [label for label in ordered if not label.is_void]
    coloured = [
        Label(label.name, label.colour or bit_colour(value)) for value, label in enumerate(real)
    ]
    classes = as_classes(coloured, VOID, path)
    index = {label.name: number for number, label in enumerate(real)}
    return classes, {label.name: index.get(label.name, VOID) for label in ordered}


def as_classes(labels: Sequence[Label], void_index: int, path: Path) -> Classes:
    """Return the classes of a list without void; those without a colour get an evenly spread hue.

    Parameters
    ----------
    labels
        Lines of the list.
    void_index
        Mask value of pixels without a label, 1..255.
    path
        For the error message.

    Raises
    ------
    DataError
        When there is no class, or there are more than ``void_index``.
    """
    real = [label for label in labels if not label.is_void]
    if not real:
        raise DataError(path, "lists no class but void")
    if len(real) > void_index:
        raise DataError(path, f"{len(real)} classes leave no room for the void value {void_index}")
    palette = tuple(label.colour or hue_colour(value) for value, label in enumerate(real))
    return Classes(tuple(label.name for label in real), palette, void_index)


def _colour(path: Path, name: str, texts: list[str]) -> Colour | None:
    if not texts:
        return None
    try:  # spreadsheets write 250 as 250.0
        red, green, blue = (int(part) for part in map(float, texts) if part.is_integer())
        bytes((red, green, blue))  # refuses numbers outside of 0..255
    except ValueError:
        raise DataError(
            path, f"the colour of class {name!r} must be three numbers of 0 to 255, found {texts}"
        ) from None
    return red, green, blue


def _csv_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Read names and colours below a header line ``name`` or ``name,red,green,blue``."""
    rows = read_table(path, WHAT, "name", "name,red,green,blue")
    return [
        (row["name"], [text for key in ("red", "green", "blue") if (text := row.get(key))])
        for row in rows
    ]


def _labelmap_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Read names and colours from lines ``label:red,green,blue:parts:actions``; # is a comment."""
    lines = [line.strip() for line in read_text(path, WHAT).splitlines()]
    fields = [f"{line}:".split(":") for line in lines if line and not line.startswith("#")]
    return [
        (name.strip(), [text for text in colour.split(",") if text.strip()])
        for name, colour, *_ in fields
    ]
