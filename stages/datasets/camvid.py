"""CamVid (Brostow et al. 2009) with its usual 11 classes: the owners' release, or SegNet's copy in either of its layouts.

The owners' masks are colours of 32 classes. The grouping is that of MathWorks's CamVid example, the classes' order
SegNet's (Badrinarayanan et al. 2017).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import SPLITS, Classes, Pair
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import Found, pairs_of
from stages.datasets.relabel import colour_number, name_colour, read_colours, relabel

WHERE = "701_StillsRaw_full.zip and LabeledApproved_full.zip of mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid, or SegNet's copy"
STILLS, LABELS = "701_StillsRaw_full", "LabeledApproved_full"
SEGNET_VOID = 11
LAST_FOR_TRAINING = 8520  # frame of drive 0001TP
DENSE_FRAMES = range(7959, 8160)  # of drive 0016E5
# The colours of label_colors.txt by class, the class's own first; black is Void.
GROUPS = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Building": (128, 0, 0), "Archway": (192, 0, 128), "Bridge": (0, 128, 64), "Tunnel": (64, 0, 64), "Wall": (64, 192, 0),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {"Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64)},
    "pavement": {"Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192)},
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign": {"SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64), "TrafficLight": (0, 64, 64)},
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128), "SUVPickupTruck": (64, 128, 192), "Truck_Bus": (192, 128, 192), "Train": (192, 64, 128),
        "OtherMoving": (128, 64, 64),
    },
    "pedestrian": {
        "Pedestrian": (64, 64, 0), "Child": (192, 128, 64), "CartLuggagePram": (64, 0, 192), "Animal": (64, 128, 64),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}  # fmt: skip
NAMES, PALETTE = tuple(GROUPS), tuple(next(iter(group.values())) for group in GROUPS.values())
TABLE = {
    colour_number((0, 0, 0)): VOID,
    **{
        colour_number(colour): index
        for index, group in enumerate(GROUPS.values())
        for colour in group.values()
    },
}


def find(root: Path, config: PrepareConfig) -> Found:
    """All pairs, in the splits that everyone uses (367, 101 and 233 images), whichever layout lies in ``root``.

    Raises
    ------
    DataError
        When there is none of the layouts; it says which ones were looked for.
    """
    if (root / STILLS).is_dir() and (root / LABELS).is_dir():
        return Found(_owners_pairs(root), Classes(NAMES, PALETTE), _convert)
    for images, masks in (("{}", "{}annot"), ("images/{}", "masks/{}")):
        if (root / images.format("train")).is_dir() and (root / masks.format("train")).is_dir():
            pairs = [
                pair
                for split in SPLITS
                for pair in pairs_of(root / images.format(split), root / masks.format(split), split)
            ]
            return Found(pairs, Classes(NAMES, PALETTE, SEGNET_VOID))
    looked_for = f"{STILLS} and {LABELS} (the owners' release), train and trainannot (SegNet's copy), or images/train and masks/train"
    raise DataError(root, f"holds none of CamVid's layouts: {looked_for} ({WHERE})")


def split_of(id: str) -> str | None:
    """The usual split of a frame, by its drive; None for a name that is none of CamVid's.

    Of 0001TP the first half is for training and the second for testing; val is the stretch of 0016E5 that was labelled
    15 times a second.
    """
    parts = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", id)
    if parts is None:
        return None
    drive, frame = parts[1], int(parts[2])
    if drive == "0016E5":
        return "val" if frame in DENSE_FRAMES else "train"
    return (
        "test"
        if drive == "Seq05VD" or (drive == "0001TP" and frame > LAST_FOR_TRAINING)
        else "train"
    )


def _owners_pairs(root: Path) -> list[Pair]:
    images, masks = root / STILLS, root / LABELS
    ids = sorted(
        {file.stem for file in images.glob("*.png")}
        | {file.stem.removesuffix("_L") for file in masks.glob("*_L.png")}
    )
    pairs = []
    for id in ids:
        split = split_of(id)
        if split is None:
            raise DataError(
                images / f"{id}.png",
                "is no frame of CamVid's four drives; remove it, or use dataset folder",
                actual=id,
            )
        pairs.append(Pair(id, images / f"{id}.png", masks / f"{id}_L.png", split))
    return pairs


def _convert(pair: Pair) -> np.ndarray:
    remedy = "is none of the 32 in CamVid's label_colors.txt; take the file as its owners ship it"
    return relabel(read_colours(pair.mask), TABLE, pair.mask, name=name_colour, remedy=remedy)
