"""The report's charts: small SVG panels in the colours and type of the page.

matplotlib draws in the colours below. In the page they become CSS variables, so that one drawing
serves the light and the dark scheme. Titles and legends are HTML around the panels: they wrap on
a narrow page and keep their size.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from stages.reporting.tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, pd.Series]  # of one training, by name
Seeds = Sequence[Curves]  # of one variant

INK, SOFT, LINE = "#1c2430", "#566070", "#dfe4ea"
# fmt: off
SERIES = (
    "#2563eb", "#ea580c", "#059669", "#9333ea", "#ca8a04",
    "#0891b2", "#db2777", "#65a30d", "#78716c", "#dc2626",
)
DARK = (  # the series' colours on a dark ground
    "#60a5fa", "#fb923c", "#34d399", "#c084fc", "#facc15",
    "#22d3ee", "#f472b6", "#a3e635", "#a8a29e", "#f87171",
)
# fmt: on
REAL, GENERATED = "#3b82f6", "#ef4444"  # of points, which are pixels: for light and dark grounds
VARIABLES = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{hue: f"var(--series-{n})" for n, hue in enumerate(SERIES)},
}
DASHES = ("solid", "dashed", "dotted")  # of the first ten lines, the next ten, the rest
OPEN_AXES: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False}
PNG_STYLE = OPEN_AXES | {"font.size": 9, "figure.dpi": 110}
SVG_STYLE = OPEN_AXES | {
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",  # text stays text, in the page's type
    "svg.hashsalt": "featuregan",  # the same drawing has the same bytes
}
GAN_CURVES = {
    "Discriminator loss": r"discriminator/(?!.*accuracy)",
    "Discriminator accuracy": r"discriminator/accuracy",
    "Generator losses": r"generator/",
}
MONITOR_CURVES = {
    "frechet": "Fréchet distance",
    "coverage": "Coverage",
    "two_sample_accuracy": "Two-sample accuracy",
    "variance_ratio": "Variance within classes / real",
    "diversity": "Diversity over z / real",
    "consistency": "Consistency (mIoU of the probe)",
}
DECODER_CURVES = {
    "decoder/ce_real": "Cross-entropy on real training features",
    "val/miou": "mIoU on val",
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes
    ----------
    name
        Text of the entry.
    colour
        A CSS colour.
    shape
        A line (``solid``, ``dashed``, ``dotted``), a ``mark`` or a ``tick``.
    """

    name: str
    colour: str
    shape: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One drawing, with the legend of this panel only."""

    title: str
    svg: Markup
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Panels in a row, and their common legend."""

    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()


