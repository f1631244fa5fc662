"""ADE20K in the form of the MIT Scene Parsing Benchmark (Zhou et al. 2017): 150 classes of scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found, first_folder
from stages.datasets.palette import bit_colour
from stages.datasets.relabel import read_values, relabel

WHERE = "ADEChallengeData2016.zip of data.csail.mit.edu/places/ADEchallenge, whose terms you accept there"
CLASS_LIST = "objectInfo150.txt"
NUM_CLASSES = 150
TABLE = {0: VOID, **{value: value - 1 for value in range(1, NUM_CLASSES + 1)}}


def find(root: Path, config: PrepareConfig) -> Found:
    """All pairs of ``images/SPLIT/ID.jpg`` and ``annotations/SPLIT/ID.png`` for the splits training and validation.

    Raises
    ------
    DataError
        When a folder or the list of classes is missing.
    """
    pairs = []
    for folder, split in (("training", "train"), ("validation", "val")):
        images = first_folder(root, (f"images/{folder}",), "images", WHERE)
        masks = first_folder(root, (f"annotations/{folder}",), "masks", WHERE)
        ids = sorted(
            {file.stem for file in images.glob("*.jpg")}
            | {file.stem for file in masks.glob("*.png")}
        )
        pairs += [Pair(id, images / f"{id}.jpg", masks / f"{id}.png", split) for id in ids]
    # Colours are those of the files' own values, of which 0 (black) is void.
    palette = tuple(bit_colour(value) for value in range(1, NUM_CLASSES + 1))
    return Found(pairs, Classes(read_names(root / CLASS_LIST), palette), _convert)


def read_names(path: Path) -> tuple[str, ...]:
    """The names of the release's own list (columns Idx, Ratio, Train, Val, Name): of several synonyms, the first.

    Raises
    ------
    DataError
        When the list is missing, or has not the 150 classes in order.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        rows = [line.split("\t") for line in lines if line.strip()]
        numbers = [int(row[0]) for row in rows]
        names = tuple(row[4].split(",")[0].strip() for row in rows)
    except OSError as error:
        raise DataError(
            path,
            f"the list of classes cannot be read ({error.strerror}); it is in the archive beside images ({WHERE})",
        ) from error
    except (IndexError, ValueError) as error:
        raise DataError(
            path, f"needs the columns Idx, Ratio, Train, Val, Name, divided by tabs ({error})"
        ) from error
    if numbers != list(range(1, NUM_CLASSES + 1)) or len(set(names)) < NUM_CLASSES:
        raise DataError(
            path,
            f"must list {NUM_CLASSES} classes of different names, numbered from 1",
            expected=NUM_CLASSES,
            actual=len(rows),
        )
    return names


def _convert(pair: Pair) -> np.ndarray:
    remedy = f"is not one of ADE20K's (0 to {NUM_CLASSES}); take the file as its owners ship it"
    return relabel(
        read_values(pair.mask), TABLE, pair.mask, name="mask value {}".format, remedy=remedy
    )
