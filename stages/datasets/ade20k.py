"""ADE20K as in the MIT Scene Parsing Benchmark (Zhou et al. 2017): 150 classes of scenes."""

from __future__ import annotations

from pathlib import Path

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import Classes
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_folder, pairs_by_suffix
from stages.datasets.palette import bit_colour
from stages.datasets.relabel import Relabel
from stages.datasets.text_files import read_text

WHERE = (
    "ADEChallengeData2016.zip of data.csail.mit.edu/places/ADEchallenge, "
    "whose terms you accept there"
)
CLASS_LIST = "objectInfo150.txt"
NUM_CLASSES = 150
# Colours by a mask's value; value 0 (black) is void.
PALETTE = tuple(bit_colour(value) for value in range(1, NUM_CLASSES + 1))
convert = Relabel(
    {0: VOID, **{value: value - 1 for value in range(1, NUM_CLASSES + 1)}},
    remedy=f"is not one of ADE20K's (0 to {NUM_CLASSES}); take the file as its owners ship it",
)


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``images/SPLIT/ID.jpg`` and ``annotations/SPLIT/ID.png``.

    The splits are training and validation.

    Raises
    ------
    DataError
        When a folder or the list of classes is missing.
    """
    pairs = [
        pair
        for folder, split in (("training", "train"), ("validation", "val"))
        for pair in pairs_by_suffix(
            first_folder(root, (f"images/{folder}",), "images", WHERE),
            first_folder(root, (f"annotations/{folder}",), "masks", WHERE),
            split,
        )
    ]
    return DatasetLayout(pairs, Classes(read_names(root / CLASS_LIST), PALETTE), convert)


def read_names(path: Path) -> tuple[str, ...]:
    """Read the class names from the release's list; of several synonyms, the first.

    The list's columns are Idx, Ratio, Train, Val, Name.

    Raises
    ------
    DataError
        When the list is missing, or does not have the 150 classes in order.
    """
    remedy = f"it is in the archive beside images ({WHERE})"
    lines = read_text(path, "the list of classes", remedy).splitlines()[1:]
    try:
        rows = [line.split("\t") for line in lines if line.strip()]
        names = {int(row[0]): row[4].split(",")[0].strip() for row in rows}
    except (IndexError, ValueError) as error:
        raise DataError(
            path, f"needs the columns Idx, Ratio, Train, Val, Name, divided by tabs ({error})"
        ) from error
    if list(names) != list(range(1, NUM_CLASSES + 1)) or len({*names.values()}) != len(rows):
        raise DataError(
            path,
            f"must list {NUM_CLASSES} classes of different names, numbered from 1",
            expected=NUM_CLASSES,
            actual=len(rows),
        )
    return tuple(names.values())
