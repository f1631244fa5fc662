"""Lists of classes that people write or annotation tools export: ``classes.csv``, and CVAT's ``labelmap.txt``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Classes
from stages.datasets.palette import Colour, hue_colour

CSV_NAME, LABELMAP_NAME = "classes.csv", "labelmap.txt"
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "__ignore__", "_ignore_")
LABELME_VOID = "__ignore__"  # the first line of every list of LabelMe's


@dataclass(frozen=True)
class Label:
    """One line of a list: a mask value is the number of its line (see :func:`first_value`), a colour the one that stands there."""

    name: str
    colour: Colour | None

    @property
    def is_void(self) -> bool:
        """Whether it stands for pixels without a label."""
        return self.name.lower() in VOID_NAMES


def read_labels(root: Path) -> list[Label]:
    """The list in ``root``: ``classes.csv``, else ``labelmap.txt``.

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
        message = "the class list is missing; write `name` and then one class name a line, mask value 0 first"
        raise DataError(path, f"{message}, or put CVAT's {LABELMAP_NAME} there") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"the class list cannot be read ({error})") from error
    labels = []
    for name, texts in rows:
        try:
            parts = tuple(int(text) for text in texts)
        except ValueError:
            parts = (-1,)
        if parts and (len(parts) != 3 or not all(0 <= part <= 255 for part in parts)):
            raise DataError(
                path,
                f"the colour of class {name!r} must be three numbers of 0 to 255, found {texts}",
            )
        labels.append(Label(name, (parts[0], parts[1], parts[2]) if parts else None))
    names = [label.name for label in labels]
    if not names or not all(names):
        raise DataError(
            path, "must have a name on every line (in classes.csv below a header line with `name`)"
        )
    if len(set(names)) < len(names):
        raise DataError(path, "a class name stands twice; names must differ")
    return labels


def as_classes(labels: Sequence[Label], void_index: int, path: Path) -> Classes:
    """The classes of a list, void left out; those without a colour get one of evenly spread hues.

    Raises
    ------
    DataError
        When there are none, or too many to leave the void value free; it names ``path``.
    """
    real = [label for label in labels if not label.is_void]
    if not real:
        raise DataError(path, "lists no class but void")
    if len(real) > void_index:
        raise DataError(path, f"{len(real)} classes leave no room for the void value {void_index}")
    palette = tuple(label.colour or hue_colour(value) for value, label in enumerate(real))
    return Classes(tuple(label.name for label in real), palette, void_index)


def by_line(labels: Sequence[Label]) -> list[int]:
    """Class index, or 255 for void, by line of the list."""
    real = [label.name for label in labels if not label.is_void]
    return [VOID if label.is_void else real.index(label.name) for label in labels]


def first_value(labels: Sequence[Label]) -> int:
    """The mask value of the first line: 0, but -1 where it is LabelMe's ``__ignore__``, so that the line after it is 0."""
    return -1 if labels[0].name == LABELME_VOID else 0


def _csv_rows(path: Path) -> list[tuple[str, list[str]]]:
    """Names and colours' texts below a header line ``name`` or ``name,red,green,blue``."""
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
    """The same from lines ``label:red,green,blue:parts:actions``; those that start with # are comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    fields = [line.split(":") for line in lines if line and not line.startswith("#")]
    return [
        (
            row[0].strip(),
            [text for text in row[1].split(",") if text.strip()] if len(row) > 1 else [],
        )
        for row in fields
    ]
