"""The report: its numbers, the verdict that follows from them, its charts and pictures."""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from matplotlib.axes import Axes
from PIL import Image

from stages import report
from stages.common.errors import ConfigError, DataError
from stages.reporting import charts, pictures, tables
from stages.reporting.features import (
    feature_grid,
    normalised_pair,
    project,
    sample_vectors,
    subsample_channels,
)
from stages.reporting.verdict import verdict
from tests.factories import write_curve


def result(variant: str, seed: int, iou: dict[str, float | None], pa: float) -> dict:
    present = [value for value in iou.values() if value is not None]
    miou = sum(present) / len(present)
    best = {"epoch": 0, "pixel_accuracy": pa, "miou": miou, "iou": iou}
    return {
        "variant": variant,
        "seed": seed,
        "pixel_accuracy": pa,
        "miou": miou,
        "iou": iou,
        "absent": [name for name, value in iou.items() if value is None],
        "best_on_val": best,
    }


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    figures = {
        ("baseline", 0): ({"a": 0.5, "b": 0.3, "c": None}, 0.8),
        ("baseline", 1): ({"a": 0.6, "b": 0.4, "c": None}, 0.82),
        ("featuregan-1x", 0): ({"a": 0.55, "b": 0.35, "c": None}, 0.81),
        ("featuregan-1x", 1): ({"a": 0.61, "b": 0.43, "c": 0.0}, 0.83),
    }
    for (variant, seed), (iou, pa) in figures.items():
        folder = tmp_path / f"{variant}-{seed}"
        folder.mkdir()
        (folder / "test.json").write_text(json.dumps(result(variant, seed, iou, pa)))
        (folder / "images.json").write_text(json.dumps({"x": [0, 0, 5], "y": [1, 0, 2, 1, 1, 7]}))
    return tmp_path


def test_comparison_equals_hand_computed_values(metrics: Path) -> None:
    rows = tables.compare(
        tables.read_results(metrics, ["baseline", "featuregan-1x"], [0, 1]), ["a", "b"]
    )
    assert [row["variant"] for row in rows] == ["baseline", "featuregan-1x"]
    assert rows[0]["miou"]["values"] == pytest.approx([40, 50])
    assert rows[0]["miou"]["std"] == pytest.approx(statistics.stdev([40, 50]))
    assert rows[1]["miou"]["values"] == pytest.approx([45, 52])
    assert rows[1]["delta_miou"] == pytest.approx((5 + 2) / 2)
    assert rows[1]["pa"]["mean"] == pytest.approx(82)
    assert rows[1]["seeds"] == [0, 1]
    assert rows[1]["miou_all"]["values"] == pytest.approx(
        [45, 52]
    )  # no test image has c, which one of the decoders sees
    assert rows[1]["absent_classes"] == ["c"]
    text = tables.as_text(rows)
    assert re.search(r"featuregan-1x +82.00 ± 1.41 +48.50 ± 4.95 +\+3.50", text)


def test_a_missing_result_or_class_is_named(metrics: Path) -> None:
    with pytest.raises(DataError, match="train-decoder --variant baseline --seed 2"):
        tables.read_results(metrics, ["baseline"], [0, 2])
    with pytest.raises(ConfigError, match="'dragon' is no class of this data set"):
        tables.compare(tables.read_results(metrics, ["baseline"], [0]), ["dragon"])


def test_per_class_means_are_empty_for_absent_classes(metrics: Path) -> None:
    frame = tables.per_class(tables.read_results(metrics, ["baseline", "featuregan-1x"], [0, 1]))
    assert frame.loc["a", "baseline"] == pytest.approx(55)
    assert np.isnan(frame.loc["c", "baseline"])


def test_feature_grid_has_channels_down_and_samples_across() -> None:
    features = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    grid = feature_grid(features)
    assert grid.shape == (6, 4)
    for sample in range(2):
        for channel in range(3):
            np.testing.assert_array_equal(
                grid[2 * channel : 2 * channel + 2, 2 * sample : 2 * sample + 2],
                features[sample, channel],
            )
    assert subsample_channels(2048, 5).tolist() == [0, 512, 1024, 1535, 2047]
    real, generated = normalised_pair(*np.random.default_rng(0).random((2, 2, 3, 4, 4)))
    assert real.min() >= 0
    assert generated.max() <= 1


