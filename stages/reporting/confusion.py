"""Drawing of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from stages.reporting.charts import PNG_STYLE, png

TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # percent
MOST_WITH_NUMBERS = 40  # classes; the numbers of more would be too small to read


@rc_context(PNG_STYLE)
def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """Draw a confusion matrix as PNG, in percent of each true class.

    Parameters
    ----------
    counts
        (K, K) pixels, row: true class, column: predicted class. Classes without a pixel in
        truth and prediction are left out.
    class_names
        K names.
    """
    matrix = np.array(counts, float)
    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    matrix = matrix[np.ix_(shown, shown)]
    with np.errstate(invalid="ignore"):  # the row of a class that is only predicted is empty
        percent = 100 * matrix / matrix.sum(1, keepdims=True)
    count = len(shown)
    side = float(np.clip(0.42 * count, 3.2, 0.16 * count + 7))  # inches
    size = float(np.clip(72 * 0.72 * side / count, 3.5, 9))  # points; letters fit in a row
    dpi = max(110, int(110 * 7 / size)) if count > MOST_WITH_NUMBERS else 150
    figure = Figure(figsize=(side + 2.4, side + 1.8), dpi=dpi)
    axes = figure.add_subplot()
    axes.set_facecolor("#eee")
    picture = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))  # 1% is visible
    names = [class_names[number] for number in shown.tolist()]
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true", title="Pixels of each true class, in %")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(percent >= 0.5) if count <= MOST_WITH_NUMBERS else ():
        value = percent[row, column]
        text = axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=0.85 * size
        )
        text.set_color("white" if value > 36 else "#333")
    figure.colorbar(picture, fraction=0.04, pad=0.02, aspect=30, ticks=TICKS)
    return png(figure)
