"""The comparison of decoders: thesis table 4.1 with seeds and spread, and IoU per class."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stages.errors import ConfigError, DataError
from stages.metrics import mean_iou

BASELINE = "baseline"


def read_results(metrics: Path, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Every decoder's ``test.json`` by variant, in the order of the seeds.

    Raises
    ------
    DataError
        When a result is missing or damaged.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for seed in seeds:
            path = metrics / f"{variant}-{seed}" / "test.json"
            try:
                results.setdefault(variant, []).append(json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                command = f"python pipeline.py train-decoder --variant {variant} --seed {seed}"
                raise DataError(path, f"this result is missing; run `{command}`") from None
            except ValueError as error:
                raise DataError(path, f"is not valid JSON ({error}); train this decoder again") from error
    return results


def compare(results: dict[str, list[dict[str, Any]]], headline_classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row a variant, all figures in percent.

    ``miou`` is over ``headline_classes`` where there are any (``miou_all`` is over all classes then as ever);
    ``delta_miou`` is the mean over seeds of the difference to the baseline of the same seed, None without a baseline.

    Raises
    ------
    ConfigError
        When a headline class is none of the data set's.
    """
    known = list(next(iter(results.values()))[0]["iou"])
    for name in headline_classes:
        if name not in known:
            raise ConfigError("report.headline_classes", f"{name!r} is no class of this data set ({', '.join(known)})")

    def headline(result: dict[str, Any]) -> float:
        return 100 * mean_iou(result["iou"], headline_classes or known)

    rows = []
    baseline = [headline(result) for result in results.get(BASELINE, [])]
    for variant, runs in results.items():
        values = [headline(run) for run in runs]
        differences = [value - other for value, other in zip(values, baseline, strict=False)]
        rows.append(
            {
                "variant": variant,
                "seeds": [run["seed"] for run in runs],
                "pa": spread([100 * run["pixel_accuracy"] for run in runs]),
                "miou": spread(values),
                "delta_miou": statistics.fmean(differences) if differences else None,
                "delta_miou_values": differences,
                "miou_all": spread([100 * run["miou"] for run in runs]),
                "miou_best_on_val": spread([headline(run["best_on_val"]) for run in runs]),
                "absent_classes": sorted({name for run in runs for name in run["absent"]}),
            }
        )
    return rows


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and the values."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None, "values": list(values)}


def per_class(results: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    """IoU in percent, mean over seeds: one row a class, one column a variant; empty where a class is absent."""
    columns = {}
    for variant, runs in results.items():
        frame = pd.DataFrame([run["iou"] for run in runs], dtype=float)
        columns[variant] = 100 * frame.mean()
    return pd.DataFrame(columns).rename_axis("class")


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
            "miou_all": row["miou_all"]["mean"],
        }
        for row in rows
    )


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is shown: variant, PA, mIoU, difference, mIoU of the checkpoints that were best on val, seeds."""

    def shown(value: dict[str, Any]) -> str:
        return f"{value['mean']:.2f}" + (f" ± {value['std']:.2f}" if value["std"] is not None else "")

    delta = row["delta_miou"]
    difference = "—" if row["variant"] == BASELINE or delta is None else f"{delta:+.2f}"
    return [row["variant"], shown(row["pa"]), shown(row["miou"]), difference, shown(row["miou_best_on_val"]), str(len(row["seeds"]))]


HEADINGS = ("variant", "PA %", "mIoU %", "Δ mIoU", "best on val", "seeds")


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a table for a terminal."""
    lines = [list(HEADINGS), *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]

    def format_line(line: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([format_line(lines[0]), rule, *(format_line(line) for line in lines[1:])])
