"""The report's charts: small SVG panels that lie side by side or below each other, in the page's own colours and type.

matplotlib draws them in the colours below; in the page these become CSS variables, so that one drawing serves light and
dark. Names and legends are HTML around the panels: they wrap where the page is narrow, and do not shrink with the panel.
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE = "#1c2430", "#566070", "#dfe4ea"
SERIES = (
    "#2563eb",
    "#ea580c",
    "#059669",
    "#9333ea",
    "#ca8a04",
    "#0891b2",
    "#db2777",
    "#65a30d",
    "#78716c",
    "#dc2626",
)
DARK = (
    "#60a5fa",
    "#fb923c",
    "#34d399",
    "#c084fc",
    "#facc15",
    "#22d3ee",
    "#f472b6",
    "#a3e635",
    "#a8a29e",
    "#f87171",
)
DASHES = ("solid", "dashed", "dotted")  # of the first ten series, the next ten, the rest
REAL, GENERATED = (
    "#3b82f6",
    "#ef4444",
)  # of points, which are pixels: seen on white and on dark ground
VARIABLES = {
    INK: "currentColor",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{hue: f"var(--series-{n})" for n, hue in enumerate(SERIES)},
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # names are names
    "svg.fonttype": "none",  # text stays text, in the page's type
    "svg.hashsalt": "featuregan",  # the same drawing, the same bytes
}


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its name, CSS colour, and shape: a line (``solid``, ``dashed``, ``dotted``), a ``mark`` or a ``tick``."""

    name: str
    colour: str
    shape: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One drawing: its title, the SVG, and the legend that belongs to it alone."""

    title: str
    svg: Markup
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Panels that belong together, and the legend of all of them."""

    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()


def css_colour(colour: tuple[int, int, int]) -> str:
    """(red, green, blue), each 0..255, as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def gan_curves(curves: Mapping[str, pd.Series]) -> Chart:
    """Losses of the GAN's own training (thesis figure 4.3), and how often the discriminator is right."""
    found = {
        "Discriminator loss": [
            name for name in curves if name.startswith("discriminator/") and "accuracy" not in name
        ],
        "Discriminator accuracy": [
            name for name in curves if name.startswith("discriminator/accuracy")
        ],
        "Generator losses": [name for name in curves if name.startswith("generator/")],
    }
    panels = []
    for title, names in found.items():
        if not names:
            continue
        axes = _epochs()
        for number, name in enumerate(names):
            axes.plot(curves[name].index + 1, curves[name], **_line(number))
        labels = [name.split("/")[1].removeprefix("accuracy_").replace("_", " ") for name in names]
        panels.append(Panel(title, _svg(axes, title), _keys(labels)))
    return Chart(tuple(panels))


def monitor_curves(runs: Mapping[str, Mapping[str, pd.Series]]) -> Chart | None:
    """Measures of generated features by epoch: the GAN's own training (the first run), then each joint training that goes on from it.

    Dashed: what real features measure. None where nothing was measured.
    """
    titles = {
        "frechet": "Fréchet distance",
        "coverage": "Coverage",
        "two_sample_accuracy": "Two-sample accuracy",
        "variance_ratio": "Variance within classes / real",
        "diversity": "Diversity over z / real",
        "consistency": "Consistency (mIoU of the probe)",
    }
    watched = {run: curves for run, curves in runs.items() if "monitor/frechet" in curves}
    if not watched:
        return None
    first = next(iter(watched.values()))
    pretrained = int(first["monitor/frechet"].index[-1]) + 1
    panels = []
    for name, title in titles.items():
        axes = _epochs()
        for number, curves in enumerate(watched.values()):
            curve = curves[f"monitor/{name}"]
            axes.plot(
                (pretrained if number else 0) + curve.index + 1, curve, marker=".", **_line(number)
            )
        reference = first.get(f"monitor/{name}_floor", first.get(f"monitor/{name}_real"))
        if reference is not None:
            axes.axhline(reference.iloc[-1], color=SOFT, linestyle="--", linewidth=1)
        panels.append(Panel(title, _svg(axes, title)))
    return Chart(tuple(panels), (*_keys(watched), Key("real features", VARIABLES[SOFT], "dashed")))


def mean_over_seeds(
    runs: Mapping[str, Sequence[Mapping[str, pd.Series]]], name: str
) -> pd.DataFrame:
    """One curve of every variant, mean over its seeds: a row an epoch (from 1), a column a variant."""
    means = {
        variant: pd.concat([run[name] for run in seeds], axis=1).mean(axis=1)
        for variant, seeds in runs.items()
    }
    table = pd.DataFrame(means)
    return table.set_axis(table.index + 1).rename_axis("epoch")


def decoder_curves(runs: Mapping[str, Sequence[Mapping[str, pd.Series]]]) -> Chart:
    """Training loss on real features and mIoU on val by variant: the mean over seeds, and each seed faintly."""
    titles = {
        "decoder/ce_real": "Cross-entropy on real training features",
        "val/miou": "mIoU on val",
    }
    panels = []
    for name, title in titles.items():
        axes = _epochs()
        for number, seeds in enumerate(runs.values()):
            table = pd.concat([run[name] for run in seeds], axis=1)
            if len(seeds) > 1:
                axes.plot(
                    table.index + 1, table, **{**_line(number), "alpha": 0.3, "linewidth": 0.8}
                )
            axes.plot(table.index + 1, table.mean(axis=1), **_line(number))
        panels.append(Panel(title, _svg(axes, title)))
    return Chart(tuple(panels), _keys(runs))


