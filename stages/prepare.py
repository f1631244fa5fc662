"""prepare: find or draw the images and masks, check every one of them, write the manifest."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from featurestore.files import move_into_place
from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID, decode_image, decode_mask, read_bytes
from stages.data.manifest import SPLITS, Classes, Entry, Pair, write_manifest
from stages.datasets import (
    ade20k,
    camvid,
    cityscapes,
    coco_instances,
    coco_panoptic,
    coco_stuff,
    folder,
    voc,
    wastesim,
)
from stages.datasets.config import PrepareConfig
from stages.datasets.download import download_data
from stages.datasets.layout import Found
from stages.datasets.relabel import write_indices
from stages.datasets.splits import assign

# Each has ``find(root, config) -> Found`` and ``WHERE``, which says where to get it; ``archives(root, config)`` where we may.
DATASETS: dict[str, ModuleType] = {
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "coco-panoptic": coco_panoptic,
    "coco-stuff": coco_stuff,
    "coco-instances": coco_instances,
    "camvid": camvid,
    "folder": folder,
}


def run(
    config: PrepareConfig, *, out: Path, scratch: Path, workers: int, download: bool = False
) -> dict[str, Any]:
    """Write ``out/manifest.csv`` and ``out/summary.json`` (and wastesim's pictures, and masks that had to be converted).

    Parameters
    ----------
    config
        Which data set.
    out
        Folder of the result; it appears whole or not at all.
    scratch
        Where it is put together, and where a full list of problems is left.
    workers
        Threads that read, convert and check files.
    download
        Get the data set first, where ``config.root`` does not hold it yet and its owners allow it.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    ConfigError
        When the data set is to be downloaded and cannot be; the text says where to get it.
    DataError
        When any image or mask is missing, damaged or does not fit; nothing is written then.
    """
    root = Path(config.root)
    if download:
        _download(config, root, scratch)

    building = scratch / "prepare"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    # Which pairs there are.
    if not root.is_dir():
        raise DataError(
            root,
            f"there is no such folder; set prepare.root to the folder of your data set{_way_to_get(config)}",
        )
    found = _find(config, root, building, workers)
    classes = found.classes
    _check_ids(root, found.pairs)
    pairs = _with_fewer_for_training(found.pairs, config)

    # Every file is read, decoded and checked, masks of other values are converted, and all problems are gathered before
    # the first one is reported.
    def checked(pair: Pair) -> tuple[Entry, np.ndarray] | DataError:
        try:
            return _check_pair(_converted(pair, found, building), pair.mask, classes, out, building)
        except DataError as problem:
            return problem

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(
            tqdm(
                pool.map(checked, pairs), "prepare: checking", len(pairs), unit="pair", disable=None
            )
        )
    problems = [result for result in results if isinstance(result, DataError)]
    if problems:
        raise _all_problems(problems, scratch / "problems.txt")
    entries, pixels = zip(
        *(result for result in results if not isinstance(result, DataError)), strict=True
    )

    # The manifest, the summary, and the folder's final name.
    summary = _summary(config, list(entries), np.stack(pixels), classes)
    _check_labels(root, summary)
    write_manifest(building, list(entries), summary)
    move_into_place(building, out)
    return summary


def _check_labels(root: Path, summary: dict[str, Any]) -> None:
    """Refuse splits without a label, and training masks of one class alone; name classes that are in none of them."""
    for split, part in summary["splits"].items():
        if part["void_share"] == 1:
            raise DataError(
                root,
                f"the masks of split {split!r} hold not one labelled pixel; check prepare.void_index and the split",
            )
    images = summary["splits"]["train"]["images_with_class"]
    absent = [name for name, count in images.items() if not count]
    if len(absent) == len(images) - 1:
        only = next(name for name, count in images.items() if count)
        message = (
            f"the training masks hold one class alone, {only!r} ({summary['void_index']} means no label: "
            "where it is your object, write its number); check the masks"
        )
        raise DataError(root, message, expected="two classes", actual=only)
    if absent:
        tqdm.write(f"prepare: no training mask has a pixel of {', '.join(absent)}")


def _with_fewer_for_training(pairs: list[Pair], config: PrepareConfig) -> list[Pair]:
    """Pairs with ``train_fraction`` of those for training: chosen by chance, and a smaller share is part of a larger one."""
    training = [pair.id for pair in pairs if pair.split == "train"]
    by_chance = sorted(
        training, key=lambda id: hashlib.sha256(f"{config.split_seed} {id}".encode()).digest()
    )
    kept = set(by_chance[: math.ceil(round(config.train_fraction * len(training), 6))])
    return [pair for pair in pairs if pair.split != "train" or pair.id in kept]


def _find(config: PrepareConfig, root: Path, building: Path, workers: int) -> Found:
    """The pairs in their final splits; wastesim's are drawn here."""
    if config.dataset == "wastesim":
        scenes = config.wastesim
        counts = {"train": scenes.train, "val": scenes.val, "test": scenes.test}
        objects = (scenes.min_objects, scenes.max_objects)
        size, seed = scenes.size, scenes.seed
        pairs = wastesim.write_pairs(
            building,
            root=root,
            images=counts,
            size=size,
            objects=objects,
            seed=seed,
            workers=workers,
        )
        return Found(pairs, wastesim.CLASSES)
    found: Found = DATASETS[config.dataset].find(root, config)
    return replace(
        found,
        pairs=assign(found.pairs, split=config.split, ratios=config.ratios, seed=config.split_seed),
    )


def _download(config: PrepareConfig, root: Path, scratch: Path) -> None:
    """Get the data set where it may be downloaded; refuse where it may not and is not there."""
    module = DATASETS.get(config.dataset)
    if module is not None and hasattr(module, "archives"):
        for archive in module.archives(root, config):
            download_data(archive, scratch / "downloads")
    elif not root.is_dir():
        way = (
            f"get it yourself{_way_to_get(config)}"
            if module is not None
            else "it is drawn; prepare.root holds its objects.csv"
        )
        raise ConfigError(
            "prepare.dataset",
            f"{config.dataset} cannot be downloaded: {way}",
            actual=config.dataset,
        )


def _way_to_get(config: PrepareConfig) -> str:
    module = DATASETS.get(config.dataset)
    return f" ({module.WHERE})" if module is not None else ""


def _converted(pair: Pair, found: Found, building: Path) -> Pair:
    """The pair with a mask of our own indices: a new file, where the owners' is anything else."""
    mask = found.convert(pair) if found.convert is not None else None
    if mask is None:
        return pair
    path = building / "masks" / f"{pair.id}.png"
    write_indices(path, mask, found.classes)
    return replace(pair, mask=path)


def _check_ids(root: Path, pairs: list[Pair]) -> None:
    if not pairs:
        raise DataError(root, "holds no images with masks")
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(
                root,
                f"the name {path.name!r} is not in UTF-8, as manifests and stores are; rename the file",
            ) from None
    twice = [id for id, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if twice:
        raise DataError(
            root,
            f"id {twice[0]} occurs twice; ids must be unique",
            expected="unique ids",
            actual=twice[0],
        )
    sizes = Counter(pair.split for pair in pairs)
    for split in SPLITS:
        if not sizes[split]:
            message = f"no images for the split {split!r} ({len(pairs)} in all); check prepare.split and prepare.ratios"
            raise DataError(root, message, expected="at least 1", actual=0)


def _check_pair(
    pair: Pair, owners_mask: Path, classes: Classes, out: Path, building: Path
) -> tuple[Entry, np.ndarray]:
    """The pair's manifest entry, and its mask's pixels by value (256,); errors name the file that the mask was made of."""
    image_bytes, mask_bytes = read_bytes(pair.image, "image"), read_bytes(pair.mask, "mask")
    image = decode_image(image_bytes, pair.image)
    mask = decode_mask(
        mask_bytes, pair.mask, num_classes=len(classes.names), void_index=classes.void_index
    )
    if (image.height, image.width) != mask.shape:
        sizes = [
            f"{width} x {height}" for height, width in (mask.shape, (image.height, image.width))
        ]
        message = f"the mask is {sizes[0]} pixels, its image {pair.image} is {sizes[1]}; they must be of one size"
        raise DataError(
            owners_mask, message, expected=(image.height, image.width), actual=mask.shape
        )
    image_path, mask_path = (
        out / path.relative_to(building) if path.is_relative_to(building) else path
        for path in (pair.image, pair.mask)
    )
    entry = Entry(
        id=pair.id,
        image=image_path.as_posix(),
        mask=mask_path.as_posix(),
        split=pair.split,
        width=image.width,
        height=image.height,
        image_sha256=hashlib.sha256(image_bytes).hexdigest(),
        mask_sha256=hashlib.sha256(mask_bytes).hexdigest(),
    )
    return entry, np.bincount(mask.reshape(-1), minlength=256)


def _all_problems(problems: list[DataError], report: Path) -> DataError:
    """The first problem, with a word on where the others are listed."""
    first = problems[0]
    if len(problems) == 1:
        return first
    report.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    message = str(first).removeprefix(f"{first.path}: ")
    rest = f"{message} [and {len(problems) - 1} more problems, all listed in {report}]"
    return DataError(first.path, rest, expected=first.expected, actual=first.actual)


def _summary(
    config: PrepareConfig, entries: list[Entry], pixels: np.ndarray, classes: Classes
) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        rows = pixels[[entry.split == split for entry in entries]]
        totals, labelled = rows.sum(0), max(1, int(rows[:, : len(classes.names)].sum()))
        splits[split] = {
            "images": len(rows),
            "pixel_share": {
                name: float(totals[value] / labelled) for value, name in enumerate(classes.names)
            },
            "images_with_class": {
                name: int((rows[:, value] > 0).sum()) for value, name in enumerate(classes.names)
            },
            "void_share": float(totals[VOID] / rows.sum()),
        }
    return {
        "dataset": config.dataset,
        "images": len(entries),
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        "void_index": classes.void_index,
        "splits": splits,
    }
