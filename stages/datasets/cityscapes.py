"""Cityscapes, finely annotated (Cordts et al. 2016): 19 classes of street scenes.

Ids, names and colours are those of the owners' cityscapesScripts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stages.data.images import VOID
from stages.data.manifest import Classes, Pair
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found, first_folder
from stages.datasets.relabel import read_values, relabel

WHERE = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com, after registering there"
IMAGE_END, MASK_END = "_leftImg8bit.png", "_gtFine_labelIds.png"

# label id: name, colour; in the order of the owners' train ids
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
TABLE = {
    **dict.fromkeys(range(LAST_LABEL + 1), VOID),
    **{label: index for index, label in enumerate(LABELS)},
}


def find(root: Path, config: PrepareConfig) -> Found:
    """All pairs of ``leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png`` and ``gtFine/SPLIT/CITY/ID_gtFine_labelIds.png``.

    ``test`` is left alone: its masks are ones of void, the labels are not public.

    Raises
    ------
    DataError
        When a folder is missing.
    """
    pairs = []
    for split in ("train", "val"):
        images = first_folder(root, (f"leftImg8bit/{split}",), "images", WHERE)
        masks = first_folder(root, (f"gtFine/{split}",), "masks", WHERE)
        # A image without a mask, or the other way round, is reported as missing when the pair is checked.
        ids = {
            file.relative_to(images).as_posix().removesuffix(IMAGE_END)
            for file in images.glob(f"*/*{IMAGE_END}")
        }
        ids |= {
            file.relative_to(masks).as_posix().removesuffix(MASK_END)
            for file in masks.glob(f"*/*{MASK_END}")
        }
        pairs += [
            Pair(Path(id).name, images / f"{id}{IMAGE_END}", masks / f"{id}{MASK_END}", split)
            for id in sorted(ids)
        ]
    return Found(pairs, CLASSES, _convert)


def _convert(pair: Pair) -> np.ndarray:
    remedy = f"is none of Cityscapes' label ids (0 to {LAST_LABEL}); take the *{MASK_END} files as their owners ship them"
    return relabel(
        read_values(pair.mask), TABLE, pair.mask, name="label id {}".format, remedy=remedy
    )
