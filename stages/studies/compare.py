"""Comparison of studies' results: a table for each data set and protocol, and the gain by number of labelled images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.errors import ConfigError, DataError
from stages.common.runtime import write_json
from stages.reporting import figures, tables
from stages.studies.markdown import OVER_ALL, as_markdown, has_curve


@dataclass
class Group:
    """Runs that may be compared: the same data, features and training of the decoder.

    Attributes
    ----------
    name
        Of the experiments that its runs belong to; the study's before it, where two groups would have the same.
    train_images
        How many images they learnt from.
    runs
        By variant, in the order of the seeds.
    """

    name: str
    train_images: int
    runs: dict[str, list[dict[str, Any]]]


def read_groups(paths: Iterable[Path], seeds: Sequence[int] = ()) -> list[Group]:
    """Result files, and those in folders, by what may be compared; the most training images first.

    ``seeds`` names those whose runs are read (none: all).

    Raises
    ------
    DataError
        For a file that is no result, a result that stands twice, or no result at all.
    ConfigError
        When no run is of one of the seeds.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    there: set[int] = set()
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])
    ]
    if not files:
        raise DataError(
            ", ".join(map(str, paths)),
            "there is no result file; `python pipeline.py study FILE` makes them",
        )
    for file in files:
        result = tables.read_json(file, "remove it and run its study again")
        if not isinstance(result, dict) or not {
            "protocol",
            "variant",
            "seed",
            "images",
            "iou",
        } <= set(result):
            raise DataError(file, "is no result of a study")
        there.add(int(result["seed"]))
        if not seeds or result["seed"] in seeds:
            found.setdefault(result["protocol"], []).append({**result, "file": str(file)})
    if missing := set(seeds) - there:
        known = ", ".join(map(str, sorted(there)))
        raise ConfigError(
            "--seed", f"there is no run of seed {min(missing)}; the results have {known}"
        )
    groups = []
    for results in found.values():
        runs: dict[str, list[dict[str, Any]]] = {}
        for result in sorted(results, key=lambda result: int(result["seed"])):
            same = [
                run
                for run in runs.setdefault(result["variant"], [])
                if run["seed"] == result["seed"]
            ]
            if same:
                message = f"{same[0]['file']} is a result of the same variant and seed; compare them apart, or rename a row of the study"
                raise DataError(result["file"], message)
            runs[result["variant"]].append(result)
        experiments = list(dict.fromkeys(result["experiment"] for result in results))
        groups.append(Group(" + ".join(experiments), results[0]["train_images"], runs))
    often = Counter(group.name for group in groups)
    for group in groups:
        if often[group.name] > 1:
            first = next(iter(group.runs.values()))[0]
            group.name = f"{Path(first['file']).resolve().parent.parent.name}/{group.name}"
    return sorted(groups, key=lambda group: -group.train_images)


def compare(
    groups: Sequence[Group], classes: Sequence[str], baseline: str, block_length: int = 1
) -> list[dict[str, Any]]:
    """One entry for each group that has the baseline.

    Its ``rows`` are those of :func:`stages.reporting.tables.compare`, means over ``classes`` (none: all) and intervals over
    blocks of ``block_length`` test images, the baseline first, then the variants with the most seeds, and of those the ones that
    gain most; ``title`` says what they are of, ``gans`` holds the curves of their GANs by the variants of each, ``tested_on``
    the data set's classes and the test images; ``name``, ``train_images`` and ``classes`` as given.

    Raises
    ------
    ConfigError
        When no group has it, a class is none of the data set's, or the test images are too few for such blocks.
    """
    having = [group for group in groups if baseline in group.runs]
    if not having:
        found = ", ".join(sorted({name for group in groups for name in group.runs}))
        raise ConfigError("--baseline", f"there is no {baseline!r} among {found}")
    entries = []
    for group in having:
        keys = ("--class", "--block-length")
        rows = tables.compare(
            group.runs, classes, block_length=block_length, baseline_name=baseline, keys=keys
        )
        # A gain of fewer seeds is over another baseline, so it does not stand among those of more.
        rows.sort(
            key=lambda row: (
                row["variant"] != baseline,
                -len(row["delta_miou_values"]),
                -(row["delta_miou"] or 0.0),
            )
        )
        versions = len(
            {
                run.get("made_with", {}).get("sources")
                for runs in group.runs.values()
                for run in runs
            }
        )
        made_by = f", made by {versions} versions of the sources" if versions > 1 else ""
        absent = [name for name in classes if name in rows[0]["absent_classes"]]
        over = (
            f"; mIoU over {', '.join(name for name in classes if name not in absent)}"
            if classes
            else ""
        )
        over += f" (the test images have no {', '.join(absent)})" if absent else ""
        over += f"; intervals over blocks of {block_length} test images" if block_length > 1 else ""
        entries.append(
            {
                "name": group.name,
                "train_images": group.train_images,
                "classes": list(classes),
                "title": f"{group.name}: {group.train_images} training images{made_by}{over}",
                "rows": rows,
                "tested_on": (
                    sorted(group.runs[baseline][0]["iou"]),
                    sorted(group.runs[baseline][0]["images"]),
                ),
                "gans": _gans(group.runs),
            }
        )
    return entries


