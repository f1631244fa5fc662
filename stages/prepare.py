"""prepare: find or draw the images and masks, check each of them, write the manifest."""

from __future__ import annotations

import hashlib
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
    coco_export,
    coco_instances,
    coco_panoptic,
    coco_stuff,
    cvat_masks,
    cvat_xml,
    folder,
    labelme,
    roboflow_masks,
    voc,
    wastesim,
)
from stages.datasets.config import PrepareConfig
from stages.datasets.download import download_data
from stages.datasets.layout import DatasetLayout
from stages.datasets.recognise import recognise, signature
from stages.datasets.relabel import write_indices
from stages.datasets.remap import kept_classes, remap_classes
from stages.datasets.splits import assign, keep_train_fraction, select_fold

# Each has ``find(root, config)`` and ``WHERE`` (where to get it); ``archives(root, config)`` only
# where the owners allow a download.
DATASETS: dict[str, ModuleType] = {
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "coco-panoptic": coco_panoptic,
    "coco-stuff": coco_stuff,
    "coco-instances": coco_instances,
    "camvid": camvid,
    "folder": folder,
    "labelme": labelme,
    "cvat-masks": cvat_masks,
    "cvat-xml": cvat_xml,
    "coco": coco_export,
    "roboflow-masks": roboflow_masks,
}
Summary = dict[str, Any]  # what summary.json holds


def run(
    config: PrepareConfig, *, out: Path, scratch: Path, workers: int, download: bool = False
) -> Summary:
    """Write ``out/manifest.csv`` and ``out/summary.json``, wastesim's images and converted masks.

    Parameters
    ----------
    config
        Which data set.
    out
        Folder of the result; it appears whole or not at all.
    scratch
        Folder in which the result is put together, and a list of all problems is left.
    workers
        Number of threads that read, convert and check files.
    download
        Download the data set first, where ``config.root`` does not hold it yet and its owners
        allow it.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    ConfigError
        When the data set cannot be downloaded; the error says where to get it.
    DataError
        When any image or mask is missing, damaged or does not fit; nothing is written then.
    """
    root, building = Path(config.root), scratch / "prepare"
    if download:
        _download(config, root, scratch / "downloads")
    if not root.is_dir():
        raise DataError(
            root,
            "there is no such folder; set prepare.root to the folder of your data set"
            f"{_where_to_get(config)}",
        )
    if config.dataset == "auto":
        name = recognise(root)
        tqdm.write(f"prepare: dataset {name}, recognised by {signature(name)}")
        config = config.model_copy(update={"dataset": name})
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)

    layout = _find(config, root, building, workers)
    if config.remap:
        kept = ", ".join(kept_classes(layout.classes, config.remap)) or "none"
        tqdm.write(f"prepare: classes that prepare.remap leaves as they are: {kept}")
        layout = remap_classes(layout, config.remap)
    _check_ids(root, layout.pairs)
    pairs = select_fold(
        keep_train_fraction(layout.pairs, config.train_fraction, config.split_seed),
        config.fold,
        config.split_seed,
    )

    # All problems are collected before the first one is reported.
    def check(pair: Pair) -> tuple[Entry, np.ndarray] | DataError:
        try:
            return _check_pair(pair, layout, out, building)
        except DataError as problem:
            return problem

    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = pool.map(check, pairs)
        results = list(tqdm(checked, "prepare: checking", len(pairs), unit="pair", disable=None))
    problems = [result for result in results if isinstance(result, DataError)]
    if problems:
        raise _all_problems(problems, scratch / "problems.txt")
    good = [result for result in results if not isinstance(result, DataError)]
    entries = [entry for entry, _ in good]

    summary = _summary(config, entries, np.stack([pixels for _, pixels in good]), layout.classes)
    _check_labels(root, summary)
    write_manifest(building, entries, summary)
    move_into_place(building, out)
    return summary


def _download(config: PrepareConfig, root: Path, downloads: Path) -> None:
    """Download the data set; refuse where its owners do not allow it and it is absent."""
    archives = getattr(DATASETS.get(config.dataset), "archives", None)
    if archives is not None:
        for archive in archives(root, config):
            download_data(archive, downloads)
    elif not root.is_dir():
        remedy = (
            f"get it yourself{_where_to_get(config)}"
            if config.dataset in DATASETS
            else "name the data set"
            if config.dataset == "auto"
            else "it is drawn; prepare.root holds its objects.csv"
        )
        raise ConfigError(
            "prepare.dataset",
            f"{config.dataset} cannot be downloaded: {remedy}",
            actual=config.dataset,
        )


def _where_to_get(config: PrepareConfig) -> str:
    dataset = DATASETS.get(config.dataset)
    return f" ({dataset.WHERE})" if dataset is not None else ""


