"""The inspection that ``prepare`` and ``doctor`` share: every pair is checked, nothing written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from stages.common.errors import ConfigError, DataError
from stages.data.images import VOID, broken_link
from stages.data.manifest import SPLITS, Classes, Entry, Pair
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
from stages.datasets.findings import Finding
from stages.datasets.layout import DatasetLayout
from stages.datasets.pair_check import Checked, Store, check_pair
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
}
Summary = dict[str, Any]  # what summary.json holds


@dataclass(frozen=True)
class Inspection:
    """The result for a data set: pairs without a problem, problems, findings, summary."""

    checked: list[Checked]
    problems: list[DataError]
    findings: list[Finding]
    summary: Summary

    @property
    def most_doubtful(self) -> list[Checked]:
        """At most three pairs whose masks have the largest fraction of doubtful pixels."""
        doubtful = [each for each in self.checked if each.doubtful]
        return sorted(doubtful, key=lambda each: -each.doubtful)[:3]


def find(config: PrepareConfig, draw: Callable[[], list[Pair]] | None = None) -> DatasetLayout:
    """Find the pairs of a data set, in their final splits, without those that are left out.

    Parameters
    ----------
    config
        Name and folder of the data set, and how it is divided.
    draw
        Draws the pairs of wastesim, which has no files of its own.

    Raises
    ------
    ConfigError
        When the data set is drawn, and nobody draws it; when there are too few pairs for a fold.
    DataError
        When the folder is missing, or has not the layout of ``config.dataset``.
    """
    root, seed = Path(config.root), config.split_seed
    dataset = DATASETS.get(config.dataset)
    where = f" ({dataset.WHERE})" if dataset is not None else ""
    if link := broken_link(root):
        raise DataError(root, f"is {link}")
    if not root.is_dir():
        message = f"there is no such folder; set prepare.root to the folder of your data set{where}"
        raise DataError(root, message)
    if dataset is not None:
        layout: DatasetLayout = dataset.find(root, config)
        pairs = assign(layout.pairs, split=config.split, ratios=config.ratios, seed=seed)
    elif draw is not None:
        layout = DatasetLayout(pairs := draw(), wastesim.CLASSES)
    else:
        message = f"{config.dataset} is drawn by the prepare stage; there are no files to check"
        raise ConfigError("prepare.dataset", message, actual=config.dataset)
    if not pairs:
        raise DataError(root, f"holds no images with masks{where}")
    for path in (path for pair in pairs for path in (pair.image, pair.mask)):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError(
                root,
                f"the name {path.name!r} is not in UTF-8, as manifests and stores are; "
                "rename the file",
            ) from None
    kept = keep_train_fraction(pairs, config.train_fraction, seed)
    return replace(layout, pairs=select_fold(kept, config.fold, seed))


def inspect(
    layout: DatasetLayout,
    config: PrepareConfig,
    *,
    workers: int,
    store: Store | None = None,
    title: str = "checking",
) -> Inspection:
    """Check every pair of a data set, and the pairs against each other.

    Parameters
    ----------
    layout
        The data set, with pairs in their final splits.
    config
        Its settings.
    workers
        Number of threads that read, convert and check files.
    store
        Writes the PNG of a converted mask and returns its path. Default: masks are not written.
    title
        Of the progress bar.
    """
    pairs, root = layout.pairs, Path(config.root)
    problems = _check_ids(root, pairs)

    def check(pair: Pair) -> Checked | DataError:
        try:
            return check_pair(pair, layout, config, store)
        except DataError as problem:
            return problem

    with ThreadPoolExecutor(max(1, workers)) as pool:
        bar = tqdm(pool.map(check, pairs), title, len(pairs), unit="pair", disable=None)
        results = list(bar)
    problems += [result for result in results if isinstance(result, DataError)]
    checked = [result for result in results if isinstance(result, Checked)]
    findings = [*layout.findings, *(found for each in checked for found in each.findings)]
    summary = _summary(config, checked, layout.classes)
    if not problems:  # a class of a pair with a problem is not absent
        problems = _check_labels(root, summary, config)
        findings += _absent_classes(root, summary)
    leaks, copies = _compare_copies(checked, config.copies)
    findings += copies
    counts = Counter[str]()
    for finding in findings:
        counts[finding.kind] += finding.count
    return Inspection(checked, problems + leaks, findings, {**summary, "findings": dict(counts)})


# -- the data set ----------------------------------------------------------------------------------


def _check_ids(root: Path, pairs: Sequence[Pair]) -> list[DataError]:
    """Find equal ids and empty splits."""
    problems = []
    for id, count in Counter(pair.id for pair in pairs).items():
        if count > 1:
            message = f"id {id} occurs {count} times; ids must be unique"
            problems.append(DataError(root, message, expected="unique ids", actual=id))
    for split in SPLITS:
        if not any(pair.split == split for pair in pairs):
            message = (
                f"no images for the split {split!r} ({len(pairs)} in all); "
                "check prepare.split and prepare.ratios"
            )
            problems.append(DataError(root, message, expected="at least 1", actual=0))
    return problems


def _compare_copies(checked: Sequence[Checked], rule: str) -> tuple[list[DataError], list[Finding]]:
    """Find images of equal bytes: those across splits are problems where the rule is ``error``."""
    problems, findings = [], []
    first: dict[str, Entry] = {}
    for entry in (each.entry for each in checked):
        other = first.setdefault(entry.image_sha256, entry)
        if other is entry:
            continue
        across, path = other.split != entry.split, Path(entry.image)
        message = f"has the same bytes as {other.image}, which is in the split {other.split!r} too"
        if across:
            message = (
                f"is in the split {entry.split!r}, and has the same bytes as {other.image} in the "
                f"split {other.split!r}, so that scores are too high; remove one, or set "
                "prepare.copies to warn"
            )
        if across and rule == "error":
            problems.append(DataError(path, message))
        else:
            kind = f"copies of images {'in two splits' if across else 'within a split'}"
            findings.append(Finding(kind, path, message))
    return problems, findings


def _summary(config: PrepareConfig, checked: Sequence[Checked], classes: Classes) -> Summary:
    """Summarise the classes and splits."""
    splits = {}
    pixels = np.array([each.pixels for each in checked], int).reshape(-1, 256)
    for split in SPLITS:
        rows = pixels[[each.entry.split == split for each in checked]]
        totals, labelled = rows.sum(0), max(1, int(rows[:, : len(classes.names)].sum()))
        splits[split] = {
            "images": len(rows),
            "pixel_share": {
                name: float(totals[value] / labelled) for value, name in enumerate(classes.names)
            },
            "images_with_class": {
                name: int((rows[:, value] > 0).sum()) for value, name in enumerate(classes.names)
            },
            "void_share": float(totals[VOID] / max(1, rows.sum())),
        }
    return {
        "dataset": config.dataset,
        "images": len(checked),
        "turned_images": sum(each.turned for each in checked),
        "classes": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        "void_index": classes.void_index,
        "splits": splits,
    }


def _check_labels(root: Path, summary: Summary, config: PrepareConfig) -> list[DataError]:
    """Find splits without labels, and training masks of one class."""
    for split, content in summary["splits"].items():
        if content["void_share"] == 1:
            message = (
                f"the masks of split {split!r} hold not one labelled pixel; "
                "check prepare.void_index and the split"
            )
            return [DataError(root, message)]
    images = summary["splits"]["train"]["images_with_class"]
    present = [name for name, count in images.items() if count]
    if len(present) > 1:
        return []
    binary = config.dataset == "folder" and len(images) == 2 and not config.binary
    remedy = "set prepare.binary to true" if binary else "write its number"
    message = (
        f"the training masks hold only one class, {present[0]!r} "
        f"({summary['void_index']} means no label: where it is your object, {remedy}); "
        "check the masks"
    )
    return [DataError(root, message, expected="two classes", actual=present[0])]


def _absent_classes(root: Path, summary: Summary) -> list[Finding]:
    """Find the classes that no training mask shows."""
    images = summary["splits"]["train"]["images_with_class"]
    absent = [name for name, count in images.items() if not count]
    message = f"no training mask has a pixel of {', '.join(absent)}"
    kind = "classes without a training pixel"
    return [Finding(kind, root, message, len(absent))] if absent else []
