"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from stages.reporting.figures import STYLE, png


@rc_context(STYLE)
def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """Confusion matrix (K, K) of pixels, row: true class, in percent of each row; classes that are in neither are left out."""
    matrix = np.array(counts, float)
    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    matrix = matrix[np.ix_(shown, shown)]
    with np.errstate(invalid="ignore"):
        shares = (
            100 * matrix / matrix.sum(1, keepdims=True)
        )  # a class that is predicted only has an empty row
    count = len(shown)
    side = float(np.clip(0.42 * count, 3.2, 0.16 * count + 7))
    size = float(
        np.clip(72 * 0.72 * side / count, 3.5, 9)
    )  # of the letters, in points: no larger than their row
    figure = Figure(
        figsize=(side + 2.4, side + 1.8), dpi=max(110, int(110 * 7 / size)) if count > 40 else 150
    )
    axes = figure.add_subplot()
    axes.set_facecolor("#eee")
    picture = axes.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100)
    )  # so that one in a hundred is still seen
    names = [class_names[int(value)] for value in shown]
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true", title="Pixels of each true class, in %")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if count <= 40:
        for row, column in zip(*np.nonzero(shares >= 0.5), strict=True):
            value = shares[row, column]
            colour = "white" if value > 36 else "#333"
            axes.text(
                column,
                row,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=size * 0.85,
                color=colour,
            )
    figure.colorbar(
        picture, fraction=0.04, pad=0.02, aspect=30, ticks=(0, 1, 5, 10, 25, 50, 75, 100)
    )
    return png(figure)