def differences(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Difference in mIoU to the baseline by variant: its 95% interval over test images, and each seed; None without a baseline."""
    shown = [row for row in rows if row["delta_miou"] is not None]
    if not shown:
        return None
    axes = _axes(height=0.7 + 0.42 * len(shown))
    axes.grid(axis="y", visible=False)
    for place, row in enumerate(
        shown
    ):  # its name stands above its line: names may be long, and the page narrow
        axes.plot(
            [0, 0], [place - 0.1, place + 0.5], color=SOFT, linewidth=1
        )  # no difference: not through the names
        axes.text(
            0.01,
            place - 0.28,
            row["variant"],
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            size=10,
        )
        if row["delta_interval"] is not None:
            axes.plot(
                [row["delta_interval"]["low"], row["delta_interval"]["high"]],
                [place, place],
                color=SERIES[0],
                linewidth=2,
            )
        axes.plot(
            row["delta_miou_values"],
            [place] * len(row["delta_miou_values"]),
            "|",
            color=SOFT,
            markersize=8,
        )
        axes.plot(row["delta_miou"], place, "o", color=SERIES[0], markersize=6)
    axes.set(
        xlabel="points of mIoU against the baseline", yticks=[], ylim=(len(shown) - 0.65, -0.6)
    )
    axes.spines["left"].set_visible(False)
    blue, grey = VARIABLES[SERIES[0]], VARIABLES[SOFT]
    legend = (
        Key("mean over seeds", blue, "mark"),
        Key("95% interval", blue),
        Key("a seed", grey, "tick"),
    )
    return Chart((Panel("", _svg(axes, "Difference in mIoU to the baseline by variant")),), legend)


def projections(real: np.ndarray, before: np.ndarray, after: np.ndarray) -> Chart:
    """Thesis figure 4.1: points (n, 2) each, before and after the GAN's training on the same axes."""
    limits = _limits(real, before, after)
    panels = []
    for points, title in (
        (before, "Before the GAN's training"),
        (after, "After the GAN's training"),
    ):
        axes = _scatter_axes(limits)
        axes.scatter(
            real[:, 0],
            real[:, 1],
            s=10,
            marker="^",
            color=REAL,
            alpha=0.5,
            linewidths=0,
            rasterized=True,
        )
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=12,
            marker="x",
            color=GENERATED,
            alpha=0.6,
            linewidths=0.8,
            rasterized=True,
        )
        panels.append(Panel(title, _svg(axes, f"UMAP of real and generated features: {title}")))
    return Chart(tuple(panels), (Key("real", REAL, "mark"), Key("generated", GENERATED, "mark")))


def projections_by_class(
    real: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Chart:
    """The same points (n, 2) coloured by class (n,): real ones, and generated ones after training."""
    limits = _limits(real[0], after[0])
    shown = [
        value
        for value in range(len(names))
        if (real[1] == value).any() or (after[1] == value).any()
    ]
    panels = []
    for (points, classes), title in ((real, "Real"), (after, "Generated, after training")):
        axes = _scatter_axes(limits)
        for value in shown:
            chosen = points[classes == value]
            hue = np.array(palette[value]) / 255
            axes.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=12,
                color=[hue],
                linewidths=0.4,
                edgecolors="#888",
                rasterized=True,
            )
        panels.append(Panel(title, _svg(axes, f"UMAP by class: {title}")))
    legend = tuple(Key(names[value], css_colour(palette[value]), "mark") for value in shown)
    return Chart(tuple(panels), legend)


# matplotlib takes a second to import: whoever draws nothing, as all stages but the report, does without it.


def _axes(width: float = 3.6, height: float = 2.5) -> Axes:
    """Axes of a new figure of this size in inches, which is that of a narrow page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _epochs() -> Axes:
    from matplotlib.ticker import MaxNLocator

    axes = _axes()
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return axes


def _scatter_axes(limits: tuple[np.ndarray, np.ndarray]) -> Axes:
    axes = _axes(height=3.4)
    axes.set(
        xticks=[], yticks=[], xlim=(limits[0][0], limits[1][0]), ylim=(limits[0][1], limits[1][1])
    )
    axes.spines[:].set_visible(False)
    return axes


def _limits(*groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower left and upper right corner of all points (n, 2), with a margin."""
    low, high = (edge(np.concatenate(groups), axis=0) for edge in (np.min, np.max))
    margin = 0.04 * np.maximum(high - low, 1e-6)
    return low - margin, high + margin


def _line(number: int) -> dict[str, Any]:
    return {
        "color": SERIES[number % len(SERIES)],
        "linestyle": DASHES[min(number // len(SERIES), len(DASHES) - 1)],
    }


def _keys(names: Iterable[str]) -> tuple[Key, ...]:
    """Legend of curves drawn with :func:`_line` in this order."""
    lines = ((name, _line(number)) for number, name in enumerate(names))
    return tuple(Key(name, VARIABLES[line["color"]], line["linestyle"]) for name, line in lines)


def _svg(axes: Axes, label: str) -> Markup:
    """The figure as an SVG element of a page: scalable, named for screen readers, in the page's colours and type."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer, figure = io.StringIO(), axes.figure
    assert isinstance(figure, Figure)
    with mpl.rc_context(STYLE):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    text = re.sub(
        r"<svg[^>]*>",
        f'<svg {view.group()} role="img" aria-label="{escape(label)}">',
        text,
        count=1,
    )
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    text = re.sub(
        r'<g id="[^"]*"', "<g", text
    )  # nor may an id stand twice in it; those of markers are hashes of what they draw
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(
        r"#[0-9a-f]{6}\b", lambda found: VARIABLES.get(found.group(), found.group()), text
    )
    return Markup(re.sub(r"\n\s+", "\n", text))
