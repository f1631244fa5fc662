"""Tables of text: aligned columns for a terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[str]


def plain(head: Cells, rows: Sequence[Cells]) -> str:
    """Format a table for a terminal, with a rule below the head.

    The first column is aligned to the left, the others to the right.
    """
    first, *rest = _padded([head, *rows])
    rule = ["-" * len(cell) for cell in first]
    return "\n".join("  ".join(line).rstrip() for line in (first, rule, *rest))


def markdown(head: Cells, rows: Sequence[Cells], *, aligned: bool = False) -> str:
    """Format a Markdown table.

    Parameters
    ----------
    head
        Headings of the columns.
    rows
        As many cells a row as there are headings.
    aligned
        Whether columns are padded as in :func:`plain`, for a reader of the source.
    """
    if not aligned:
        return "\n".join(map(_line, [head, ["---"] * len(head), *rows]))
    first, *rest = _padded([head, *rows])
    left, *right = ("-" * (len(cell) + 1) for cell in first)
    rule = "|".join(["", f"{left}-", *(f"{dashes}:" for dashes in right), ""])
    return "\n".join([_line(first), rule, *map(_line, rest)])


def percent(fraction: float | None) -> str:
    """Format a fraction (0..1) in percent with two decimals; a dash for None and NaN."""
    return "—" if fraction is None or fraction != fraction else f"{100 * fraction:.2f}"


def _line(cells: Cells) -> str:
    return f"| {' | '.join(cells)} |"


def _padded(lines: Sequence[Cells]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
