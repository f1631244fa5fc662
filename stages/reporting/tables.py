"""Comparison of decoders: scores with their spread over seeds, 95% intervals, IoU per class."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.common import text_table
from stages.common.errors import ConfigError, DataError
from stages.reporting.bootstrap import Counts, Interval, intervals, paired_intervals
from stages.segmentation.metrics import IMAGES_NAME, mean_iou

BASELINE = "baseline"
FEWEST_BLOCKS = 10  # of test images; intervals from fewer blocks are too narrow
HEADINGS = ("variant", "PA %", "mIoU %", "Δ mIoU", "95% interval", "best on val", "seeds")

Result = Mapping[str, Any]  # one decoder's test.json, with its images.json under ``images``
Results = Mapping[str, Sequence[Result]]  # by variant, in the order of the seeds
Row = dict[str, Any]  # one variant of a comparison, see compare()
Bounds = dict[str, float]  # ``value``, ``low`` and ``high`` in percent


def read_results(metrics: Path, variants: Sequence[str], seeds: Sequence[int]) -> Results:
    """Read the results of every variant and seed from ``metrics``.

    Raises
    ------
    DataError
        When a result is missing or damaged.
    """
    command = "python pipeline.py train-decoder"
    return {
        variant: [
            _read_result(
                metrics / f"{variant}-{seed}", f"run `{command} --variant {variant} --seed {seed}`"
            )
            for seed in seeds
        ]
        for variant in variants
    }


def _read_result(folder: Path, remedy: str) -> Result:
    images = read_json(folder / IMAGES_NAME, remedy)
    return {**read_json(folder / "test.json", remedy), "images": images}


def read_json(path: Path, remedy: str) -> Any:
    """Read a result file.

    Raises
    ------
    DataError
        When the file is missing or damaged; the message ends with ``remedy``.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(path, f"this result is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(path, f"is not valid JSON ({error}); {remedy}") from error


def compare(
    results: Results,
    headline_classes: Sequence[str],
    *,
    block_length: int = 1,
    baseline_name: str = BASELINE,
    keys: tuple[str, str] = ("report.headline_classes", "report.block_length"),
) -> list[Row]:
    """Compare variants: one row each, all values in percent.

    Means are over the classes that the truth of the test images has. Otherwise, a class that
    only one variant predicts would change only that variant's mean.

    Parameters
    ----------
    results
        Decoders of the variants.
    headline_classes
        Classes of ``miou``; empty: all.
    block_length
        Consecutive test images, by name, that the bootstrap draws together.
    baseline_name
        Variant that the others are compared with.
    keys
        Names of the settings of ``headline_classes`` and ``block_length``, for error messages.

    Returns
    -------
    list of dict
        ``delta_miou``: mean over seeds of the difference to the baseline of the same seed
        (``delta_miou_values``). ``delta_std``: their sample standard deviation, None for one
        seed. ``delta_interval``: the difference's 95% interval over test images, None without a
        baseline. Keys that end in ``_all``: the same values over all classes.

    Raises
    ------
    ConfigError
        When a headline class is unknown, the test images have none of the headline classes, or
        there are fewer than ten blocks of test images.
    """
    first = next(iter(results.values()))[0]
    tested = tested_classes(first)
    for name in headline_classes:
        if name not in first["iou"]:
            known = ", ".join(first["iou"])
            raise ConfigError(keys[0], f"{name!r} is no class of this data set ({known})")
    classes = [name for name in headline_classes or tested if name in tested]
    if not classes:
        raise ConfigError(
            keys[0], f"the test images have none of these classes; they have {', '.join(tested)}"
        )
    if block_length > 1 and len(first["images"]) < FEWEST_BLOCKS * block_length:
        raise ConfigError(
            keys[1],
            f"{len(first['images'])} test images are fewer than {FEWEST_BLOCKS} blocks of"
            f" {block_length}; take shorter ones",
        )
    baselines = {run["seed"]: run for run in results.get(baseline_name, [])}
    return [
        {
            "variant": variant,
            **_row(
                runs, {} if variant == baseline_name else baselines, classes, tested, block_length
            ),
        }
        for variant, runs in results.items()
    ]


def _row(
    runs: Sequence[Result],
    baselines: Mapping[int, Result],
    classes: Sequence[str],
    tested: Sequence[str],
    block_length: int,
) -> Row:
    pairs = [(run, baselines[run["seed"]]) for run in runs if run["seed"] in baselines]
    (interval, interval_all), by_class = (
        _differences(pairs, classes, tested, block_length=block_length)
        if pairs
        else ((None, None), None)
    )

    def miou(scores: Iterable[Result], classes: Sequence[str] = classes) -> list[float]:
        return [100 * mean_iou(run["iou"], classes) for run in scores]

    def delta(classes: Sequence[str]) -> list[float]:
        return [run - base for run, base in (miou(pair, classes) for pair in pairs)]

    best, names, counts = [run["best_on_val"] for run in runs], [*runs[0]["iou"]], counts_of(runs)
    difference, difference_all = spread(delta(classes)), spread(delta(tested))
    return {
        "seeds": [run["seed"] for run in runs],
        "pa": spread([100 * run["pixel_accuracy"] for run in runs]),
        "miou": spread(miou(runs)),
        "delta_miou": difference["mean"],
        "delta_std": difference["std"],
        "delta_miou_values": difference["values"],
        "delta_interval": interval,
        "delta_intervals_by_class": by_class,
        "iou_intervals_by_class": _by_name(names, intervals(counts, block_length=block_length)),
        "miou_best_on_val": spread(miou(best)),
        "miou_all": spread(miou(runs, tested)),
        "delta_miou_all": difference_all["mean"],
        "delta_std_all": difference_all["std"],
        "delta_interval_all": interval_all,
        "miou_best_on_val_all": spread(miou(best, tested)),
        "absent_classes": [name for name in names if name not in tested],
    }


def tested_classes(result: Result) -> list[str]:
    """Name the classes that have a pixel in the truth of a result's test images."""
    numbers = {number for counts in result["images"].values() for number in counts[::3]}
    return [name for number, name in enumerate(result["iou"]) if number in numbers]


def counts_of(runs: Sequence[Result]) -> list[Counts]:
    """Count the pixels of each run's test images, all in the order of the first run's ids."""
    ids = sorted(runs[0]["images"])
    return [Counts.of(run["images"], ids, len(run["iou"])) for run in runs]


def _differences(
    pairs: Sequence[tuple[Result, Result]], *means: Sequence[str], block_length: int
) -> tuple[list[Bounds | None], dict[str, Bounds | None]]:
    """Compute intervals of the difference in mIoU over each of ``means``, and of each class."""
    names, ids = list(pairs[0][0]["iou"]), sorted(pairs[0][0]["images"])
    for run in (run for pair in pairs for run in pair):
        if sorted(run["images"]) != ids or list(run["iou"]) != names:
            raise DataError(
                f"{run['variant']} {run['seed']}",
                "was tested on other images or classes; compare runs of one data set",
            )
    runs, baselines = (counts_of(side) for side in zip(*pairs, strict=True))
    of_means, by_class = paired_intervals(
        runs,
        baselines,
        *([names.index(name) for name in classes] for classes in means),
        block_length=block_length,
    )
    return [*map(_in_percent, of_means)], _by_name(names, by_class)


def _in_percent(interval: Interval) -> Bounds | None:
    percent = {name: 100 * value for name, value in vars(interval).items()}
    return None if math.isnan(interval.low) else percent


def _by_name(names: Sequence[str], by_class: Mapping[int, Interval]) -> dict[str, Bounds | None]:
    return {name: _in_percent(by_class[number]) for number, name in enumerate(names)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Compute the mean (None for no value) and sample standard deviation (None below two)."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def per_class(results: Results) -> pd.DataFrame:
    """Tabulate IoU in percent, mean over seeds: one row a class, one column a variant.

    Rows of classes that the test images lack are empty.
    """
    frame = pd.DataFrame(
        {
            variant: 100 * pd.DataFrame([run["iou"] for run in runs], dtype=float).mean()
            for variant, runs in results.items()
        }
    ).rename_axis("class")
    tested = tested_classes(next(iter(results.values()))[0])
    return frame[frame.index.isin(tested)].reindex(frame.index)


def per_class_with_intervals(rows: Sequence[Row]) -> pd.DataFrame:
    """Tabulate IoU and its difference to the baseline by variant and class, with intervals."""
    return pd.DataFrame(
        {
            "variant": row["variant"],
            "class": name,
            **_columns("iou", iou),
            **_columns("delta", (row["delta_intervals_by_class"] or {}).get(name)),
        }
        for row in rows
        for name, iou in row["iou_intervals_by_class"].items()
    )


def _columns(name: str, interval: Bounds | None) -> dict[str, float | None]:
    bounds = interval or {}
    return {name + end: bounds.get(end[1:] or "value") for end in ("", "_low", "_high")}


def flat(rows: Sequence[Row]) -> pd.DataFrame:
    """Tabulate the comparison, one line a variant, for CSV and ``dvc plots``."""
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


def headline(row: Row) -> dict[str, float]:
    """Select a variant's values for ``dvc metrics``, in percent, without those that are None."""
    interval = row["delta_interval"] or {}
    figures = {
        "pa": row["pa"]["mean"],
        "miou": row["miou"]["mean"],
        "delta_miou": row["delta_miou"],
        "delta_low": interval.get("low"),
        "delta_high": interval.get("high"),
    }
    return {name: value for name, value in figures.items() if value is not None}


def over_all(row: Row) -> Row:
    """Replace a row's values over the headline classes by those over all classes."""
    ends = "_all"
    return row | {name.removesuffix(ends): row[name] for name in row if name.endswith(ends)}


def cells(row: Row) -> list[str]:
    """Format a row for a table with :data:`HEADINGS`."""
    return [
        row["variant"],
        _with_std(**row["pa"]),
        *miou_cells(row),
        _with_std(**row["miou_best_on_val"]),
        _seeds(row),
    ]


def miou_cells(row: Row) -> list[str]:
    """Format mIoU, its difference to the baseline (± over seeds), and the difference's interval."""
    bounds = row["delta_interval"]
    return [
        _with_std(**row["miou"]),
        _with_std(row["delta_miou"], row["delta_std"], sign="+"),
        "{low:+.2f} to {high:+.2f}".format(**bounds) if bounds else "—",
    ]


def _with_std(mean: float | None, std: float | None, sign: str = "-", **_: object) -> str:
    """Format ``61.79 ± 0.31``; without ± for a single value."""
    spread = "" if std is None else f" ± {std:.2f}"
    return "—" if mean is None else f"{mean:{sign}.2f}{spread}"


def _seeds(row: Row) -> str:
    """Count the seeds; ``2 of 3`` where the baseline has a run of only two of them."""
    seeds, paired = len(row["seeds"]), len(row["delta_miou_values"])
    return str(seeds) if paired in (0, seeds) else f"{paired} of {seeds}"


def sort_keys(row: Row) -> list[str | float | None]:
    """List the values that :func:`cells` are sorted by; None for an empty cell."""
    return [
        row["variant"],
        row["pa"]["mean"],
        row["miou"]["mean"],
        row["delta_miou"],
        (row["delta_interval"] or {}).get("low"),
        row["miou_best_on_val"]["mean"],
        len(row["seeds"]),
    ]


def as_text(rows: Sequence[Row]) -> str:
    """Format the comparison for a terminal."""
    return text_table.plain(HEADINGS, [cells(row) for row in rows])