def test_sampled_vectors_have_the_class_of_their_position() -> None:
    masks = (
        np.random.default_rng(0)
        .integers(0, 3, (2, 2, 3))
        .repeat(8, 1)
        .repeat(8, 2)
        .astype(np.uint8)
    )
    features = (
        masks[:, None, ::8, ::8].repeat(4, 1).astype(np.float32)
    )  # every channel is the class itself
    vectors, classes = sample_vectors(features, masks, 100, np.random.default_rng(0))
    assert vectors.shape == (12, 4)
    np.testing.assert_array_equal(vectors[:, 0], classes)


@pytest.mark.slow
def test_umap_separates_groups_and_is_deterministic() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.standard_normal((40, 10)), rng.standard_normal((40, 10)) + 20]
    first, second = project(groups, neighbors=10, min_dist=0.1, seed=0)
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 3 * max(first.std(), second.std()) / 2
    again, _ = project(groups, neighbors=10, min_dist=0.1, seed=0)
    np.testing.assert_array_equal(again, first)
    few, _ = project([group[:3] for group in groups], neighbors=10, min_dist=0.1, seed=0)
    assert few.shape == (3, 2)  # fewer vectors than neighbors


def row(
    variant: str, by_seed: list[float], interval: tuple[float, float] | None, miou: float = 40.0
) -> dict:
    low_high = {"low": interval[0], "high": interval[1]} if interval else None
    delta = statistics.fmean(by_seed) if by_seed else None
    return {
        "variant": variant,
        "miou": {"mean": miou + (delta or 0)},
        "delta_miou": delta,
        "delta_miou_values": by_seed,
        "delta_interval": low_high,
    }


BASELINE_ROW = row("baseline", [], None)


@pytest.mark.parametrize(
    ("others", "outcome", "words"),
    [
        ([], "open", "Nothing to compare with"),
        ([row("a", [1.0, 2.0], (0.5, 2.5))], "helps", "Yes: a is 1.50 points of mIoU above"),
        (
            [row("a", [1, 1], (0.5, 2.5)), row("b", [1.8, 1.8], (-0.5, 4.5))],
            "helps",
            "Yes: a is 1.00 points",
        ),  # b may gain more by chance
        (
            [row("a", [3.0, -0.5], (0.5, 2.5))],
            "unclear",
            "Not clear: a is 1.25 points of mIoU above the baseline, which may be chance",
        ),
        (
            [row("a", [2.0], (0.5, 2.5))],
            "unclear",
            "Not clear: a is 2.00 points of mIoU above the baseline, with one seed, which may be"
            " chance",
        ),
        ([row("a", [1.0], (-0.5, 2.5))], "unclear", "Not clear: a is 1.00 points of mIoU above"),
        (
            [row("a", [-0.2], (-0.5, 0.1)), row("b", [-3.0], (-4.0, -2.0))],
            "unclear",
            "a is 0.20 points of mIoU below",
        ),
        (
            [row("a", [-2.0], (-3.0, -1.0))],
            "unclear",
            "a is 2.00 points of mIoU below the baseline, with one seed",
        ),
        ([row("a", [-1.0, -3.0], (-3.0, -1.0))], "hurts", "No: a is 2.00 points of mIoU below"),
        (
            [row("a", [-2.0, -2.0], (-3.0, -1.0)), row("b", [-3.0, -3.0], (-4.0, -2.0))],
            "hurts",
            "No: every variant is below the baseline; the closest, a",
        ),
        ([row("a", [1.0], None)], "open", "Not known: a is 1.00"),
    ],
)
def test_the_verdict_follows_from_interval_and_seeds(
    others: list[dict], outcome: str, words: str
) -> None:
    found = verdict([BASELINE_ROW, *others], 100)
    assert found.outcome == outcome
    assert words in found.headline


