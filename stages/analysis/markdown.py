"""Comparisons as Markdown tables, for papers and issue threads: what docs/results.md shows is made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.analysis import tables

DIFFERENCE = slice(3, 5)  # of tables.cells: the difference and its interval
MIOU, SEEDS = 2, 6


def as_markdown(compared: Sequence[dict[str, Any]], *, curve: bool) -> str:
    """A table a group of runs, entries of :func:`stages.analysis.comparison.compare`; with ``curve``, first one of differences by size."""
    parts = [f"## {entry['title']}\n\n{_comparison(entry)}" for entry in compared]
    if curve:
        kinds = [("rows", "")] if compared[0]["rows_all"] is None else [("rows", ""), ("rows_all", ", over all classes of the test images")]
        about = "## mIoU of the first row, and differences to it, by number of training photographs"
        parts = [f"{about}{addition}\n\n{_curve(compared, rows)}" for rows, addition in kinds] + parts
    return "\n\n".join(parts) + "\n"


def _comparison(entry: dict[str, Any]) -> str:
    head = ["variant", "PA %", "mIoU %", "Δ", "95% interval"]
    if entry["rows_all"] is None:
        lines = [tables.cells(row) for row in entry["rows"]]
        return _table([*head, "best on val", "seeds"], lines)
    lines = []
    for row, row_all in zip(entry["rows"], entry["rows_all"], strict=True):
        ours, of_all = tables.cells(row), tables.cells(row_all)
        lines.append([*ours[: DIFFERENCE.stop], of_all[MIOU], *of_all[DIFFERENCE], ours[SEEDS]])
    return _table([*head, "all classes", "Δ", "95% interval", "seeds"], lines)


def _curve(compared: Sequence[dict[str, Any]], rows: str) -> str:
    """Sizes in columns, the smallest first; the seeds that a cell is of stand in it where the others of its column have another number."""
    entries = sorted(compared, key=lambda entry: entry["train_images"])
    found = [{row["variant"]: row for row in entry[rows]} for entry in entries]
    usual = [max(len(row["seeds"]) for row in by_variant.values()) for by_variant in found]
    head = [f"{entry['train_images']} ({_seeds(seeds)})" for entry, seeds in zip(entries, usual, strict=True)]
    variants = dict.fromkeys(name for by_variant in found for name in by_variant)
    lines = [[name, *(_cell(by_variant.get(name), seeds) for by_variant, seeds in zip(found, usual, strict=True))] for name in variants]
    return _table(["variant", *head], lines)


def _cell(row: dict[str, Any] | None, usual: int) -> str:
    if row is None:
        return ""
    delta, interval = row["delta_miou"], row["delta_interval"]
    seeds = len(row["seeds"] if delta is None else row["delta_miou_values"])
    notes = [] if interval is None else [f"{interval['low']:+.1f} to {interval['high']:+.1f}"]
    notes += [] if seeds == usual else [_seeds(seeds)]
    value = f"{row['miou']['mean']:.1f}" if delta is None else f"{delta:+.1f}"
    return f"{value} ({'; '.join(notes)})" if notes else value


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
