"""The comparison of decoders: thesis table 4.1 with seeds, spread and intervals, and IoU per class."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common.errors import ConfigError, DataError
from stages.reporting.bootstrap import Counts, Interval, intervals, paired_intervals
from stages.segmentation.metrics import IMAGES_NAME, mean_iou

BASELINE = "baseline"
FEWEST_BLOCKS = 10  # of test images: an interval from fewer is too narrow


def read_results(
    metrics: Path, variants: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Every decoder's ``test.json`` by variant, in the order of the seeds, with its ``images.json`` under ``images``.

    Raises
    ------
    DataError
        When a result is missing or damaged.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for seed in seeds:
            folder = metrics / f"{variant}-{seed}"
            remedy = f"run `python pipeline.py train-decoder --variant {variant} --seed {seed}`"
            result = read_json(folder / "test.json", remedy)
            results.setdefault(variant, []).append(
                {**result, "images": read_json(folder / IMAGES_NAME, remedy)}
            )
    return results


def read_json(path: Path, remedy: str) -> Any:
    """What a result file holds.

    Raises
    ------
    DataError
        When it is missing or damaged; the message ends with the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(path, f"this result is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(path, f"is not valid JSON ({error}); {remedy}") from error


def compare(
    results: dict[str, list[dict[str, Any]]],
    headline_classes: Sequence[str],
    *,
    block_length: int = 1,
    baseline_name: str = BASELINE,
    keys: tuple[str, str] = ("report.headline_classes", "report.block_length"),
) -> list[dict[str, Any]]:
    """One row a variant, all figures in percent.

    ``miou`` is over ``headline_classes`` where there are any, and always over those that the truth of the test images has: a
    class that one variant alone predicts would change the mean of that variant only. ``delta_miou`` is the mean over seeds of
    the difference to the baseline of the same seed (``delta_miou_values``), ``delta_std`` their sample standard deviation (None
    for a single one), and ``delta_interval`` the difference's 95% interval by the bootstrap over test images, ``block_length`` of them,
    one after the other by name, drawn together; None without a baseline. Keys that end in ``_all`` are the same over all classes.

    Raises
    ------
    ConfigError
        When a headline class is none of the data set's, the test images have none of them, or they are fewer than ten blocks.
        ``keys`` are where both were named.
    """
    key, key_of_blocks = keys
    first = next(iter(results.values()))[0]
    known, tested = list(first["iou"]), tested_classes(first)
    for name in headline_classes:
        if name not in known:
            raise ConfigError(key, f"{name!r} is no class of this data set ({', '.join(known)})")
    classes = [name for name in headline_classes or known if name in tested]
    if not classes:
        raise ConfigError(
            key, f"the test images have none of these classes; they have {', '.join(tested)}"
        )

    if block_length > 1 and len(first["images"]) < FEWEST_BLOCKS * block_length:
        message = f"{len(first['images'])} test images are fewer than {FEWEST_BLOCKS} blocks of {block_length}; take shorter ones"
        raise ConfigError(key_of_blocks, message)

    def mean(result: dict[str, Any], classes: Sequence[str] = classes) -> float:
        return 100 * mean_iou(result["iou"], classes)

    rows = []
    baseline = {run["seed"]: run for run in results.get(baseline_name, [])}
    for variant, runs in results.items():
        paired = [
            (run, baseline[run["seed"]])
            for run in runs
            if run["seed"] in baseline and variant != baseline_name
        ]
        differences = [mean(run) - mean(other) for run, other in paired]
        of_all = [mean(run, tested) - mean(other, tested) for run, other in paired]
        (interval, interval_all), by_class = (
            differences_by_images(paired, classes, tested, block_length=block_length)
            if paired
            else ((None, None), None)
        )
        rows.append(
            {
                "variant": variant,
                "seeds": [run["seed"] for run in runs],
                "pa": spread([100 * run["pixel_accuracy"] for run in runs]),
                "miou": spread([mean(run) for run in runs]),
                "delta_miou": statistics.fmean(differences) if differences else None,
                "delta_std": statistics.stdev(differences) if len(differences) > 1 else None,
                "delta_miou_values": differences,
                "delta_interval": interval,
                "delta_intervals_by_class": by_class,
                "iou_intervals_by_class": intervals_by_images(runs, block_length),
                "miou_best_on_val": spread([mean(run["best_on_val"]) for run in runs]),
                "miou_all": spread([mean(run, tested) for run in runs]),
                "delta_miou_all": statistics.fmean(of_all) if of_all else None,
                "delta_std_all": statistics.stdev(of_all) if len(of_all) > 1 else None,
                "delta_interval_all": interval_all,
                "miou_best_on_val_all": spread([mean(run["best_on_val"], tested) for run in runs]),
                "absent_classes": [name for name in known if name not in tested],
            }
        )
    return rows


def tested_classes(result: dict[str, Any]) -> list[str]:
    """The classes of which the truth of a result's test images has a pixel."""
    numbers = {number for counts in result["images"].values() for number in counts[::3]}
    return [name for number, name in enumerate(result["iou"]) if number in numbers]


def intervals_by_images(
    runs: Sequence[dict[str, Any]], block_length: int
) -> dict[str, dict[str, float] | None]:
    """Each class's IoU in percent, mean over seeds, with its 95% interval over test images; None where they lack the class."""
    names, ids = list(runs[0]["iou"]), sorted(runs[0]["images"])
    found = intervals(
        [Counts.of(run["images"], ids, len(names)) for run in runs], block_length=block_length
    )
    return {names[number]: _percent(interval) for number, interval in found.items()}


def differences_by_images(
    paired: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    *means: Sequence[str],
    block_length: int,
) -> tuple[Any, Any]:
    """95% intervals, in percent, of the difference between runs and their baselines: of mIoU over each of ``means``, and of each class.

    Raises
    ------
    DataError
        When two runs were not tested on the same images.
    """
    names, ids = list(paired[0][0]["iou"]), sorted(paired[0][0]["images"])
    for run in (run for pair in paired for run in pair):
        if sorted(run["images"]) != ids or list(run["iou"]) != names:
            raise DataError(
                f"{run['variant']} {run['seed']}",
                "was tested on other images or classes; compare runs of one data set",
            )
    ours, theirs = (
        [Counts.of(run["images"], ids, len(names)) for run in side]
        for side in zip(*paired, strict=True)
    )
    columns = ([names.index(name) for name in classes] for classes in means)
    of_means, by_class = paired_intervals(ours, theirs, *columns, block_length=block_length)
    return [_percent(of_mean) for of_mean in of_means], {
        names[number]: _percent(interval) for number, interval in by_class.items()
    }


def _percent(interval: Interval) -> dict[str, float] | None:
    return (
        None
        if math.isnan(interval.low)
        else {name: 100 * value for name, value in vars(interval).items()}
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and the values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def per_class(results: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """IoU in percent, mean over seeds: one row a class, one column a variant; empty where the test images lack a class."""
    columns = {}
    for variant, runs in results.items():
        frame = pd.DataFrame([run["iou"] for run in runs], dtype=float)
        columns[variant] = 100 * frame.mean()
    frame = pd.DataFrame(columns).rename_axis("class")
    frame.loc[~frame.index.isin(tested_classes(next(iter(results.values()))[0]))] = math.nan
    return frame


def per_class_with_intervals(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line a variant and class: IoU and its difference to the baseline, each with its 95% interval, in percent."""
    lines = []
    for row in rows:
        for name, iou in row["iou_intervals_by_class"].items():
            line = {"variant": row["variant"], "class": name}
            for column, interval in (
                ("iou", iou),
                ("delta", (row["delta_intervals_by_class"] or {}).get(name)),
            ):
                found = interval or {}
                line |= {
                    column: found.get("value"),
                    f"{column}_low": found.get("low"),
                    f"{column}_high": found.get("high"),
                }
            lines.append(line)
    return pd.DataFrame(lines)


def flat(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The comparison as one line a variant, for CSV and ``dvc plots``."""
    return pd.DataFrame(
        {
            "variant": row["variant"],
            "seeds": len(row["seeds"]),
            "pa": row["pa"]["mean"],
            "pa_std": row["pa"]["std"],
            "miou": row["miou"]["mean"],
            "miou_std": row["miou"]["std"],
            "delta_miou": row["delta_miou"],
            "delta_std": row["delta_std"],
            "delta_low": (row["delta_interval"] or {}).get("low"),
            "delta_high": (row["delta_interval"] or {}).get("high"),
            "miou_all": row["miou_all"]["mean"],
            "delta_miou_all": row["delta_miou_all"],
            "delta_std_all": row["delta_std_all"],
            "delta_low_all": (row["delta_interval_all"] or {}).get("low"),
            "delta_high_all": (row["delta_interval_all"] or {}).get("high"),
        }
        for row in rows
    )


def headline(row: dict[str, Any]) -> dict[str, float]:
    """A variant's few figures for ``dvc metrics``, in percent: PA, mIoU and, where there are any, its difference and interval."""
    figures = {
        "pa": row["pa"]["mean"],
        "miou": row["miou"]["mean"],
        "delta_miou": row["delta_miou"],
    }
    interval = row["delta_interval"] or {}
    figures |= {"delta_low": interval.get("low"), "delta_high": interval.get("high")}
    return {name: value for name, value in figures.items() if value is not None}


def over_all(row: dict[str, Any]) -> dict[str, Any]:
    """The row of means over all classes."""
    return {
        **row,
        **{
            name.removesuffix("_all"): value for name, value in row.items() if name.endswith("_all")
        },
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown: variant, PA, mIoU, difference and its interval, mIoU of the checkpoints that were best on val, seeds."""
    return [
        row["variant"],
        mean_and_spread(row["pa"]),
        *miou_cells(row),
        mean_and_spread(row["miou_best_on_val"]),
        seeds_cell(row),
    ]


def miou_cells(row: dict[str, Any]) -> list[str]:
    """mIoU, its difference to the baseline with the standard deviation over seeds, and the interval of that."""
    delta, interval = row["delta_miou"], row["delta_interval"]
    if delta is None:
        return [mean_and_spread(row["miou"]), "—", "—"]
    between = "—" if interval is None else f"{interval['low']:+.2f} to {interval['high']:+.2f}"
    return [mean_and_spread(row["miou"]), f"{delta:+.2f}{_plus_minus(row['delta_std'])}", between]


def mean_and_spread(value: dict[str, Any]) -> str:
    """``61.79 ± 0.31``; without ± for a single value."""
    return f"{value['mean']:.2f}{_plus_minus(value['std'])}"


def _plus_minus(deviation: float | None) -> str:
    return "" if deviation is None else f" ± {deviation:.2f}"


def seeds_cell(row: dict[str, Any]) -> str:
    """How many seeds; ``2 of 3`` where the difference is of two, because the baseline lacks one."""
    seeds, paired = len(row["seeds"]), len(row["delta_miou_values"])
    return str(seeds) if paired in (0, seeds) else f"{paired} of {seeds}"


def sort_keys(row: dict[str, Any]) -> list[str | float | None]:
    """What each of :func:`cells` is sorted by: the name, and numbers, None where there is nothing."""
    low = (row["delta_interval"] or {}).get("low")
    return [
        row["variant"],
        row["pa"]["mean"],
        row["miou"]["mean"],
        row["delta_miou"],
        low,
        row["miou_best_on_val"]["mean"],
        len(row["seeds"]),
    ]


HEADINGS = ("variant", "PA %", "mIoU %", "Δ mIoU", "95% interval", "best on val", "seeds")


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a table for a terminal."""
    lines = [list(HEADINGS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]

    def format_line(line: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([format_line(lines[0]), rule, *(format_line(line) for line in lines[1:])])
