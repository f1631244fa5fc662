"""Comparisons of studies as text, Markdown (the tables of docs/results/), CSV and JSON."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from stages.common.text_table import markdown
from stages.reporting import tables
from stages.reporting.tables import Result, Row
from stages.studies import figures
from stages.studies.compare import Comparison

OVER_ALL = "over all classes of the test images"
GAN_TITLE = "Generated features of the validation masks, at the end of the pretraining"
GAN_MEASURES = {  # by key of the results: heading and format
    "monitor/frechet": ("Fréchet distance", ".1f"),
    "monitor/frechet_floor": ("between halves of the real features", ".1f"),
    "monitor/diversity": ("diversity", ".3f"),
    "monitor/coverage": ("coverage", ".2f"),
    "monitor/two_sample_accuracy": ("two-sample accuracy", ".2f"),
}
GAN_HEADINGS = ("GAN of", "training images", *(heading for heading, _ in GAN_MEASURES.values()))


def as_text(compared: Sequence[Comparison]) -> str:
    """Format all tables for a terminal."""
    blocks = []
    for entry in compared:
        blocks.append(f"{entry.title}\n{tables.as_text(entry.rows)}")
        if entry.classes:
            over_all = tables.as_text([tables.over_all(row) for row in entry.rows])
            blocks.append(f"{entry.group.name}: mIoU {OVER_ALL}\n{over_all}")
    return "\n\n".join(blocks)


def as_markdown(compared: Sequence[Comparison]) -> str:
    """Format all :func:`sections` with headings."""
    every = [section for kind in sections(compared).values() for section in kind]
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in every) + "\n"


def sections(compared: Sequence[Comparison]) -> dict[str, list[tuple[str, str]]]:
    """List titles and Markdown tables by kind.

    Returns
    -------
    dict of list
        ``sizes``: gains by number of training images; where classes are named, over these, then
        over all. ``variants``: a table for each group, with columns over all classes where
        classes are named. ``gans``: measures of the generated features. A list is empty where
        the results do not have what it shows.
    """
    by_size = []
    if has_curve(compared):
        about = "The baseline's mIoU, and differences to it, by number of training images"
        sized = {entry.group.train_images: entry.rows for entry in compared}
        classes = ", ".join(compared[0].classes)
        by_size.append((f"{about}, over {classes or 'all classes'}", _gains(sized)))
        if classes:
            over_all = {size: [*map(tables.over_all, rows)] for size, rows in sized.items()}
            by_size.append((f"{about}, {OVER_ALL}", _gains(over_all)))
    measures = _gan_measures(compared)
    return {
        "sizes": by_size,
        "variants": [(entry.title, _comparison(entry)) for entry in compared],
        "gans": [(GAN_TITLE, markdown(GAN_HEADINGS, measures))] if measures else [],
    }


def has_curve(compared: Sequence[Comparison]) -> bool:
    """Tell whether groups differ in the number of training images only.

    Two groups of one size have decoders that were trained in two ways.
    """
    sizes = {entry.group.train_images for entry in compared}
    runs = [next(iter(entry.group.runs.values()))[0] for entry in compared]
    tested_on = {(frozenset(run["iou"]), frozenset(run["images"])) for run in runs}
    return 1 < len(sizes) == len(compared) and len(tested_on) == 1


def _comparison(entry: Comparison) -> str:
    rows = [tables.cells(row) for row in entry.rows]
    *head, seeds = tables.HEADINGS
    if not entry.classes:
        return markdown(tables.HEADINGS, rows)
    over_all = [tables.miou_cells(tables.over_all(row)) for row in entry.rows]
    return markdown(
        [*head, "all classes", "Δ", "95% interval", seeds],
        [[*cells[:-1], *more, cells[-1]] for cells, more in zip(rows, over_all, strict=True)],
    )


def _gains(sized: Mapping[int, Sequence[Row]]) -> str:
    """Tabulate gains with one column a size, the smallest first.

    The head names the usual number of seeds; cells name theirs where it differs. The first row of
    each size is the baseline.
    """
    columns = {}  # by head: a cell a variant
    for size, (baseline, *others) in sorted(sized.items()):
        paired = [len(row["delta_miou_values"]) for row in others if row["delta_miou_values"]]
        usual = max(statistics.multimode(paired or [len(baseline["seeds"])]))
        score = f"{baseline['miou']['mean']:.1f}"
        columns[f"{size} ({_seeds(usual)})"] = {
            baseline["variant"]: _with_notes(score, [], len(baseline["seeds"]), usual),
            **{row["variant"]: _gain(row, usual) for row in others},
        }
    variants = dict.fromkeys(name for column in columns.values() for name in column)
    return markdown(
        ["variant", *columns],
        [[name, *(column.get(name, "") for column in columns.values())] for name in variants],
    )


def _gan_measures(compared: Sequence[Comparison]) -> list[list[str]]:
    """Tabulate the last measures of each GAN, by the names of the variants that start from it."""
    variants = defaultdict(list)
    for group in (entry.group for entry in compared):
        for variant, (first, *_) in group.runs.items():
            curves = first.get("gan", {})
            if set(GAN_MEASURES) <= set(curves):
                cells = [
                    format([value for value in curves[name] if value is not None][-1], places)
                    for name, (_, places) in GAN_MEASURES.items()
                ]
                key = (json.dumps(curves), str(group.train_images), *cells)
                variants[key].append(variant)
    return [[", ".join(names), *cells] for (_, *cells), names in variants.items()]


def _gain(row: Row, usual: int) -> str:
    if row["delta_miou"] is None:  # the baseline has none of its seeds
        return "—"
    bounds = row["delta_interval"]
    notes = ["{low:+.1f} to {high:+.1f}".format(**bounds)] if bounds else []
    return _with_notes(f"{row['delta_miou']:+.1f}", notes, len(row["delta_miou_values"]), usual)


def _with_notes(value: str, notes: list[str], seeds: int, usual: int) -> str:
    notes = notes if seeds == usual else [*notes, _seeds(seeds)]
    return f"{value} ({'; '.join(notes)})" if notes else value


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def write(compared: Sequence[Comparison], out: Path) -> list[str]:
    """Write ``comparison.md``, ``.json`` and ``.csv``, ``per_class.csv``, and figures.

    Figures are ``comparison.png`` (differences with intervals), ``gans.png`` (where there are
    GANs) and ``curve.png`` (where groups differ in the number of training images only).

    Returns
    -------
    list of str
        Names of the files.
    """
    entries = [(entry.group.name, entry.group.train_images, entry) for entry in compared]
    flat = [
        tables.flat(entry.rows).assign(experiment=name, train_images=size)
        for name, size, entry in entries
    ]
    by_class = [
        tables.per_class_with_intervals(entry.rows).assign(experiment=name)
        for name, _, entry in entries
    ]
    rows = [
        {"name": name, "train_images": size, "classes": list(entry.classes), "rows": entry.rows}
        for name, size, entry in entries
    ]
    files = {
        "comparison.md": as_markdown(compared).encode(),
        "comparison.json": f"{json.dumps(rows, indent=1)}\n".encode(),
        "comparison.csv": pd.concat(flat).to_csv(index=False, float_format="%.4f").encode(),
        "per_class.csv": pd.concat(by_class).to_csv(index=False, float_format="%.4f").encode(),
        **_figures(compared),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    return list(files)


def _figures(compared: Sequence[Comparison]) -> dict[str, bytes]:
    """Draw what there is, by file name."""
    paired = [
        (entry.group.name, [row for row in entry.rows if row["delta_miou"] is not None])
        for entry in compared
    ]
    shown = [(name, rows) for name, rows in paired if rows]
    gans = {
        f"{entry.group.name}: {name}" if len(compared) > 1 else name: training
        for entry in compared
        for name, training in _gans(entry.group.runs).items()
    }
    has_losses = any(
        loss in training.pretraining for training in gans.values() for loss in figures.GAN_PANELS
    )
    sized = {entry.group.train_images: entry.rows for entry in compared}
    return {
        **({"comparison.png": figures.differences(shown)} if shown else {}),
        **({"gans.png": figures.gans(gans)} if has_losses else {}),
        **({"curve.png": figures.low_data_curve(sized)} if has_curve(compared) else {}),
    }


def _gans(runs: Mapping[str, Sequence[Result]]) -> dict[str, figures.GanTraining]:
    """Collect the curves of each GAN, by the names of the variants that start from it.

    A variant that trains the GAN further has its own curve. The first one of a GAN also names the
    variants that leave it as it is.
    """
    variants: dict[str, dict[str, figures.GanCurves]] = {}  # joint phases by pretraining, variant
    for variant, (first, *_) in runs.items():
        if "gan" in first:
            joint = first.get("gan_joint", {})  # missing in results of earlier versions
            variants.setdefault(json.dumps(first["gan"]), {})[variant] = joint
    trainings = {}
    for pretraining, phases in variants.items():
        others = ", ".join(variant for variant, joint in phases.items() if not joint)
        named = [(variant, joint) for variant, joint in phases.items() if joint] or [(others, {})]
        for number, (name, joint) in enumerate(named):
            if joint and others and not number:
                name = f"{name} (pretraining also of {others})"
            trainings[name] = figures.GanTraining(json.loads(pretraining), joint)
    return trainings
