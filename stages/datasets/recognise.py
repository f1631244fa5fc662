"""``prepare.dataset: auto``: which data set, or which tool's export, a folder holds."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from stages.common.errors import DataError

HEAD, JSON_FILES = 65536, 50  # bytes of a JSON, and number of files, that tell whose they are

# By name of the data set: sets of paths that a folder of it has. The first set names it to users.
SIGNATURES: dict[str, tuple[tuple[str, ...], ...]] = {
    "folder": (("images", "masks"),),
    "cvat-masks": (("labelmap.txt", "SegmentationClass"),),
    "cvat-xml": (("annotations.xml",), ("*/annotations.xml",)),
    "roboflow-masks": (("*/_classes.csv",),),
    "voc": (("ImageSets/Segmentation/train*.txt", "JPEGImages", "SegmentationClass"),),
    "cityscapes": (("leftImg8bit", "gtFine"),),
    "ade20k": (("objectInfo150.txt", "annotations"),),
    "coco-panoptic": (("annotations/panoptic_train2017.json",),),
    "coco-stuff": (("stuffthingmaps*",),),
    "coco-instances": (("annotations/instances_train2017.json",),),
    "camvid": (("701_StillsRaw_full", "LabeledApproved_full"), ("train", "trainannot")),
}
# By name: the key of a JSON that tells, and words for it.
JSON_KEYS = {"labelme": ("shapes", "*.json with shapes"), "coco": ("images", "*.json with images")}
COCO_KEYS = ("images", "annotations", "categories")


def recognise(root: Path) -> str:
    """Return the name of the data set whose files a folder has.

    Raises
    ------
    DataError
        When the folder has the files of none, or of several.
    """
    found = [
        name
        for name, sets in SIGNATURES.items()
        if any(all(any(root.glob(path)) for path in paths) for paths in sets)
    ]
    if "cvat-masks" in found and "voc" in found:  # CVAT's has VOC's folders, too
        found.remove("voc")
    if not any(name.startswith("coco-") for name in found):
        found += _kinds_of_json(root)
    if len(found) == 1:
        return found[0]
    some = found or [*SIGNATURES, *JSON_KEYS]
    looked_for = ", ".join(f"{name} ({signature(name)})" for name in some)
    number = "several data sets" if found else "none of the data sets"
    raise DataError(
        root,
        f"has the files of {number} that prepare.dataset auto looks for: {looked_for}; "
        "set prepare.dataset to one of them",
        actual=found,
    )


def signature(name: str) -> str:
    """Return the paths by which a data set is recognised, in words."""
    return JSON_KEYS[name][1] if name in JSON_KEYS else " and ".join(SIGNATURES[name][0])


def _kinds_of_json(root: Path) -> list[str]:
    """Return the tools whose JSON files a folder holds, by the first key that tells."""
    kinds = set()
    keys = "|".join(("shapes", *COCO_KEYS))
    for path in islice(sorted(root.rglob("*.json")), JSON_FILES):
        with open(path, "rb") as file:
            head = file.read(HEAD).decode("utf-8", "replace")
        if key := re.search(rf'"({keys})"\s*:', head):
            kinds.add("labelme" if key[1] == "shapes" else "coco")
    return sorted(kinds)
