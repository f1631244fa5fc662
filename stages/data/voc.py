"""Pascal VOC 2012 segmentation, or any folder of its layout."""

from __future__ import annotations

from pathlib import Path

from stages.data.manifest import Classes, Pair
from stages.data.splits import halve, random_split
from stages.errors import DataError

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _colour(value: int) -> tuple[int, int, int]:
    """The devkit's colour of a label: its bits, dealt to red, green and blue from the top."""
    channels = [0, 0, 0]
    for bit in range(8):
        channels[bit % 3] |= (value >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


CLASSES = Classes(names=NAMES, palette=tuple(_colour(value) for value in range(len(NAMES))))


def pairs(root: Path, *, split: str, ratios: tuple[float, float, float], seed: int) -> list[Pair]:
    """All pairs of ``JPEGImages/ID.jpg`` and ``SegmentationClass/ID.png``.

    Parameters
    ----------
    root
        The folder that holds ``JPEGImages`` (``VOCdevkit/VOC2012`` of the official archive).
    split
        ``official``: ``train.txt``, and ``val.txt`` halved by ``seed`` into val and test (VOC's test masks are not
        public). ``random``: all ids of ``trainval.txt`` by ``ratios`` and ``seed``, as in the thesis.

    Raises
    ------
    DataError
        When a list is missing or names an id twice.
    """
    lists = root / "ImageSets" / "Segmentation"
    if split == "random":
        ids = _read_list(lists / "trainval.txt")
        splits = random_split(ids, ratios, seed)
    else:
        train, held_out = _read_list(lists / "train.txt"), _read_list(lists / "val.txt")
        ids = train + held_out
        splits = {**halve(held_out, seed), **dict.fromkeys(train, "train")}
    twice = [id for id in ids if ids.count(id) > 1] if len(set(ids)) < len(ids) else []
    if twice:
        raise DataError(lists, f"id {twice[0]} is listed twice; remove one of them", expected="unique ids", found=twice[0])
    return [Pair(id, root / "JPEGImages" / f"{id}.jpg", root / "SegmentationClass" / f"{id}.png", splits[id]) for id in sorted(ids)]


def _read_list(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(path, f"this id list cannot be read ({error.strerror}); is prepare.root a VOC folder?") from error
