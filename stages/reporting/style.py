"""What the drawings of the report and of studies share: colours, lines, marks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stages.reporting.tables import Row

# fmt: off
SERIES = (
    "#2563eb", "#ea580c", "#059669", "#9333ea", "#ca8a04",
    "#0891b2", "#db2777", "#65a30d", "#78716c", "#dc2626",
)
# fmt: on
DASHES = ("solid", "dashed", "dotted")  # of the first ten lines, the next ten, the rest
OPEN_AXES: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False}
PNG_STYLE = OPEN_AXES | {"font.size": 9, "figure.dpi": 110}


def png(figure: Figure) -> bytes:
    """Convert a figure to PNG on white ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def line_style(number: int) -> dict[str, Any]:
    """Choose colour and dashes of the n-th line of a chart; thirty lines differ."""
    dashes = DASHES[min(number // len(SERIES), len(DASHES) - 1)]
    return {"color": SERIES[number % len(SERIES)], "linestyle": dashes}


def draw_differences(axes: Axes, rows: Sequence[Row], size: float, **seed_marks: Any) -> None:
    """Draw each row's difference to the baseline: 95% interval, seeds, and mean over seeds.

    Parameters
    ----------
    axes
        Row i is drawn at height i.
    rows
        Rows that have a difference.
    size
        Diameter of the mean's dot in points.
    seed_marks
        matplotlib's properties of the seeds' marks.
    """
    for place, row in enumerate(rows):
        interval, by_seed = row["delta_interval"], row["delta_miou_values"]
        if interval is not None:
            ends = [interval["low"], interval["high"]]
            axes.plot(ends, [place, place], color=SERIES[0], linewidth=2)
        axes.plot(by_seed, [place] * len(by_seed), linestyle="none", **seed_marks)
        axes.plot(row["delta_miou"], place, "o", color=SERIES[0], markersize=size)
