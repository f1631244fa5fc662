"""Your own data: ``images/`` and ``masks/`` with equal names, and a list of classes."""

from __future__ import annotations

import colorsys
import csv
from pathlib import Path

from stages.data.images import IMAGE_SUFFIXES, MASK_SUFFIXES
from stages.data.manifest import SPLITS, Classes, Pair
from stages.data.splits import halve, random_split
from stages.errors import DataError

CLASS_LIST = "classes.csv"


def read_classes(path: Path, void_index: int) -> Classes:
    """Classes of a CSV file: a header line ``name`` or ``name,red,green,blue``, then one line a mask value from 0 on.

    Classes without a colour get one of evenly spread hues.

    Raises
    ------
    DataError
        When the list is missing, empty, names a class twice, or has a colour out of range.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except FileNotFoundError:
        raise DataError(path, "the class list is missing; write `name` and then one class name a line, mask value 0 first") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, f"the class list cannot be read ({error})") from error
    names = tuple((row.get("name") or "").strip() for row in rows)
    if not names or not all(names):
        raise DataError(path, "must have a header line with `name`, and a name on every line below it")
    if len(set(names)) < len(names):
        raise DataError(path, "a class name stands twice; names must differ")
    if len(names) > void_index:
        raise DataError(path, f"{len(names)} classes leave no room for the void value {void_index}")
    palette = []
    for value, row in enumerate(rows):
        hue = colorsys.hsv_to_rgb(value * 0.618 % 1, 0.65, 0.95) if value else (0.0, 0.0, 0.0)
        texts = [row.get(channel) for channel in ("red", "green", "blue")]
        try:
            colour = tuple(int(text) for text in texts if text) if any(texts) else tuple(round(255 * part) for part in hue)
        except ValueError:
            colour = ()
        if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
            raise DataError(path, f"the colour of class {names[value]!r} must be three numbers of 0 to 255, found {texts}")
        palette.append((colour[0], colour[1], colour[2]))
    return Classes(names=names, palette=tuple(palette), void_index=void_index)


def pairs(root: Path, *, split: str, ratios: tuple[float, float, float], seed: int) -> list[Pair]:
    """All pairs of ``images/NAME.*`` and ``masks/NAME.*``.

    With ``split: official`` the pairs lie in ``images/train``, ``masks/train`` and so on (without ``test``, val is
    halved by ``seed``); with ``random`` they lie directly in ``images`` and ``masks``.

    Raises
    ------
    DataError
        When a folder is missing, or two files share a name.
    """
    if split == "random":
        found = _pairs_of(root / "images", root / "masks", "", "")
        splits = random_split([pair.id for pair in found], ratios, seed)
        return [Pair(pair.id, pair.image, pair.mask, splits[pair.id]) for pair in found]
    if not (root / "images" / "train").is_dir():
        message = "there is no such folder; for pairs directly in images/ and masks/ set prepare.split to random"
        raise DataError(root / "images" / "train", message)
    found = []
    for name in SPLITS:
        if (root / "images" / name).is_dir():
            found += _pairs_of(root / "images" / name, root / "masks" / name, f"{name}/", name)
    if not any(pair.split == "test" for pair in found):
        splits = halve([pair.id for pair in found if pair.split == "val"], seed)
        found = [Pair(pair.id, pair.image, pair.mask, splits.get(pair.id, pair.split)) for pair in found]
    return found


def _pairs_of(images: Path, masks: Path, prefix: str, split: str) -> list[Pair]:
    by_name: dict[str, Path] = {}
    for folder, suffixes, what in ((images, IMAGE_SUFFIXES, "photographs"), (masks, MASK_SUFFIXES, "masks")):
        if not folder.is_dir():
            raise DataError(folder, f"there is no such folder; put the {what} there")
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in suffixes or file.name.startswith("."):
                continue
            key = f"{what}/{file.stem}"
            if key in by_name:
                raise DataError(file, f"has the same id ({file.stem}) as {by_name[key].name}; rename one of them")
            by_name[key] = file
    names = sorted({key.split("/", 1)[1] for key in by_name})
    return [
        Pair(
            prefix + name,
            by_name.get(f"photographs/{name}", images / f"{name}.jpg"),  # a name that one side lacks is reported as missing
            by_name.get(f"masks/{name}", masks / f"{name}.png"),
            split,
        )
        for name in names
    ]
