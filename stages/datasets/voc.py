"""Pascal VOC 2012 segmentation, or any folder of its layout; optionally with SBD's training masks.

SBD (the Semantic Boundaries Dataset, Hariharan et al. 2011) labels further images of VOC. What the
literature calls ``trainaug`` is VOC's training list and SBD without VOC's val: 10,582 images.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from stages.common.errors import DataError
from stages.data.images import VOID, read_bytes, readable
from stages.data.manifest import Classes, Pair
from stages.datasets.config import PrepareConfig
from stages.datasets.id_lists import LISTS, listed_pair, read_ids
from stages.datasets.layout import Archive, DatasetLayout
from stages.datasets.palette import bit_colour

WHERE = (
    "VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC/voc2012; "
    "`prepare --download` gets it"
)
NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
CLASSES = Classes(names=NAMES, palette=tuple(bit_colour(value) for value in range(len(NAMES))))
SBD = Path("benchmark_RELEASE", "dataset")  # as in its archive; beside JPEGImages


def find(root: Path, config: PrepareConfig) -> DatasetLayout:
    """Find ``JPEGImages/ID.jpg`` and ``SegmentationClass/ID.png``.

    Parameters
    ----------
    root
        The folder that holds ``JPEGImages`` (``VOCdevkit/VOC2012`` of the official archive).
    config
        ``split``: ``official`` reads ``train.txt`` and ``val.txt`` (VOC's test masks are not
        public); ``random`` reads all ids of ``trainval.txt``, as in the thesis; ``sbd`` adds SBD's
        images and masks for training.

    Raises
    ------
    DataError
        When a list is missing or names an id twice.
    """
    lists = root / LISTS
    if config.split == "random":
        files = read_ids(lists / "trainval.txt")
        splits = dict.fromkeys(files, "train")
    else:
        train, held_out = read_ids(lists / "train.txt"), read_ids(lists / "val.txt")
        both = train.keys() & held_out.keys()
        if both:
            raise DataError(
                lists,
                f"id {min(both)} is listed twice, in train.txt and in val.txt; remove one of them",
                actual=min(both),
            )
        files = {**train, **held_out}
        splits = {**dict.fromkeys(train, "train"), **dict.fromkeys(held_out, "val")}
    pairs = [listed_pair(root, id, files[id], splits[id]) for id in files]
    if config.split == "sbd":
        pairs += _sbd_pairs(root / SBD, known=set(splits))
    pairs.sort(key=lambda pair: pair.id)
    return DatasetLayout(pairs, CLASSES, _convert)


def archives(root: Path, config: PrepareConfig) -> list[Archive]:
    """List what to download: VOC, and with ``split: sbd`` SBD.

    Addresses and checksums are torchvision's.
    """
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    official = DATASET_YEAR_DICT["2012"]
    inside = Path(official["base_dir"]).as_posix()
    sbd, has = SBD.parts
    wanted = [
        Archive(official["url"], official["md5"], inside, root, has="JPEGImages"),
        Archive(SBDataset.url, SBDataset.md5, sbd, root / sbd, has=has),
    ]
    return wanted if config.split == "sbd" else wanted[:1]


def _sbd_pairs(folder: Path, *, known: set[str]) -> list[Pair]:
    """Return SBD's training and validation images that VOC does not list."""
    if not folder.is_dir():
        remedy = "unpack SBD's benchmark.tgz into prepare.root, or add --download"
        raise DataError(folder, f"there is no such folder, which split sbd needs; {remedy}")
    ids = {*read_ids(folder / "train.txt"), *read_ids(folder / "val.txt")} - known
    return [
        Pair(id, folder / "img" / f"{id}.jpg", folder / "cls" / f"{id}.mat", "train") for id in ids
    ]


def _convert(pair: Pair) -> np.ndarray | None:
    """Read the mask of a ``.mat`` file of SBD; VOC's masks are used unchanged."""
    if pair.mask.suffix != ".mat":
        return None
    from scipy.io import loadmat

    content = read_bytes(pair.mask, "mask")
    with readable(pair.mask, "mask of SBD"):
        mask = np.asarray(loadmat(io.BytesIO(content))["GTcls"]["Segmentation"][0, 0])
    unknown = mask[(mask >= len(NAMES)) & (mask != VOID)]
    if mask.ndim != 2 or unknown.size:
        actual = int(unknown[0]) if unknown.size else mask.shape
        raise DataError(
            pair.mask,
            f"holds {actual}, expected a mask of class indices from 0 to {len(NAMES) - 1}",
            actual=actual,
        )
    return mask.astype(np.uint8)
