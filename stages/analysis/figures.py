"""Figures of studies as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

BLUE = "#2563eb"
mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def gans(curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> bytes:
    """Losses of several GANs' pretraining by epoch (thesis figure 5.2), a line a variant."""
    panels = {
        "discriminator/real": "Discriminator, real",
        "discriminator/fake": "Discriminator, generated",
        "generator/adversarial": "Generator",
    }
    figure = Figure(figsize=(11, 3.2))
    for number, (name, title) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 3, number + 1)
        for variant, lines in curves.items():
            if name in lines:
                axes.plot(np.arange(len(lines[name])) + 1, np.array(lines[name], float), label=variant)
        axes.set(title=title, xlabel="epoch")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False, bbox_to_anchor=(0.5, -0.08))
    return png(figure)


def differences(groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> bytes:
    """Difference in mIoU to the baseline by variant: its 95% interval over test images, and each seed as a dot; a panel a group of rows."""
    heights = [0.9 + 0.26 * len(rows) for _, rows in groups]
    figure = Figure(figsize=(7.5, sum(heights)))
    panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)
    for axes, (name, rows) in zip(panels.flat, groups, strict=True):
        axes.axvline(0, color="#888", linewidth=0.8)
        for place, row in enumerate(rows):
            if row["delta_interval"] is not None:
                axes.plot([row["delta_interval"]["low"], row["delta_interval"]["high"]], [place, place], color=BLUE, linewidth=2)
            axes.plot(row["delta_miou"], place, "o", color=BLUE, markersize=5)
            axes.plot(row["delta_miou_values"], [place] * len(row["delta_miou_values"]), ".", color="#111", markersize=4)
        axes.set(title=name, yticks=range(len(rows)), yticklabels=[row["variant"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    panels[-1, 0].set_xlabel("Δ mIoU to the baseline (95% interval over images; seeds as dots)")
    figure.tight_layout()
    return png(figure)


def low_data_curve(groups: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> bytes:
    """mIoU by number of training photographs, and the difference to the baseline with its 95% interval, a line a variant."""
    figure = Figure(figsize=(10, 4.2))
    scores, gains = figure.subplots(1, 2)
    variants = list(dict.fromkeys(row["variant"] for _, rows in groups for row in rows))
    for position, variant in enumerate(variants):
        found = sorted(((size, row) for size, rows in groups for row in rows if row["variant"] == variant), key=lambda pair: pair[0])
        shift = 1.008 ** (position - len(variants) / 2)  # bars of one size stand beside each other
        style = {"color": f"C{position % 10}", "linestyle": ("-", "--", ":")[position // 10 % 3], "linewidth": 1.2}
        style |= {"marker": "o", "markersize": 3, "elinewidth": 0.8}
        spreads = [row["miou"]["std"] or 0.0 for _, row in found]
        sizes = [size * shift for size, _ in found]
        scores.errorbar(sizes, [row["miou"]["mean"] for _, row in found], spreads, label=variant, **style)
        gained = [(size, row) for size, row in found if row["delta_interval"] is not None]
        if gained:
            middle = [row["delta_miou"] for _, row in gained]
            # A percentile interval may leave the figure itself out; lengths of bars cannot be negative.
            low = [max(0.0, row["delta_miou"] - row["delta_interval"]["low"]) for _, row in gained]
            high = [max(0.0, row["delta_interval"]["high"] - row["delta_miou"]) for _, row in gained]
            gains.errorbar([size * shift for size, _ in gained], middle, [low, high], **style)
    gains.axhline(0, color="#888", linewidth=0.8)
    for axes, title in ((scores, "mIoU (± over seeds)"), (gains, "Δ mIoU to the baseline (95% interval over images)")):
        axes.set(xscale="log", xlabel="training photographs", title=title)
        axes.set_xticks([size for size, _ in groups], [str(size) for size, _ in groups])
        axes.minorticks_off()
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, fontsize=8)
    return png(figure)
