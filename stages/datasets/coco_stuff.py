"""COCO-Stuff 164k (Caesar et al. 2018): pixel maps of 91 things and 91 stuff for COCO's images.

Eleven things have no pixel in any mask, because COCO never annotated them. Their values are kept:
masks are used unchanged, with the owners' class indices.
"""

from __future__ import annotations

from pathlib import Path

from stages.data.manifest import Classes
from stages.datasets import coco
from stages.datasets.config import PrepareConfig
from stages.datasets.layout import DatasetLayout, first_folder, pairs_by_suffix
from stages.datasets.palette import bit_colour

WHERE = (
    f"{coco.IMAGES} {coco.SITE}, and stuffthingmaps_trainval2017.zip of "
    "github.com/nightrome/cocostuff"
)

# The owners' labels.txt from number 1 on; a mask's value is this number minus one.
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird",
    "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "hat",
    "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window", "desk",
    "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "blender", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "hair brush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)  # fmt: skip
CLASSES = Classes(NAMES, tuple(bit_colour(value + 1) for value in range(len(NAMES))))


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find the images and the pixel maps ``{train,val}2017/ID.png``.

    The maps' archive has no top folder, so people unpack it into different ones; ``train2017``
    itself, among the images, is tried last.

    Raises
    ------
    DataError
        When a folder is missing.
    """
    above = ("stuffthingmaps_trainval2017/", "stuffthingmaps/", "annotations/", "")
    pairs = [
        pair
        for folder, split in coco.SPLITS
        for pair in pairs_by_suffix(
            coco.image_folder(root, folder, WHERE),
            first_folder(root, tuple(place + folder for place in above), "masks", WHERE),
            split,
        )
    ]
    return DatasetLayout(pairs, CLASSES)