def test_the_verdict_names_images_seeds_and_variants() -> None:
    one = verdict([BASELINE_ROW, row("a", [1.0], (0.5, 2.5)), row("b", [0.0], (-1.0, 1.0))], 100)
    assert dict(one.figures) == {
        "baseline, mIoU": "40.00 %",
        "a, mIoU": "41.00 %",
        "difference": "+1.00",
        "95% interval": "+0.50 to +2.50",
    }
    assert "100 test images, for one seed" in one.certainty
    assert "picked" not in one.certainty
    alike = verdict(
        [BASELINE_ROW, row("a", [1.0, 2.0], (0.5, 2.5)), row("b", [0.0, 1.0], (-1.0, 1.0))], 100, 20
    )
    assert "over the 100 test images in blocks of 20, for these 2 seeds" in alike.certainty
    assert "selected from 2 variants" in alike.certainty
    two = verdict([BASELINE_ROW, row("a", [-1.0, -3.0], (-4.0, -1.0))], 100)
    assert "for these 2 seeds; by seed the difference is −1.00, −3.00" in two.certainty
    assert "picked" not in two.certainty


def test_charts_use_the_pages_colours_and_are_deterministic() -> None:
    curve = pd.Series([0.3, 0.2, 0.1])
    runs = {
        f"variant $_{number}": [{"decoder/ce_real": curve, "val/miou": 1 - curve}]
        for number in range(12)
    }
    first, second = charts.decoder_curves(runs), charts.decoder_curves(runs)
    assert first == second
    assert [key.name for key in first.legend] == list(runs)
    assert [first.legend[number].shape for number in (0, 9, 10)] == ["solid", "solid", "dashed"]
    for panel in first.panels:
        assert panel.svg.startswith(
            f'<svg viewBox="0 0 259.2 180" role="img" aria-label="{panel.title}">'
        )
        assert "var(--series-3)" in panel.svg
        assert not re.search(
            r"#[0-9a-f]{6}\b(?!\))", re.sub(r"#[mp][0-9a-f]{10}", "", panel.svg)
        )  # no colour of its own
        assert "DejaVu" not in panel.svg
    assert charts.differences([BASELINE_ROW]) is None
    shown = charts.differences([BASELINE_ROW, row("a & <b>", [1.0], (0.5, 2.5))])
    assert shown is not None
    assert "a &amp; &lt;b&gt;</text>" in shown.panels[0].svg


