"""Figures of studies as PNG, and the curves that trainings leave."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

BLUE = "#2563eb"
mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def read_curves(live: Path) -> dict[str, pd.Series]:
    """DVCLive's curves by name, indexed by epoch."""
    folder = live / "plots" / "metrics"
    curves = {}
    for file in sorted(folder.rglob("*.tsv")):
        table = pd.read_csv(file, sep="\t", index_col="step")
        curves[file.relative_to(folder).with_suffix("").as_posix()] = table.iloc[:, -1]
    return curves


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
    shown = [(name, [row for row in rows if row["delta_miou"] is not None]) for name, rows in groups]
    lines = max(1, max(len(rows) for _, rows in shown))
    figure = Figure(figsize=(4.6 * len(shown) + 1, 1.5 + 0.34 * lines))
    for number, (name, rows) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), number + 1)
        axes.axvline(0, color="#888", linewidth=0.8)
        for place, row in enumerate(rows):
            if row["delta_interval"] is not None:
                axes.plot([row["delta_interval"]["low"], row["delta_interval"]["high"]], [place, place], color=BLUE, linewidth=2)
            axes.plot(row["delta_miou_values"], [place] * len(row["delta_miou_values"]), ".", color="#888", markersize=4)
            axes.plot(row["delta_miou"], place, "o", color=BLUE, markersize=5)
        axes.set(title=name, xlabel="Δ mIoU to the baseline", yticks=range(len(rows)), yticklabels=[row["variant"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.tight_layout()
    return png(figure)


def low_data_curve(groups: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> bytes:
    """mIoU by number of training photographs, and the difference to the baseline with its 95% interval, a line a variant."""
    figure = Figure(figsize=(10, 3.6))
    scores, gains = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for position, variant in enumerate(dict.fromkeys(row["variant"] for _, rows in groups for row in rows)):
        found = sorted(((size, row) for size, rows in groups for row in rows if row["variant"] == variant), key=lambda pair: pair[0])
        sizes = [size for size, _ in found]
        spreads = [row["miou"]["std"] or 0.0 for _, row in found]
        scores.errorbar(
            sizes, [row["miou"]["mean"] for _, row in found], spreads, marker="o", markersize=3, color=f"C{position}", label=variant
        )
        gained = [(size, row) for size, row in found if row["delta_interval"] is not None]
        if gained:
            middle = [row["delta_miou"] for _, row in gained]
            low = [row["delta_miou"] - row["delta_interval"]["low"] for _, row in gained]
            high = [row["delta_interval"]["high"] - row["delta_miou"] for _, row in gained]
            gains.errorbar([size for size, _ in gained], middle, [low, high], marker="o", markersize=3, color=f"C{position}")
    gains.axhline(0, color="#888", linewidth=0.8)
    for axes, title in ((scores, "mIoU (± over seeds)"), (gains, "Δ mIoU to the baseline (95% interval over images)")):
        axes.set(xscale="log", xlabel="training photographs", title=title)
        axes.set_xticks([size for size, _ in groups], [str(size) for size, _ in groups])
        axes.minorticks_off()
    scores.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return png(figure)
<<<<<<< ours
=======


def projections(real: np.ndarray, before: np.ndarray, after: np.ndarray) -> bytes:
    """Thesis figure 4.1: points (n, 2) each, before and after the GAN's training on the same axes."""
    figure = Figure(figsize=(9, 4.2))
    shared = None
    for number, (points, title) in enumerate(((before, "before GAN training"), (after, "after GAN training"))):
        shared = axes = figure.add_subplot(1, 2, number + 1, sharex=shared, sharey=shared)
        axes.scatter(real[:, 0], real[:, 1], s=9, marker="^", color=REAL, alpha=0.45, linewidths=0, label="real")
        axes.scatter(points[:, 0], points[:, 1], s=11, marker="x", color=GENERATED, alpha=0.55, linewidths=0.7, label="generated")
        axes.set(title=title, xticks=[], yticks=[])
        axes.legend(frameon=False, markerscale=1.8)
    return png(figure)


def projections_by_class(
    real: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> bytes:
    """The same points (n, 2) coloured by class (n,): real ones left, generated ones after training right."""
    figure = Figure(figsize=(9, 4.6))
    shown = [value for value in range(len(names)) if (real[1] == value).any() or (after[1] == value).any()]
    shared = None
    for number, ((points, classes), title) in enumerate(((real, "real"), (after, "generated, after training"))):
        shared = axes = figure.add_subplot(1, 2, number + 1, sharex=shared, sharey=shared)
        for value in shown:
            chosen = points[classes == value]
            axes.scatter(
                chosen[:, 0], chosen[:, 1], s=9, color=np.array(palette[value]) / 255, linewidths=0.2, edgecolors="#888", label=names[value]
            )
        axes.set(title=title, xticks=[], yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=7, frameon=False, markerscale=2, bbox_to_anchor=(0.5, -0.08))
    return png(figure)


def grids(real: np.ndarray, generated: np.ndarray, masks: np.ndarray, images: np.ndarray | None) -> bytes:
    """Thesis figure 4.2: real (left) and generated (right) features (B, C, h, w) in 0..1 of the same masks.

    On top of each column its photograph, where there is one, and its mask (B, H, W, 3).
    """
    channels = real.shape[1]
    figure = Figure(figsize=(10, 1.3 + 0.42 * channels))
    tops = [strip for strip in (images, masks) if strip is not None]
    axes = figure.subplots(len(tops) + 1, 2, height_ratios=[1.2] * len(tops) + [channels], squeeze=False)
    for column, (features, title) in enumerate(((real, "real features"), (generated, "generated features"))):
        for row, strip in enumerate(tops):
            axes[row, column].imshow(np.concatenate(list(strip), axis=1), aspect="auto")  # B x (H, W, 3) -> (H, B*W, 3)
        axes[-1, column].imshow(feature_grid(features), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes[0, column].set_title(title)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
    figure.subplots_adjust(wspace=0.03, hspace=0.03)
    return png(figure)


def predictions(columns: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """Rows of test images; each named column is a list of (H, W, 3) pictures, one a row."""
    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(2.1 * len(columns), 2.1 * rows))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for number, (title, pictures) in enumerate(columns.items()):
        axes[0, number].set_title(title)
        for row, picture in enumerate(pictures):
            axes[row, number].imshow(picture)
            axes[row, number].set(xticks=[], yticks=[])
    figure.subplots_adjust(wspace=0.03, hspace=0.03)
    return png(figure)


def confusion(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """Confusion matrix (K, K) of pixels, row: true class, in percent of each row; classes that are in neither are left out."""
    matrix = np.array(counts, float)
    shown = np.flatnonzero(matrix.sum(0) + matrix.sum(1))
    matrix = matrix[np.ix_(shown, shown)]
    with np.errstate(invalid="ignore"):
        shares = 100 * matrix / matrix.sum(1, keepdims=True)  # a class that is predicted only has an empty row
    count = len(shown)
    side = float(np.clip(0.42 * count, 3.2, 0.16 * count + 7))
    size = float(np.clip(72 * 0.72 * side / count, 3.5, 9))  # of the letters, in points: no larger than their row
    figure = Figure(figsize=(side + 2.4, side + 1.8), dpi=max(110, int(110 * 7 / size)) if count > 40 else 150)
    axes = figure.add_subplot()
    axes.set_facecolor("#eee")
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100))  # so that one in a hundred is still seen
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
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=size * 0.85, color=colour)
    figure.colorbar(picture, fraction=0.04, pad=0.02, aspect=30, ticks=(0, 1, 5, 10, 25, 50, 75, 100))
    return png(figure)
>>>>>>> theirs
