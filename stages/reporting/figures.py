"""Figures of studies as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

BLUE = "#2563eb"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}
GAN_PANELS = {
    "discriminator/real": "Discriminator, real",
    "discriminator/fake": "Discriminator, generated",
    "generator/adversarial": "Generator",
    "generator/feature_matching": "Feature matching",
}


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _line(position: int) -> dict[str, Any]:
    """Colour and dashes of a line, of which thirty differ."""
    return {"color": f"C{position % 10}", "linestyle": ("-", "--", ":")[position // 10 % 3]}


def _legend_below(figure: Figure) -> None:
    """The names of all lines, each once, under the panels."""
    figure.tight_layout()
    lines = {
        name: line
        for axes in figure.axes
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style = {"ncols": 3 if max(map(len, lines)) <= 45 else 1, "frameon": False, "fontsize": 8}
    figure.legend(
        lines.values(), lines.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), **style
    )


@rc_context(STYLE)
def gans(curves: Mapping[str, Mapping[str, Sequence[float | None]]]) -> bytes:
    """Losses of several GANs' pretraining by epoch (thesis figure 5.2), a line a name; at least one of them has one of the losses."""
    shown = {
        name: title
        for name, title in GAN_PANELS.items()
        if any(name in lines for lines in curves.values())
    }
    figure = Figure(figsize=(3.4 * len(shown), 3.2))
    for axes, (name, title) in zip(
        figure.subplots(1, len(shown), squeeze=False).flat, shown.items(), strict=True
    ):
        for position, (label, lines) in enumerate(curves.items()):
            if name in lines:
                axes.plot(
                    np.arange(len(lines[name])) + 1,
                    np.array(lines[name], float),
                    label=label,
                    **_line(position),
                )
        axes.set(title=title, xlabel="epoch")
    _legend_below(figure)
    return png(figure)


@rc_context(STYLE)
def differences(groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> bytes:
    """Difference in mIoU to the baseline by variant, in points: its 95% interval over test images, each seed as a dot; a panel a group."""
    heights = [0.9 + 0.26 * len(rows) for _, rows in groups]
    figure = Figure(figsize=(7.5, sum(heights)))
    panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)
    for axes, (name, rows) in zip(panels.flat, groups, strict=True):
        axes.axvline(0, color="#888", linewidth=0.8)
        for place, row in enumerate(rows):
            if row["delta_interval"] is not None:
                axes.plot(
                    [row["delta_interval"]["low"], row["delta_interval"]["high"]],
                    [place, place],
                    color=BLUE,
                    linewidth=2,
                )
            axes.plot(row["delta_miou"], place, "o", color=BLUE, markersize=5)
            axes.plot(
                row["delta_miou_values"],
                [place] * len(row["delta_miou_values"]),
                ".",
                color="#111",
                markersize=4,
            )
        axes.set(title=name, yticks=range(len(rows)), yticklabels=[row["variant"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    panels[-1, 0].set_xlabel("Δ mIoU to the baseline (95% interval over images; seeds as dots)")
    figure.tight_layout()
    return png(figure)


@rc_context(STYLE)
def low_data_curve(groups: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> bytes:
    """mIoU in percent by number of training images; in points its difference to the baseline, with the 95% interval."""
    figure = Figure(figsize=(10, 4.2))
    scores, gains = figure.subplots(1, 2)
    variants = list(dict.fromkeys(row["variant"] for _, rows in groups for row in rows))
    for position, variant in enumerate(variants):
        found = sorted(
            ((size, row) for size, rows in groups for row in rows if row["variant"] == variant),
            key=lambda pair: pair[0],
        )
        shift = 1.008 ** (position - len(variants) / 2)  # bars of one size stand beside each other
        style = _line(position) | {
            "linewidth": 1.2,
            "marker": "o",
            "markersize": 3,
            "elinewidth": 0.8,
        }
        spreads = [row["miou"]["std"] or 0.0 for _, row in found]
        sizes = [size * shift for size, _ in found]
        scores.errorbar(
            sizes, [row["miou"]["mean"] for _, row in found], spreads, label=variant, **style
        )
        gained = [(size, row) for size, row in found if row["delta_interval"] is not None]
        if gained:
            middle = [row["delta_miou"] for _, row in gained]
            # A percentile interval may leave the figure itself out; lengths of bars cannot be negative.
            low = [max(0.0, row["delta_miou"] - row["delta_interval"]["low"]) for _, row in gained]
            high = [
                max(0.0, row["delta_interval"]["high"] - row["delta_miou"]) for _, row in gained
            ]
            gains.errorbar([size * shift for size, _ in gained], middle, [low, high], **style)
    gains.axhline(0, color="#888", linewidth=0.8)
    for axes, title in (
        (scores, "mIoU (± over seeds)"),
        (gains, "Δ mIoU to the baseline (95% interval over images)"),
    ):
        axes.set(xscale="log", xlabel="training images", title=title)
        axes.set_xticks([size for size, _ in groups], [str(size) for size, _ in groups])
        axes.minorticks_off()
    _legend_below(figure)
    return png(figure)