def css_colour(colour: tuple[int, int, int]) -> str:
    """Convert (red, green, blue), each 0..255, to ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def gan_curves(pretraining: Curves, joint: Curves | None = None) -> Chart:
    """Draw the losses of the GAN by epoch (thesis figure 4.3) and its discriminator's accuracy.

    Parameters
    ----------
    pretraining
        Curves of ``train-gan``.
    joint
        Curves of a decoder that trained this GAN further. They follow on the epoch axis, behind a
        vertical line at ``frozen_epochs``.
    """
    curves, line = dict(pretraining), None
    if joint is not None:
        line = 1 + max(int(curve.index[-1]) for curve in pretraining.values())
        for name, curve in joint.items():
            later = curve.set_axis(curve.index + line)
            curves[name] = pd.concat([pretraining[name], later]) if name in curves else later
    panels = []
    for title, pattern in GAN_CURVES.items():
        names = [name for name in curves if re.match(pattern, name)]
        labels = (name.split("/")[1].removeprefix("accuracy_").replace("_", " ") for name in names)
        if names:
            shown = [[curves[name]] for name in names]
            panels.append(_curve_panel(title, shown, _keys(labels), line=line))
    return Chart(tuple(panels))


def monitor_curves(runs: Mapping[str, Curves]) -> Chart | None:
    """Draw measures of generated features by epoch; None where nothing was measured.

    The first run is the GAN's pretraining. The joint trainings that start from it follow on the
    epoch axis, behind a vertical line at ``frozen_epochs``. Dashed: the measure of real features.
    """
    watched = {run: curves for run, curves in runs.items() if "monitor/frechet" in curves}
    if not watched:
        return None
    first, *joint = watched.values()
    pretrained = int(first["monitor/frechet"].index[-1]) + 1
    panels = []
    for name, title in MONITOR_CURVES.items():
        key = f"monitor/{name}"
        later = (curves[key].rename(lambda epoch: epoch + pretrained) for curves in joint)
        reference = first.get(f"{key}_floor", first.get(f"{key}_real"))
        shown = [[curve] for curve in (first[key], *later)]
        line = pretrained if joint else None
        panels.append(_curve_panel(title, shown, reference=reference, marker=".", line=line))
    return Chart(tuple(panels), (*_keys(watched), Key("real features", VARIABLES[SOFT], "dashed")))


def mean_over_seeds(runs: Mapping[str, Seeds], name: str) -> pd.DataFrame:
    """Average a curve over seeds: one row an epoch (from 1), one column a variant."""
    table = pd.DataFrame(
        {
            variant: pd.concat([run[name] for run in seeds], axis=1).mean(axis=1)
            for variant, seeds in runs.items()
        }
    )
    return table.set_axis(table.index + 1).rename_axis("epoch")


def decoder_curves(runs: Mapping[str, Seeds]) -> Chart:
    """Draw the training loss on real features and mIoU on val, by variant."""
    panels = (
        _curve_panel(title, [[run[name] for run in seeds] for seeds in runs.values()])
        for name, title in DECODER_CURVES.items()
    )
    return Chart(tuple(panels), _keys(runs))


def differences(rows: Sequence[Row]) -> Chart | None:
    """Draw the difference in mIoU to the baseline by variant; None without a baseline."""
    shown = [row for row in rows if row["delta_miou"] is not None]
    if not shown:
        return None
    axes = _axes(height=0.7 + 0.42 * len(shown))
    across = axes.get_yaxis_transform()  # x is 0..1 from the left to the right edge
    for place, row in enumerate(shown):
        # The name is above the line, as names may be long; the line of 0 leaves it free.
        axes.plot([0, 0], [place - 0.1, place + 0.5], color=SOFT, linewidth=1)
        axes.text(0.01, place - 0.28, row["variant"], transform=across, va="center", color=INK)
    draw_differences(axes, shown)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(yticks=[], ylim=(len(shown) - 0.65, -0.6))
    axes.set_xlabel("points of mIoU against the baseline")
    legend = (
        Key("mean over seeds", VARIABLES[SERIES[0]], "mark"),
        Key("95% interval", VARIABLES[SERIES[0]]),
        Key("a seed", VARIABLES[SOFT], "tick"),
    )
    return Chart((Panel("", _svg(axes, "Difference in mIoU to the baseline by variant")),), legend)


def draw_differences(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw each row's difference to the baseline: 95% interval, seeds, and mean over seeds."""
    for place, row in enumerate(rows):
        bounds, by_seed = row["delta_interval"], row["delta_miou_values"]
        if bounds is not None:
            ends = [bounds["low"], bounds["high"]]
            axes.plot(ends, [place, place], color=SERIES[0], linewidth=2)
        axes.plot(by_seed, [place] * len(by_seed), "|", color=SOFT, markersize=8)
        axes.plot(row["delta_miou"], place, "o", color=SERIES[0], markersize=6)


def projections(real: np.ndarray, before: np.ndarray, after: np.ndarray) -> Chart:
    """Draw thesis figure 4.1: points (n, 2) each, before and after the GAN's pretraining."""
    limits = _limits(real, before, after)
    marks = {"s": 10, "marker": "^", "color": REAL, "alpha": 0.5, "linewidths": 0}
    crosses = {"s": 12, "marker": "x", "color": GENERATED, "alpha": 0.6, "linewidths": 0.8}
    panels = (
        _point_panel(
            title, "UMAP of real and generated features", limits, (real, marks), (points, crosses)
        )
        for title, points in {
            "Before the GAN's training": before,
            "After the GAN's training": after,
        }.items()
    )
    return Chart(tuple(panels), (Key("real", REAL, "mark"), Key("generated", GENERATED, "mark")))


