"""Figures of studies as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from stages.reporting.charts import PNG_STYLE, draw_differences, line_style, png
from stages.reporting.tables import Row

GanCurves = Mapping[str, Sequence[float | None]]  # losses and measures by epoch
GREY = "#888"
GAN_PANELS = {
    "discriminator/real": "Discriminator, real",
    "discriminator/fake": "Discriminator, generated",
    "generator/adversarial": "Generator",
    "generator/feature_matching": "Feature matching",
}


@dataclass(frozen=True)
class GanTraining:
    """The curves of a GAN.

    Attributes
    ----------
    pretraining
        Curves of ``train-gan``, all of the same number of epochs.
    joint
        Those of the decoder that trained this GAN further; empty where none did, and in result
        files of earlier versions.
    """

    pretraining: GanCurves
    joint: GanCurves = field(default_factory=dict)

    @property
    def frozen_epochs(self) -> int:
        """Epochs of the pretraining."""
        return max(map(len, self.pretraining.values()))

    def losses(self, key: str) -> np.ndarray:
        """Return one curve, NaN where there is no value: pretraining, then the joint phase."""
        return np.array([*self.pretraining.get(key, []), *self.joint.get(key, [])], float)


@rc_context(PNG_STYLE)
def gans(trainings: Mapping[str, GanTraining]) -> bytes:
    """Draw the losses of several GANs by epoch (thesis figure 5.2).

    A vertical line marks the end of the pretraining, ``frozen_epochs``, of GANs with a joint phase.
    A pretraining that several joint phases start from is drawn once.

    Parameters
    ----------
    trainings
        By name; one GAN or more has one of :data:`GAN_PANELS`.
    """
    shown = [
        key for key in GAN_PANELS if any(key in each.pretraining for each in trainings.values())
    ]
    figure = Figure(figsize=(3.4 * len(shown), 3.2))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    ends = sorted({each.frozen_epochs for each in trainings.values() if each.joint})
    for axes, key in zip(panels, shown, strict=True):
        drawn: list[GanCurves] = []
        for number, (name, training) in enumerate(trainings.items()):
            losses = training.losses(key)
            start = training.frozen_epochs - 1 if training.pretraining in drawn else 0
            drawn.append(training.pretraining)
            if len(losses):
                epochs = np.arange(start, len(losses)) + 1
                axes.plot(epochs, losses[start:], label=name, **line_style(number))
        for end in ends:
            axes.axvline(end, color=GREY, linewidth=0.8, linestyle=":", label="frozen_epochs")
        axes.set(title=GAN_PANELS[key], xlabel="epoch")
    return _with_legend_below(figure)


@rc_context(PNG_STYLE)
def differences(groups: Sequence[tuple[str, Sequence[Row]]]) -> bytes:
    """Draw the differences in mIoU to the baseline, in points: one panel a group of rows."""
    heights = [0.9 + 0.26 * len(rows) for _, rows in groups]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, groups, strict=True):
        axes.axvline(0, color=GREY, linewidth=0.8)
        draw_differences(axes, rows)
        axes.set(title=name, yticks=range(len(rows)), yticklabels=[row["variant"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    panels[-1].set_xlabel("Δ mIoU to the baseline (95% interval over images; seeds as ticks)")
    return png(figure)


@rc_context(PNG_STYLE)
def low_data_curve(groups: Mapping[int, Sequence[Row]]) -> bytes:
    """Draw mIoU in percent, and its difference to the baseline, by number of training images."""
    figure = Figure(figsize=(10, 4.2))
    scores, gains = figure.subplots(1, 2)
    scores.set_title("mIoU (± over seeds)")
    gains.set_title("Δ mIoU to the baseline (95% interval over images)")
    gains.axhline(0, color=GREY, linewidth=0.8)
    variants = list(dict.fromkeys(row["variant"] for rows in groups.values() for row in rows))
    for number, variant in enumerate(variants):
        shift = 1.008 ** (number - len(variants) / 2)  # bars of one size are beside each other
        points = [
            (size * shift, row)
            for size, rows in sorted(groups.items())
            for row in rows
            if row["variant"] == variant
        ]
        style = line_style(number) | {"linewidth": 1.2, "elinewidth": 0.8}
        style |= {"marker": "o", "markersize": 3}
        means = [(size, row["miou"]["mean"], row["miou"]["std"] or 0.0) for size, row in points]
        scores.errorbar(*zip(*means, strict=True), label=variant, **style)
        # A percentile interval may exclude the value itself; lengths of bars are not negative.
        bars = [
            (
                size,
                row["delta_miou"],
                max(0.0, row["delta_miou"] - row["delta_interval"]["low"]),
                max(0.0, row["delta_interval"]["high"] - row["delta_miou"]),
            )
            for size, row in points
            if row["delta_interval"] is not None
        ]
        if bars:
            sizes, middles, low, high = zip(*bars, strict=True)
            gains.errorbar(sizes, middles, [low, high], **style)
    for axes in (scores, gains):
        axes.set(xscale="log", xlabel="training images")
        axes.set_xticks(list(groups), map(str, groups))
        axes.minorticks_off()
    return _with_legend_below(figure)


def _with_legend_below(figure: Figure) -> bytes:
    figure.tight_layout()
    lines = {
        name: line
        for axes in figure.axes
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if max(map(len, lines)) <= 45 else 1
    place = {"bbox_to_anchor": (0.5, 0), "ncols": columns, "frameon": False, "fontsize": 8}
    figure.legend(lines.values(), lines.keys(), loc="upper center", **place)
    return png(figure)