def lines_of(chart: Callable[[], charts.Chart], monkeypatch: pytest.MonkeyPatch) -> dict:
    """Draw a chart; return epochs and values of each line, by panel and the legend's name."""
    drawn: list[Axes] = []
    with monkeypatch.context() as patch:
        patch.setattr(charts, "_svg", lambda axes, label: drawn.append(axes) or Markup())
        panels = chart().panels
    return {
        panel.title: [
            [*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in axes.lines
        ]
        for panel, axes in zip(panels, drawn, strict=True)
    }


def test_the_gans_losses_go_on_through_the_joint_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figure 4.3: one curve a loss, with a vertical line at the end of the pretraining."""
    pretraining = {
        "discriminator/accuracy_real": pd.Series([0.5, 0.75]),
        "discriminator/real": pd.Series([4.0, 3.0]),
        "generator/adversarial": pd.Series([1.0, 2.0]),
        "monitor/frechet": pd.Series([9.0], index=[1]),
    }
    joint = {
        "discriminator/accuracy_real": pd.Series([1.0]),
        "discriminator/real": pd.Series([2.0, 1.0]),
        "generator/adversarial": pd.Series([3.0, 5.0]),
        "generator/kld": pd.Series([7.0, 8.0]),
        "val/miou": pd.Series([0.1, 0.2]),
    }
    line = [(2, 0), (2, 1)]
    assert lines_of(lambda: charts.gan_curves(pretraining, joint), monkeypatch) == {
        "Discriminator loss": [[(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)], line],
        "Discriminator accuracy": [[(1, 0.5), (2, 0.75), (3, 1.0)], line],
        "Generator losses": [
            [(1, 1.0), (2, 2.0), (3, 3.0), (4, 5.0)],
            [(3, 7.0), (4, 8.0)],
            line,
        ],
    }
    assert lines_of(lambda: charts.gan_curves(pretraining), monkeypatch) == {
        "Discriminator loss": [[(1, 4.0), (2, 3.0)]],
        "Discriminator accuracy": [[(1, 0.5), (2, 0.75)]],
        "Generator losses": [[(1, 1.0), (2, 2.0)]],
    }


def test_the_report_shows_the_joint_phase_of_each_variant_that_trained_the_gan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"decoder/ce_real": [1.0], "val/miou": [0.5]}
    trainings = {
        "train-gan": {"generator/adversarial": [3.0, 2.0]},
        "baseline-0": shared,
        "joint-0": {**shared, "generator/adversarial": [1.0]},
        "frozen-0": shared,
    }
    for training, curves in trainings.items():
        for name, values in curves.items():
            write_curve(tmp_path / training, name, values)
    settings = {"variants": ["baseline"], "seeds": [0]}
    compared = report.CompareConfig(**settings, gan_variants=["joint", "frozen"])
    shown = []
    monkeypatch.setattr(charts, "gan_curves", lambda *curves: shown.append(curves) or len(curves))
    drawn = report._curves(compared, tmp_path, tmp_path)
    assert drawn["gan_curves"] == {"joint": 2}
    gan, joint = shown[0]
    assert (gan["generator/adversarial"].tolist(), joint["generator/adversarial"].tolist()) == (
        [3.0, 2.0],
        [1.0],
    )
    alone = report.CompareConfig(**settings, gan_variants=["frozen"])
    assert report._curves(alone, tmp_path, tmp_path)["gan_curves"] == {"": 1}


def test_pictures_keep_every_pixel() -> None:
    mask = pictures.colour_masks(
        np.array([[0, 1], [255, 1]], np.uint8).repeat(4, 0).repeat(4, 1),
        [(1, 2, 3), (200, 100, 50)],
    )
    decoded = Image.open(
        io.BytesIO(
            base64.b64decode(pictures.as_png("m", mask).uri.removeprefix("data:image/png;base64,"))
        )
    )
    np.testing.assert_array_equal(np.asarray(decoded), mask)
    features = np.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    strip = pictures.feature_strip("real", features, np.stack([mask, mask]), None)
    assert [top.name for top in strip.tops] == ["masks"]
    grid = Image.open(
        io.BytesIO(base64.b64decode(strip.grid.uri.removeprefix("data:image/png;base64,")))
    )
    assert grid.size == (8, 12)


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_the_result_files(project: Path) -> None:
    page = (project / "reports" / "index.html").read_text()
    rows = json.loads((project / "reports" / "comparison.json").read_text())
    assert [row["variant"] for row in rows] == ["baseline", "featuregan-1x", "featuregan-2x"]
    for row in rows:
        assert f">{row['miou']['mean']:.2f}</td>" in page
        stored = json.loads((project / "metrics" / f"{row['variant']}-0" / "test.json").read_text())
        assert row["pa"]["values"] == [pytest.approx(100 * stored["pixel_accuracy"])]
        assert row["miou"]["values"] == [pytest.approx(100 * stored["miou"])]
    found = re.findall(r"data:image/(?:png|jpeg);base64,([^\"]+)", page)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
    # Four rows of image, truth and three variants; two strips of three; four charts of points.
    assert len(images) == 4 * 5 + 2 * 3 + 4
    assert all(image[..., :3].std() > 5 for image in images if image.shape[-1] == 3)
    assert all(
        (image[..., 3] > 0).mean() > 0.001 for image in images if image.shape[-1] == 4
    )  # points on a transparent ground
    assert pd.read_csv(project / "reports" / "comparison.csv")["variant"].tolist() == [
        row["variant"] for row in rows
    ]
    assert (project / "reports" / "comparison.txt").read_text().startswith("variant")