def projections_by_class(
    real: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Chart:
    """Draw points coloured by class: real features, and features generated after pretraining.

    Parameters
    ----------
    real, after
        Points (n, 2) and their classes (n,).
    names, palette
        Of the classes.
    """
    limits = _limits(real[0], after[0])
    shown = np.unique(np.concatenate([real[1], after[1]]))
    shown = shown[shown < len(names)].tolist()
    marks = {"s": 12, "linewidths": 0.4, "edgecolors": "#888"}
    panels = []
    for title, (points, classes) in {"Real": real, "Generated, after training": after}.items():
        groups = (
            (points[classes == value], {**marks, "color": [np.array(palette[value]) / 255]})
            for value in shown
        )
        panels.append(_point_panel(title, "UMAP by class", limits, *groups))
    legend = (Key(names[value], css_colour(palette[value]), "mark") for value in shown)
    return Chart(tuple(panels), tuple(legend))


def line_style(number: int) -> dict[str, Any]:
    """Choose colour and dashes of the n-th line of a chart; thirty lines differ."""
    dashes = DASHES[min(number // len(SERIES), len(DASHES) - 1)]
    return {"color": SERIES[number % len(SERIES)], "linestyle": dashes}


def png(figure: Figure) -> bytes:
    """Convert a figure to PNG on white ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


# Functions import matplotlib themselves: it takes a second, and only the report draws charts.


def _axes(width: float = 3.6, height: float = 2.5) -> Axes:
    """Make axes of a new figure; the size in inches is that of a narrow page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SVG_STYLE):
        return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _curve_panel(
    title: str,
    curves: Iterable[Sequence[pd.Series]],
    legend: tuple[Key, ...] = (),
    *,
    reference: pd.Series | None = None,
    marker: str | None = None,
    line: int | None = None,
) -> Panel:
    """Draw curves by epoch (from 1): the mean over each curve's seeds, and each seed faintly.

    ``reference`` is a dashed line at its last value, ``line`` an epoch with a vertical line.
    """
    from matplotlib.ticker import MaxNLocator

    axes = _axes()
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for number, seeds in enumerate(curves):
        table, style = pd.concat(seeds, axis=1), line_style(number)
        if len(seeds) > 1:
            axes.plot(table.index + 1, table, **style | {"alpha": 0.3, "linewidth": 0.8})
        axes.plot(table.index + 1, table.mean(axis=1), marker=marker, **style)
    if reference is not None:
        axes.axhline(reference.iloc[-1], color=SOFT, linestyle="--", linewidth=1)
    if line is not None:
        axes.axvline(line, color=SOFT, linestyle=":", linewidth=1)
    return Panel(title, _svg(axes, title), legend)


def _point_panel(
    title: str, what: str, limits: np.ndarray, *groups: tuple[np.ndarray, dict[str, Any]]
) -> Panel:
    """Scatter groups of points (n, 2), each with matplotlib's properties of its marks."""
    axes = _axes(height=3.4)
    axes.set(xticks=[], yticks=[], xlim=limits[:, 0], ylim=limits[:, 1])
    axes.spines[:].set_visible(False)
    for points, marks in groups:
        axes.scatter(points[:, 0], points[:, 1], rasterized=True, **marks)
    return Panel(title, _svg(axes, f"{what}: {title}"))


def _limits(*groups: np.ndarray) -> np.ndarray:
    """Find lower left and upper right corner (2, 2) of all points (n, 2), with a margin."""
    points = np.concatenate(groups)
    low, high = points.min(0), points.max(0)
    margin = 0.04 * np.maximum(high - low, 1e-6)
    return np.stack([low - margin, high + margin])


def _keys(names: Iterable[str]) -> tuple[Key, ...]:
    """Make the legend of curves drawn in this order by :func:`_curve_panel`."""
    lines = ((name, line_style(number)) for number, name in enumerate(names))
    return tuple(Key(name, VARIABLES[line["color"]], line["linestyle"]) for name, line in lines)


def _svg(axes: Axes, label: str) -> Markup:
    """Convert a figure to an SVG element, named for screen readers, in the page's colours."""
    import matplotlib as mpl

    buffer, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context(SVG_STYLE):
        axes.figure.savefig(  # type: ignore[union-attr]
            buffer, format="svg", dpi=200, transparent=True, metadata=nothing
        )
    text = buffer.getvalue()
    head = rf'<svg \1 role="img" aria-label="{escape(label)}">'
    for pattern, replacement in (
        (r'\A.*?<svg[^>]*(viewBox="[^"]*")[^>]*>', head),
        (r"<style.*?</style>", ""),  # it would apply to the whole page
        # An id must not occur twice in the page; ids of markers are hashes of what they draw.
        (r'<g id="[^"]*"', "<g"),
        (r"font-family: [^;]*; ", ""),
        (r"\n\s+", "\n"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return Markup(re.sub(r"#[0-9a-f]{6}\b", lambda hue: VARIABLES.get(hue[0], hue[0]), text))
