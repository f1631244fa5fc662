"""Cityscapes, finely annotated (Cordts et al. 2016): 19 classes of street scenes.

Ids, names and colours are those of the owners' cityscapesScripts.
"""

from __future__ import annotations

from pathlib import Path

from stages.data.images import VOID
from stages.data.manifest import Classes
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_folder, pairs_by_suffix
from stages.datasets.relabel import Relabel

WHERE = (
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com, "
    "after registering there"
)
IMAGE_SUFFIX, MASK_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"

# Name and colour by label id, in the order of the owners' train ids.
LABELS = {
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}
LAST_LABEL = 33
CLASSES = Classes(
    tuple(name for name, _ in LABELS.values()), tuple(colour for _, colour in LABELS.values())
)
convert = Relabel(
    {
        **dict.fromkeys(range(LAST_LABEL + 1), VOID),
        **{label: index for index, label in enumerate(LABELS)},
    },
    remedy=(
        f"is none of Cityscapes' label ids (0 to {LAST_LABEL}); "
        f"take the *{MASK_SUFFIX} files as their owners ship them"
    ),
    name="label id {}".format,
)


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png`` and ``gtFine/SPLIT/CITY/ID_*.png``.

    Split ``test`` is not read: its labels are not public, its masks hold only void.

    Raises
    ------
    DataError
        When a folder is missing.
    """
    pairs = [
        pair
        for split in ("train", "val")
        for pair in pairs_by_suffix(
            first_folder(root, (f"leftImg8bit/{split}",), "images", WHERE),
            first_folder(root, (f"gtFine/{split}",), "masks", WHERE),
            split,
            image_suffix=IMAGE_SUFFIX,
            mask_suffix=MASK_SUFFIX,
            below="*/",
        )
    ]
    return DatasetLayout(pairs, CLASSES, convert)
