"""prepare: find or draw the photographs and masks, check every one of them, write the manifest."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from featurestore.files import move_into_place
from stages.config import Config, Seed
from stages.data import folder, voc, wastesim
from stages.data.images import VOID, decode_image, decode_mask, read_bytes
from stages.data.manifest import SPLITS, Classes, Entry, Pair, write_manifest
from stages.errors import DataError

Channel = Annotated[int, Field(ge=0, le=255)]
Colour = Annotated[tuple[Channel, Channel, Channel], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class WastesimConfig(Config):
    """How many belt scenes are drawn, and how."""

    train: int = Field(ge=1)
    val: int = Field(ge=1)
    test: int = Field(ge=1)
    size: int = Field(ge=64, le=2048)
    fewest_objects: int = Field(ge=1)
    most_objects: int = Field(ge=1, le=100)
    seed: Seed

    @model_validator(mode="after")
    def _ordered(self) -> WastesimConfig:
        if self.fewest_objects > self.most_objects:
            raise ValueError("fewest_objects must not be above most_objects")
        return self


class PrepareConfig(Config):
    """Section ``prepare`` of params.yaml."""

    dataset: Literal["wastesim", "voc", "folder"]
    root: str
    split: Literal["official", "random"]
    ratios: Annotated[tuple[Share, Share, Share], Field(strict=False)]
    split_seed: Seed
    train_fraction: float = Field(gt=0, le=1)
    classes: dict[str, Colour]
    void_index: int = Field(ge=1, le=255)
    wastesim: WastesimConfig

    @model_validator(mode="after")
    def _whole(self) -> PrepareConfig:
        if abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError("ratios must add up to 1")
        if len(self.classes) > self.void_index:
            raise ValueError(f"{len(self.classes)} classes leave no room for void_index {self.void_index}")
        return self


def run(config: PrepareConfig, *, out: Path, scratch: Path, workers: int) -> dict[str, Any]:
    """Write ``out/manifest.csv`` and ``out/summary.json`` (and, for wastesim, the pictures).

    Parameters
    ----------
    config
        Which data set.
    out
        Folder of the result; it appears whole or not at all.
    scratch
        Where it is put together, and where a full list of problems is left.
    workers
        Threads that read and check files.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    DataError
        When any photograph or mask is missing, damaged or does not fit; nothing is written then.
    """
    building = scratch / "prepare"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    # Which pairs there are.
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(root, "there is no such folder; set prepare.root to the folder of your data set")
    pairs, classes = _find_pairs(config, root, building, workers)
    _check_ids(root, pairs)
    pairs = _with_fewer_for_training(pairs, config)

    # Every file is read, decoded and checked, and all problems are gathered before the first one is reported.
    def checked(pair: Pair) -> tuple[Entry, np.ndarray] | DataError:
        try:
            return _check_pair(pair, classes, out, building)
        except DataError as problem:
            return problem

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = list(tqdm(pool.map(checked, pairs), "prepare: checking", len(pairs), unit="pair", disable=None))
    problems = [result for result in results if isinstance(result, DataError)]
    if problems:
        raise _all_problems(problems, scratch / "problems.txt")
    entries, pixels = zip(*(result for result in results if not isinstance(result, DataError)), strict=True)

    # The manifest, the summary, and the folder's final name.
    summary = _summary(config, list(entries), np.stack(pixels), classes)
    for split, part in summary["splits"].items():
        if part["void_share"] == 1:
            raise DataError(root, f"the masks of split {split!r} hold not one labelled pixel; check prepare.void_index and the split")
    write_manifest(building, list(entries), summary)
    move_into_place(building, out)
    return summary


def _with_fewer_for_training(pairs: list[Pair], config: PrepareConfig) -> list[Pair]:
    """Pairs with ``train_fraction`` of those for training: chosen by chance, and a smaller share is part of a larger one."""
    training = [pair.id for pair in pairs if pair.split == "train"]
    by_chance = sorted(training, key=lambda id: hashlib.sha256(f"{config.split_seed} {id}".encode()).digest())
    kept = set(by_chance[: math.ceil(round(config.train_fraction * len(training), 6))])
    return [pair for pair in pairs if pair.split != "train" or pair.id in kept]


def _find_pairs(config: PrepareConfig, root: Path, building: Path, workers: int) -> tuple[list[Pair], Classes]:
    if config.dataset == "wastesim":
        scenes = config.wastesim
        counts = {"train": scenes.train, "val": scenes.val, "test": scenes.test}
        objects = (scenes.fewest_objects, scenes.most_objects)
        size, seed = scenes.size, scenes.seed
        pairs = wastesim.write_pairs(building, root=root, images=counts, size=size, objects=objects, seed=seed, workers=workers)
        return pairs, wastesim.CLASSES
    if config.dataset == "voc":
        return voc.pairs(root, split=config.split, ratios=config.ratios, seed=config.split_seed), voc.CLASSES
    if config.classes:
        classes = Classes(tuple(config.classes), tuple(config.classes.values()), config.void_index)
    else:
        classes = folder.read_classes(root / folder.CLASS_LIST, config.void_index)
    return folder.pairs(root, split=config.split, ratios=config.ratios, seed=config.split_seed), classes


def _check_ids(root: Path, pairs: list[Pair]) -> None:
    if not pairs:
        raise DataError(root, "holds no photographs with masks")
    twice = [id for id, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if twice:
        raise DataError(root, f"id {twice[0]} occurs twice; ids must be unique", expected="unique ids", found=twice[0])
    sizes = Counter(pair.split for pair in pairs)
    for split in SPLITS:
        if not sizes[split]:
            message = f"no photographs for the split {split!r} ({len(pairs)} in all); check prepare.split and prepare.ratios"
            raise DataError(root, message, expected="at least 1", found=0)


def _check_pair(pair: Pair, classes: Classes, out: Path, building: Path) -> tuple[Entry, np.ndarray]:
    """The pair's manifest entry, and its mask's pixels by value (256,)."""
    image_bytes, mask_bytes = read_bytes(pair.image, "photograph"), read_bytes(pair.mask, "mask")
    image = decode_image(image_bytes, pair.image)
    mask = decode_mask(mask_bytes, pair.mask, num_classes=len(classes.names), void_index=classes.void_index)
    if (image.height, image.width) != mask.shape:
        sizes = [f"{width} x {height}" for height, width in (mask.shape, (image.height, image.width))]
        message = f"the mask is {sizes[0]} pixels, its photograph {pair.image} is {sizes[1]}; they must be of one size"
        raise DataError(pair.mask, message, expected=(image.height, image.width), found=mask.shape)
    image_path, mask_path = (
        out / path.relative_to(building) if path.is_relative_to(building) else path for path in (pair.image, pair.mask)
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
    return DataError(first.path, rest, expected=first.expected, found=first.found)


def _summary(config: PrepareConfig, entries: list[Entry], pixels: np.ndarray, classes: Classes) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        rows = pixels[[entry.split == split for entry in entries]]
        totals, labelled = rows.sum(0), max(1, int(rows[:, : len(classes.names)].sum()))
        splits[split] = {
            "images": len(rows),
            "pixel_share": {name: float(totals[value] / labelled) for value, name in enumerate(classes.names)},
            "images_with_class": {name: int((rows[:, value] > 0).sum()) for value, name in enumerate(classes.names)},
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