def _gans(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """The curves of each GAN once, by the names of the variants that start from it."""
    curves: dict[str, Mapping[str, Any]] = {}
    variants: dict[str, list[str]] = {}
    for variant, results in runs.items():
        if "gan" in results[0]:
            same = json.dumps(results[0]["gan"], sort_keys=True)
            curves[same] = results[0]["gan"]
            variants.setdefault(same, []).append(variant)
    return {", ".join(names): curves[same] for same, names in variants.items()}


def left_out(groups: Sequence[Group], baseline: str) -> list[str]:
    """A line for each result that :func:`compare` cannot pair, and why."""
    lines = []
    for group in groups:
        paired = {run["seed"] for run in group.runs.get(baseline, [])}
        alone = [run for runs in group.runs.values() for run in runs if run["seed"] not in paired]
        lines += [
            f"{run['file']}: there is no {baseline!r} of seed {run['seed']} with the same data and settings"
            for run in alone
        ]
    return lines


def as_text(compared: Sequence[dict[str, Any]]) -> str:
    """All tables for a terminal."""
    parts = []
    for entry in compared:
        parts.append(f"{entry['title']}\n{tables.as_text(entry['rows'])}")
        if entry["classes"]:
            over_all = [tables.over_all(row) for row in entry["rows"]]
            parts.append(f"{entry['name']}: mIoU {OVER_ALL}\n{tables.as_text(over_all)}")
    return "\n\n".join(parts)


def write(compared: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """``comparison.md``, ``.json`` and ``.csv``, ``per_class.csv``, and pictures of what there is.

    These are ``comparison.png``, the differences with their intervals, ``gans.png`` and, where there are several sizes, ``curve.png``.

    Returns
    -------
    list of str
        Names of the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(as_markdown(compared), encoding="utf-8")
    kept = ("name", "train_images", "classes", "rows")
    write_json(out / "comparison.json", [{key: entry[key] for key in kept} for entry in compared])
    flat = [
        tables.flat(entry["rows"]).assign(
            experiment=entry["name"], train_images=entry["train_images"]
        )
        for entry in compared
    ]
    pd.concat(flat).to_csv(out / "comparison.csv", index=False, float_format="%.4f")
    by_class = [
        tables.per_class_with_intervals(entry["rows"]).assign(experiment=entry["name"])
        for entry in compared
    ]
    pd.concat(by_class).to_csv(out / "per_class.csv", index=False, float_format="%.4f")
    pictures = {}
    paired = [
        (entry["name"], [row for row in entry["rows"] if row["delta_miou"] is not None])
        for entry in compared
    ]
    if differences := [(name, rows) for name, rows in paired if rows]:
        pictures["comparison.png"] = figures.differences(differences)
    several = len(compared) > 1
    gans = {
        f"{entry['name']}: {name}" if several else name: curves
        for entry in compared
        for name, curves in entry["gans"].items()
    }
    if any(loss in curves for curves in gans.values() for loss in figures.GAN_PANELS):
        pictures["gans.png"] = figures.gans(gans)
    if has_curve(compared):
        pictures["curve.png"] = figures.low_data_curve(
            [(entry["train_images"], entry["rows"]) for entry in compared]
        )
    for name, content in pictures.items():
        (out / name).write_bytes(content)
    return ["comparison.md", "comparison.json", "comparison.csv", "per_class.csv", *pictures]
