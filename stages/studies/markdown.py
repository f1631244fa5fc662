"""Comparisons as Markdown tables, for papers and issue threads; those of docs/results.md are made here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from stages.reporting import tables

OVER_ALL = "over all classes of the test images"


def as_markdown(compared: Sequence[dict[str, Any]]) -> str:
    """One table for each of :func:`stages.studies.compare.compare`'s entries, and before them the gains by number of images.

    Where classes are named, figures over all classes stand beside those over the named ones.
    """
    classes = compared[0]["classes"]
    parts = []
    if has_curve(compared):
        about = "The baseline's mIoU, and differences to it, by number of training images"
        sized = [(entry["train_images"], entry["rows"]) for entry in compared]
        parts.append(
            f"## {about}, over {', '.join(classes) if classes else 'all classes'}\n\n{_curve(sized)}"
        )
        if classes:
            over_all = [(size, [tables.over_all(row) for row in rows]) for size, rows in sized]
            parts.append(f"## {about}, {OVER_ALL}\n\n{_curve(over_all)}")
    parts += [f"## {entry['title']}\n\n{_comparison(entry)}" for entry in compared]
    return "\n\n".join(parts) + "\n"


def has_curve(compared: Sequence[dict[str, Any]]) -> bool:
    """Whether there are several sizes, each once, tested on the same images.

    Where a size stands twice, its decoders were trained in two ways.
    """
    sizes = [entry["train_images"] for entry in compared]
    return 1 < len(sizes) == len(set(sizes)) and all(
        entry["tested_on"] == compared[0]["tested_on"] for entry in compared
    )


def _comparison(entry: dict[str, Any]) -> str:
    if not entry["classes"]:
        return _table(tables.HEADINGS, [tables.cells(row) for row in entry["rows"]])
    head = [*tables.HEADINGS[:-1], "all classes", "Δ", "95% interval", tables.HEADINGS[-1]]
    lines = []
    for row in entry["rows"]:
        *over_named, seeds = tables.cells(row)
        lines.append([*over_named, *tables.miou_cells(tables.over_all(row)), seeds])
    return _table(head, lines)


def _curve(sized: Sequence[tuple[int, Sequence[dict[str, Any]]]]) -> str:
    """Sizes in columns, the smallest first, with the usual number of seeds; it stands in a cell that has another.

    A group's first row is its baseline.
    """
    columns = []  # one a size: its head, and a cell by variant
    for size, (baseline, *others) in sorted(sized, key=lambda pair: pair[0]):
        paired = [len(row["delta_miou_values"]) for row in others if row["delta_miou_values"]] or [
            len(baseline["seeds"])
        ]
        usual = max(statistics.multimode(paired))
        base = _with_notes(f"{baseline['miou']['mean']:.1f}", [], len(baseline["seeds"]), usual)
        columns.append(
            (
                f"{size} ({_seeds(usual)})",
                {
                    baseline["variant"]: base,
                    **{row["variant"]: _gain(row, usual) for row in others},
                },
            )
        )
    variants = dict.fromkeys(name for _, column in columns for name in column)
    lines = [[name, *(column.get(name, "") for _, column in columns)] for name in variants]
    return _table(["variant", *(head for head, _ in columns)], lines)


def _gain(row: dict[str, Any], usual: int) -> str:
    if row["delta_miou"] is None:  # none of its seeds is the baseline's
        return "—"
    interval = row["delta_interval"]
    between = [] if interval is None else [f"{interval['low']:+.1f} to {interval['high']:+.1f}"]
    return _with_notes(f"{row['delta_miou']:+.1f}", between, len(row["delta_miou_values"]), usual)


def _with_notes(value: str, notes: list[str], seeds: int, usual: int) -> str:
    notes = notes if seeds == usual else [*notes, _seeds(seeds)]
    return f"{value} ({'; '.join(notes)})" if notes else value


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
