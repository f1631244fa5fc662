"""Lists of classes that people write or annotation tools export.

These are ``classes.csv`` and CVAT's ``labelmap.txt``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import DataError
from stages.data.manifest import Classes
from stages.datasets.palette import Colour, hue_colour

CSV_NAME, LABELMAP_NAME = "classes.csv", "labelmap.txt"
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "__ignore__", "_ignore_")
LABELME_VOID = "__ignore__"  # first line of LabelMe's lists; its mask value is -1


@dataclass(frozen=True)
class Label:
    """One line of a list; the mask value is the line's number, from 0."""

    name: str
    colour: Colour | None

    @property
    def is_void(self) -> bool:
        """Whether pixels of this name or colour have no label."""
        return self.name.lower() in VOID_NAMES


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
    try:
        rows = _csv_rows(path) if path.name == CSV_NAME else _labelmap_rows(path)
    except FileNotFoundError:
        raise DataError(
            path,
            "the class list is missing; write `name` and then one class name a line, "
            f"mask value 0 first, or put CVAT's {LABELMAP_NAME} there",
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"the class list cannot be read ({error})") from error
    labels = [Label(name, _colour(path, name, texts)) for name, texts in rows]
    names = [label.name for label in labels]
    if not names or not all(names):
        raise DataError(
            path, "must have a name on every line (in classes.csv below a header line with `name`)"
        )
    if len(set(names)) < len(names):
        raise DataError(path, "a class name stands twice; names must differ")
    return labels


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
    try:
        red, green, blue = map(int, texts)
        bytes((red, green, blue))  # refuses numbers outside of 0..255
    except ValueError:
        raise DataError(
            path, f"the colour of class {name!r} must be three numbers of 0 to 255, found {texts}"
        ) from None
    return red, green, blue


def _csv_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Read names and colours below a header line ``name`` or ``name,red,green,blue``."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    return [
        (
            (row.get("name") or "").strip(),
            [text for key in ("red", "green", "blue") if (text := row.get(key))],
        )
        for row in rows
    ]


def _labelmap_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Read names and colours from lines ``label:red,green,blue:parts:actions``; # is a comment."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    fields = [f"{line}:".split(":") for line in lines if line and not line.startswith("#")]
    return [
        (name.strip(), [text for text in colour.split(",") if text.strip()])
        for name, colour, *_ in fields
    ]
