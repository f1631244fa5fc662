"""CamVid (Brostow et al. 2009) with its usual 11 classes: the owners' release, or SegNet's copy.

The owners' masks are colours of 32 classes, grouped as in MathWorks's CamVid example. The order of
the classes is SegNet's (Badrinarayanan et al. 2017).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from stages.common.errors import DataError
from stages.data.images import VOID
from stages.data.manifest import SPLITS, Classes
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, pairs_by_stem, pairs_by_suffix
from stages.datasets.relabel import Relabel, colour_number, name_colour, read_colours

WHERE = (
    "701_StillsRaw_full.zip and LabeledApproved_full.zip of "
    "mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid, or SegNet's copy"
)
STILLS, LABELS = "701_StillsRaw_full", "LabeledApproved_full"
SEGNET_VOID = 11
LAST_TRAINING_FRAME = 8520  # frame of drive 0001TP
DENSE_FRAMES = range(7959, 8160)  # of drive 0016E5
# The colours of label_colors.txt by class; the first is the class's colour. Black is Void.
GROUPS = {
    "sky": {"Sky": (128, 128, 128)},
    "building": {
        "Building": (128, 0, 0), "Archway": (192, 0, 128), "Bridge": (0, 128, 64),
        "Tunnel": (64, 0, 64), "Wall": (64, 192, 0),
    },
    "pole": {"Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64)},
    "road": {
        "Road": (128, 64, 128), "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64),
    },
    "pavement": {
        "Sidewalk": (0, 0, 192), "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192),
    },
    "tree": {"Tree": (128, 128, 0), "VegetationMisc": (192, 192, 0)},
    "sign": {
        "SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64), "TrafficLight": (0, 64, 64),
    },
    "fence": {"Fence": (64, 64, 128)},
    "car": {
        "Car": (64, 0, 128), "SUVPickupTruck": (64, 128, 192), "Truck_Bus": (192, 128, 192),
        "Train": (192, 64, 128), "OtherMoving": (128, 64, 64),
    },
    "pedestrian": {
        "Pedestrian": (64, 64, 0), "Child": (192, 128, 64), "CartLuggagePram": (64, 0, 192),
        "Animal": (64, 128, 64),
    },
    "bicyclist": {"Bicyclist": (0, 128, 192), "MotorcycleScooter": (192, 0, 192)},
}  # fmt: skip
NAMES, PALETTE = tuple(GROUPS), tuple(next(iter(group.values())) for group in GROUPS.values())
convert = Relabel(
    {
        colour_number((0, 0, 0)): VOID,
        **{
            colour_number(colour): index
            for index, group in enumerate(GROUPS.values())
            for colour in group.values()
        },
    },
    "is none of the 32 in CamVid's label_colors.txt; take the file as its owners ship it",
    name_colour,
    read_colours,
)


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find all pairs in the usual splits (367, 101 and 233 images), in any of three layouts.

    Raises
    ------
    DataError
        When ``root`` has none of the layouts; the error lists them.
    """
    if (root / STILLS).is_dir() and (root / LABELS).is_dir():
        pairs = pairs_by_suffix(
            root / STILLS, root / LABELS, "", image_suffix=".png", mask_suffix="_L.png"
        )
        pairs = [replace(pair, split=split_of(pair.image)) for pair in pairs]
        return DatasetLayout(pairs, Classes(NAMES, PALETTE), convert)
    for images, masks in (("{}", "{}annot"), ("images/{}", "masks/{}")):
        if (root / images.format("train")).is_dir() and (root / masks.format("train")).is_dir():
            pairs = [
                pair
                for split in SPLITS
                for pair in pairs_by_stem(
                    root / images.format(split), root / masks.format(split), split
                )
            ]
            return DatasetLayout(pairs, Classes(NAMES, PALETTE, SEGNET_VOID))
    raise DataError(
        root,
        f"holds none of CamVid's layouts: {STILLS} and {LABELS} (the owners' release), "
        f"train and trainannot (SegNet's copy), or images/train and masks/train ({WHERE})",
    )


def split_of(image: Path) -> str:
    """Return the usual split of a frame, by its drive.

    The first half of drive 0001TP is for training, the second for testing. Val is the stretch of
    drive 0016E5 that was labelled 15 times a second.

    Raises
    ------
    DataError
        When the name is not that of a frame of CamVid.
    """
    match = re.fullmatch(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)", image.stem)
    if match is None:
        raise DataError(
            image,
            "is no frame of CamVid's four drives; remove it, or use dataset folder",
            actual=image.stem,
        )
    drive, frame = match[1], int(match[2])
    if drive == "Seq05VD" or (drive == "0001TP" and frame > LAST_TRAINING_FRAME):
        return "test"
    return "val" if drive == "0016E5" and frame in DENSE_FRAMES else "train"