def _find(config: PrepareConfig, root: Path, building: Path, workers: int) -> DatasetLayout:
    """Find the pairs and put them into their final splits; draw those of wastesim."""
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
        return DatasetLayout(pairs, wastesim.CLASSES)
    layout: DatasetLayout = DATASETS[config.dataset].find(root, config)
    pairs = assign(layout.pairs, split=config.split, ratios=config.ratios, seed=config.split_seed)
    return replace(layout, pairs=pairs)


def _check_ids(root: Path, pairs: list[Pair]) -> None:
    """Refuse equal ids, names that are not in UTF-8, and empty splits."""
    if not pairs:
        raise DataError(root, "holds no images with masks")
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(
                root,
                f"the name {path.name!r} is not in UTF-8, as manifests and stores are; "
                "rename the file",
            ) from None
    id, count = Counter(pair.id for pair in pairs).most_common(1)[0]
    if count > 1:
        raise DataError(
            root, f"id {id} occurs twice; ids must be unique", expected="unique ids", actual=id
        )
    for split in SPLITS:
        if not any(pair.split == split for pair in pairs):
            raise DataError(
                root,
                f"no images for the split {split!r} ({len(pairs)} in all); "
                "check prepare.split and prepare.ratios",
                expected="at least 1",
                actual=0,
            )


def _check_pair(
    pair: Pair, layout: DatasetLayout, out: Path, building: Path
) -> tuple[Entry, np.ndarray]:
    """Read, convert and check a pair; errors name the owners' mask, not the converted one.

    Returns
    -------
    Entry, (256,) int
        The line of the manifest, and the number of the mask's pixels by value.
    """
    classes, mask_path = layout.classes, pair.mask
    converted = layout.convert(pair) if layout.convert is not None else None
    if converted is not None:
        mask_path = building / "masks" / f"{pair.id}.png"
        write_indices(mask_path, converted, classes)
    image_bytes, mask_bytes = read_bytes(pair.image, "image"), read_bytes(mask_path, "mask")
    image = decode_image(image_bytes, pair.image)
    mask = decode_mask(
        mask_bytes, mask_path, num_classes=len(classes.names), void_index=classes.void_index
    )
    height, width = mask.shape
    if (image.height, image.width) != mask.shape:
        raise DataError(
            pair.mask,
            f"the mask is {width} x {height} pixels, its image {pair.image} is "
            f"{image.width} x {image.height}; they must be of one size",
            expected=(image.height, image.width),
            actual=mask.shape,
        )
    final_image, final_mask = (
        out / path.relative_to(building) if path.is_relative_to(building) else path
        for path in (pair.image, mask_path)
    )
    entry = Entry(
        id=pair.id,
        image=final_image.as_posix(),
        mask=final_mask.as_posix(),
        split=pair.split,
        width=image.width,
        height=image.height,
        image_sha256=hashlib.sha256(image_bytes).hexdigest(),
        mask_sha256=hashlib.sha256(mask_bytes).hexdigest(),
    )
    return entry, np.bincount(mask.reshape(-1), minlength=256)


def _all_problems(problems: list[DataError], report: Path) -> DataError:
    """Return the first problem; where there are more, it names a file that lists all of them."""
    first = problems[0]
    if len(problems) == 1:
        return first
    report.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
    return DataError(
        first.path,
        f"{str(first).removeprefix(f'{first.path}: ')} "
        f"[and {len(problems) - 1} more problems, all listed in {report}]",
        expected=first.expected,
        actual=first.actual,
    )


def _summary(
    config: PrepareConfig, entries: list[Entry], pixels: np.ndarray, classes: Classes
) -> Summary:
    """Summarise the classes and splits; ``pixels`` is (images, 256), by value."""
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


def _check_labels(root: Path, summary: Summary) -> None:
    """Refuse splits without labels and training masks of one class; name absent classes."""
    for split, content in summary["splits"].items():
        if content["void_share"] == 1:
            raise DataError(
                root,
                f"the masks of split {split!r} hold not one labelled pixel; "
                "check prepare.void_index and the split",
            )
    images = summary["splits"]["train"]["images_with_class"]
    present = [name for name, count in images.items() if count]
    absent = [name for name, count in images.items() if not count]
    if len(present) == 1:
        raise DataError(
            root,
            f"the training masks hold only one class, {present[0]!r} "
            f"({summary['void_index']} means no label: where it is your object, write its number); "
            "check the masks",
            expected="two classes",
            actual=present[0],
        )
    if absent:
        tqdm.write(f"prepare: no training mask has a pixel of {', '.join(absent)}")
