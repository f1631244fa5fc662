"""Coverage of bootstrap intervals, pairing by seed, grouping by protocol, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.common.errors import ConfigError, DataError
from stages.reporting import tables
from stages.reporting.bootstrap import Counts, paired_intervals
from stages.studies import compare as comparison
from stages.studies import figures
from stages.studies import tables as output

NAMES = ["sky", "road", "car"]


def image(right: dict[int, int], wrong: dict[tuple[int, int], int]) -> list[int]:
    """A confusion matrix as images.json holds it."""
    entries = {**{(number, number): pixels for number, pixels in right.items()}, **wrong}
    return [
        number
        for (truth, predicted), pixels in entries.items()
        for number in (truth, predicted, pixels)
    ]


def run_of(variant: str, seed: int, images: dict[str, list[int]], **more) -> dict:
    """A result with the scores of its images."""
    confusion = np.zeros((3, 3))
    for counts in images.values():
        for truth, predicted, pixels in np.array(counts).reshape(-1, 3):
            confusion[truth, predicted] += pixels
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = {name: confusion[k, k] / union[k] if union[k] else None for k, name in enumerate(NAMES)}
    miou = float(np.mean([value for value in iou.values() if value is not None]))
    absent = [name for name, value in iou.items() if value is None]
    accuracy = confusion.diagonal().sum() / confusion.sum()
    scores = {"iou": iou, "miou": miou, "pixel_accuracy": accuracy, "absent": absent}
    return {
        "variant": variant,
        "seed": seed,
        **scores,
        "best_on_val": scores,
        "images": images,
        **more,
    }


def test_counts_and_iou_equal_hand_computed_values() -> None:
    images = {"a": image({0: 6}, {(0, 1): 2}), "b": image({1: 3}, {(0, 1): 1})}
    counts = Counts.of(images, ["a", "b"], 3)
    np.testing.assert_array_equal(counts.truth, [[8, 0, 0], [1, 3, 0]])
    np.testing.assert_array_equal(counts.predicted, [[6, 2, 0], [0, 4, 0]])
    iou = counts.iou(np.array([[1.0, 1.0], [2.0, 0.0]]))
    np.testing.assert_allclose(
        iou, [[6 / 9, 3 / 6, np.nan], [12 / 16, np.nan, np.nan]]
    )  # the second image alone has class 1


def test_intervals_cover_the_true_difference() -> None:
    """95% of the intervals of 200 test splits should contain the population's difference."""
    rng = np.random.default_rng(0)
    size = 20_000
    truth = rng.integers(50, 150, (size, 3)).astype(float)
    difficulty = rng.normal(0, 0.8, (size, 1))  # shared by both sides: images are hard for both

    def side(skill: float) -> Counts:
        accuracy = 1 / (1 + np.exp(-(skill + difficulty + rng.normal(0, 0.3, (size, 3)))))
        right = truth * accuracy
        missed = truth - right
        return Counts(truth, right + np.roll(missed, 1, axis=1), right)

    ours, theirs = side(1.1), side(1.0)

    def part(counts: Counts, chosen: np.ndarray) -> Counts:
        return Counts(counts.truth[chosen], counts.predicted[chosen], counts.right[chosen])

    everything = np.ones((1, size))
    true_difference = float((ours.iou(everything) - theirs.iou(everything)).mean())
    covered, wide = 0, []
    for _ in range(200):
        chosen = rng.integers(0, size, 60)
        (found,), _ = paired_intervals(
            [part(ours, chosen)], [part(theirs, chosen)], [0, 1, 2], resamples=400
        )
        covered += found.low <= true_difference <= found.high
        wide.append(found.high - found.low)
    assert 0.90 <= covered / 200 <= 0.99
    scores = [
        float(part(ours, rng.integers(0, size, 60)).iou(np.ones((1, 60))).mean())
        for _ in range(200)
    ]
    unpaired = 2 * 1.96 * 2**0.5 * np.std(scores)  # were the two sides tested on different images
    assert np.mean(wide) < 0.6 * unpaired  # what pairing is for


@pytest.mark.medium
def test_block_intervals_cover_for_video() -> None:
    """A video of 24 scenes with ten frames: the gain depends on the scene.

    Intervals over single frames are too narrow.
    """
    rng = np.random.default_rng(2)
    frames, of_a_scene = 240, 10

    def video(scenes: int) -> tuple[Counts, Counts]:
        truth = rng.integers(80, 120, (scenes * of_a_scene, 3)).astype(float)
        gain = np.repeat(rng.normal(0.1, 0.4, (scenes, 1)), of_a_scene, axis=0)
        sides = []
        for skill in (1 + gain, 1.0):
            right = truth / (1 + np.exp(-(skill + rng.normal(0, 0.1, truth.shape))))
            sides.append(Counts(truth, right + np.roll(truth - right, 1, axis=1), right))
        return sides[0], sides[1]

    ours, theirs = video(5_000)
    everything = np.ones((1, 50_000))
    true_difference = float((ours.iou(everything) - theirs.iou(everything)).mean())
    covered = dict.fromkeys((1, 20), 0)
    for _ in range(200):
        ours, theirs = video(frames // of_a_scene)
        for length in covered:
            (found,), _ = paired_intervals(
                [ours], [theirs], [0, 1, 2], resamples=400, block_length=length
            )
            covered[length] += found.low <= true_difference <= found.high
    assert covered[1] / 200 < 0.6
    assert 0.85 <= covered[20] / 200 <= 0.99


def test_too_few_blocks_are_refused() -> None:
    images = {str(number): image({0: 5, 1: 5, 2: 5}, {}) for number in range(30)}
    base, ours = ([run_of(name, 0, images)] for name in ("baseline", "better"))
    assert len(tables.compare({"baseline": base, "better": ours}, [], block_length=3)) == 2
    message = "block_length: 30 test images are fewer than 10 blocks of 4; take shorter ones"
    with pytest.raises(ConfigError, match=rf"report\.{message}"):
        tables.compare({"baseline": base, "better": ours}, [], block_length=4)


def test_intervals_cover_with_several_seeds_and_a_rare_class() -> None:
    """Three seeds a side; one class is in one of eight images, so some resamples have few of it."""
    rng = np.random.default_rng(1)
    size, seeds, drawn = 10_000, 3, 120
    truth = rng.integers(50, 150, (size, 3)).astype(float)
    truth[:, 2] *= rng.random(size) < 1 / 8
    difficulty = rng.normal(0, 0.8, (size, 1))

    def sides(skill: float) -> list[Counts]:
        found = []
        for _ in range(seeds):
            right = truth / (1 + np.exp(-(skill + difficulty + rng.normal(0, 0.3, (size, 3)))))
            found.append(Counts(truth, right + np.roll(truth - right, 1, axis=1), right))
        return found

    ours, theirs = sides(1.1), sides(1.0)
    everything = np.ones((1, size))
    of_all = [[float(counts.iou(everything).mean()) for counts in side] for side in (ours, theirs)]
    true_difference = float(np.mean(of_all[0]) - np.mean(of_all[1]))
    covered = 0
    for _ in range(200):
        chosen = rng.integers(0, size, drawn)
        parts = [
            [
                Counts(counts.truth[chosen], counts.predicted[chosen], counts.right[chosen])
                for counts in side
            ]
            for side in (ours, theirs)
        ]
        (found,), _ = paired_intervals(*parts, [0, 1, 2], resamples=400)
        covered += found.low <= true_difference <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_differences_are_paired_by_seed() -> None:
    base = [
        run_of("baseline", seed, {"a": image({0: 8, 1: 6}, {(0, 1): 2}), "b": image({0: 4}, {})})
        for seed in (0, 1)
    ]
    ours = [
        run_of("better", seed, {"a": image({0: 9, 1: 6}, {(0, 1): 1}), "b": image({0: 4}, {})})
        for seed in (1, 7)
    ]
    rows = tables.compare({"baseline": base, "better": ours}, [])
    assert rows[0]["delta_miou"] is None
    expected = 100 * ((13 / 14 + 6 / 7) / 2 - (12 / 14 + 6 / 8) / 2)
    assert rows[1]["delta_miou_values"] == [pytest.approx(expected)]  # seed 7 has no partner
    assert rows[1]["delta_interval"]["low"] <= expected <= rows[1]["delta_interval"]["high"]
    assert set(rows[1]["delta_intervals_by_class"]) == set(NAMES)
    assert rows[1]["delta_intervals_by_class"]["car"] is None  # the images have none
    of_one_class = tables.compare({"baseline": base, "better": ours}, ["road"])
    assert of_one_class[1]["delta_miou"] == pytest.approx(100 * (6 / 7 - 6 / 8))
    assert rows[0]["delta_std"] is rows[1]["delta_std"] is None
    same = run_of("better", 0, base[0]["images"])
    two = tables.compare({"baseline": base, "better": [same, ours[0]]}, [])[
        1
    ]  # differences of 0 and of as much as before
    assert (two["delta_miou"], two["delta_std"]) == (
        pytest.approx(expected / 2),
        pytest.approx(expected / 2**0.5),
    )
    with pytest.raises(ConfigError, match="'cat' is no class"):
        tables.compare({"baseline": base}, ["cat"])


def test_means_are_over_the_classes_of_the_truth() -> None:
    """A pixel of a class that the test images lack is one wrong pixel; it adds no class."""
    base = [run_of("baseline", 0, {"a": image({0: 8, 1: 6}, {(0, 1): 2}), "b": image({0: 4}, {})})]
    ours = [
        run_of(
            "other", 0, {"a": image({0: 7, 1: 6}, {(0, 1): 2, (0, 2): 1}), "b": image({0: 4}, {})}
        )
    ]
    assert (base[0]["iou"]["car"], ours[0]["iou"]["car"]) == (None, 0.0)
    rows = tables.compare({"baseline": base, "other": ours}, [])
    assert rows[1]["delta_miou"] == pytest.approx(100 * (11 / 14 - 12 / 14) / 2)
    assert rows[1]["delta_miou"] == pytest.approx(rows[1]["delta_interval"]["value"])
    assert rows[1]["miou_all"]["mean"] == pytest.approx(100 * (11 / 14 + 6 / 8) / 2)
    assert rows[1]["absent_classes"] == ["car"]
    assert np.isnan(tables.per_class({"baseline": base, "other": ours}).loc["car", "other"])
    entries = comparison.compare(
        [comparison.Group("one", 2, {"baseline": base})], ["road", "car"], "baseline"
    )
    assert entries[0].title.endswith("; mIoU over road (the test images have no car)")
    with pytest.raises(
        ConfigError, match="the test images have none of these classes; they have sky, road"
    ):
        tables.compare({"baseline": base}, ["car"])


def test_each_class_has_intervals_of_iou_and_difference() -> None:
    images = {str(n): image({0: 8, 1: n}, {(1, 0): 10 - n}) for n in range(1, 9)}
    better = {str(n): image({0: 8, 1: n + 1}, {(1, 0): 9 - n}) for n in range(1, 9)}
    rows = tables.compare(
        {"baseline": [run_of("baseline", 0, images)], "better": [run_of("better", 0, better)]}, []
    )
    table = tables.per_class_with_intervals(rows).set_index(["variant", "class"])
    road = table.loc["baseline", "road"]
    assert road["iou"] == pytest.approx(100 * 36 / 80)
    assert road["iou_low"] < 40 < road["iou"] < 50 < road["iou_high"]
    assert np.isnan(road["delta"])
    road = table.loc["better", "road"]
    assert road["delta"] == pytest.approx(10)  # of ten pixels of every image one more is right
    assert road["delta_low"] == pytest.approx(10) == road["delta_high"]
    assert table.loc["better", "car"].isna().all()


def test_runs_tested_on_other_images_are_not_compared() -> None:
    base = [run_of("baseline", 0, {"a": image({0: 8}, {})})]
    ours = [run_of("better", 0, {"b": image({0: 8}, {})})]
    with pytest.raises(DataError, match="other images"):
        tables.compare({"baseline": base, "better": ours}, [])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two data set sizes, two variants, two seeds."""
    rng = np.random.default_rng(0)
    for experiment, size in (("full", 80), ("eighth", 10)):
        for variant, gain in (("baseline", 0), ("noise", 4)):
            for seed in (0, 1):
                wrong = [{(0, 1): 20 - gain, (2, 0): int(rng.integers(1, 9))} for _ in range(12)]
                images = {
                    f"i{n}": image({0: 50 + gain, 1: 40, 2: 30}, some)
                    for n, some in enumerate(wrong)
                }
                values = run_of(
                    variant,
                    seed,
                    images,
                    experiment=experiment,
                    protocol=experiment,
                    train_images=size,
                )
                if gain:
                    values["gan"] = {
                        "discriminator/real": [1.0, 0.9],
                        "monitor/frechet": [None, 3.0],
                    }
                path = tmp_path / experiment / f"{variant}-{seed}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(values))
    return tmp_path


def test_groups_by_protocol_are_written_with_tables_and_pictures(
    results: Path, tmp_path: Path
) -> None:
    compared = comparison.compare(comparison.read_groups([results]), [], "baseline")
    assert [(entry.group.name, entry.group.train_images) for entry in compared] == [
        ("full", 80),
        ("eighth", 10),
    ]
    assert [row["variant"] for row in compared[0].rows] == ["baseline", "noise"]
    assert all(row["delta_interval"]["low"] > 0 for entry in compared for row in entry.rows[1:])
    text = output.as_text(compared)
    assert "full: 80 training images" in text
    written = output.write(compared, tmp_path / "out")
    assert sorted(written) == sorted(path.name for path in (tmp_path / "out").iterdir())
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert list(table["experiment"]) == ["full", "full", "eighth", "eighth"]
    assert (table["delta_low"].dropna() > 0).all()
    by_class = pd.read_csv(tmp_path / "out" / "per_class.csv")
    assert set(by_class["class"]) == set(NAMES)
    for name in ("comparison.png", "curve.png", "gans.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_figures_show_each_gan_once_with_the_legend_below(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in results.rglob("noise-*.json"):
        values = json.loads(file.read_text())
        values["gan"] |= {
            "generator/adversarial": [1.0, 0.5],
            "generator/feature_matching": [2.0, 1.0],
        }
        file.write_text(json.dumps(values))
        file.with_name(file.name.replace("noise", "frozen")).write_text(
            json.dumps({**values, "variant": "frozen"})
        )
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
    compared = comparison.compare(comparison.read_groups([results]), [], "baseline")
    output.write(compared, tmp_path / "out")
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    _, gans, curve = drawn
    assert [axes.get_title() for axes in gans.axes] == [
        "Discriminator, real",
        "Generator",
        "Feature matching",
    ]
    (legend,) = gans.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "full: frozen, noise",
        "eighth: frozen, noise",
    ]
    for axes in gans.axes:
        assert [line.get_color() for line in axes.lines] == [
            line.get_color() for line in legend.get_lines()
        ]
    for figure in (gans, curve):
        top = figure.legends[0].get_window_extent().y1
        assert all(top < axes.get_tightbbox().y0 for axes in figure.axes)


def gan(*losses: float | None) -> dict[str, list[float | None]]:
    """Curves with these losses of the generator."""
    return {"generator/adversarial": [*losses], "monitor/frechet": [1.0] * len(losses)}


def drawn_gans(
    gans: dict[str, tuple[dict, dict | None]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Figure:
    """Write one result a variant, with its pretraining and joint phase; return ``gans.png``."""
    images = {f"i{n}": image({0: 50, 1: 40}, {(0, 1): 2}) for n in range(12)}
    more = {"experiment": "all", "protocol": "all", "train_images": 9}
    for variant, (pretraining, joint) in gans.items():
        values = run_of(variant, 0, images, **more, gan=pretraining)
        if joint is not None:
            values["gan_joint"] = joint
        (folder / f"{variant}.json").write_text(json.dumps(values))
    (folder / "baseline.json").write_text(json.dumps(run_of("baseline", 0, images, **more)))
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
    written = output.write(
        comparison.compare(comparison.read_groups([folder]), [], "baseline"), folder / "out"
    )
    return dict(zip([name for name in written if name.endswith(".png")], drawn, strict=True))[
        "gans.png"
    ]


def points(line: Line2D) -> list[tuple[float, float | None]]:
    """Epochs and values of a line; None where there is no value."""
    return [
        (float(x), None if np.isnan(y) else float(y))
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def test_a_gans_curve_goes_on_through_the_joint_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure 5.2: each weight of feature matching has a GAN and a decoder that trained it."""
    figure = drawn_gans(
        {
            "lambda-2": (gan(3.0, 2.0), gan(1.0, None, 0.5)),
            "lambda-5": (gan(5.0, 4.0, 3.0), gan(2.0)),
            "of-an-earlier-version": (gan(7.0, 6.0), None),
        },
        tmp_path,
        monkeypatch,
    )
    (axes,) = figure.axes
    assert {line.get_label(): points(line) for line in axes.lines[:3]} == {
        "lambda-2": [(1, 3.0), (2, 2.0), (3, 1.0), (4, None), (5, 0.5)],
        "lambda-5": [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)],
        "of-an-earlier-version": [(1, 7.0), (2, 6.0)],
    }
    ends = axes.lines[3:]
    assert [(line.get_label(), list(line.get_xdata())) for line in ends] == [
        ("frozen_epochs", [2, 2]),
        ("frozen_epochs", [3, 3]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "lambda-2",
        "lambda-5",
        "of-an-earlier-version",
        "frozen_epochs",
    ]


def test_joint_phases_of_one_gan_share_its_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretraining = gan(3.0, 2.0)
    figure = drawn_gans(
        {
            "1x": (pretraining, gan(1.0)),
            "2x": (pretraining, gan(0.0)),
            "frozen": (pretraining, None),
        },
        tmp_path,
        monkeypatch,
    )
    assert {line.get_label(): points(line) for line in figure.axes[0].lines[:-1]} == {
        "1x (pretraining also of frozen)": [(1, 3.0), (2, 2.0), (3, 1.0)],
        "2x": [(2, 2.0), (3, 0.0)],
    }


def test_without_a_joint_phase_there_is_no_line_at_frozen_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn_gans({"frozen": (gan(3.0, 2.0), None)}, tmp_path, monkeypatch)
    assert [points(line) for line in figure.axes[0].lines] == [[(1, 3.0), (2, 2.0)]]


def test_tables_of_named_and_all_classes_and_of_gains_by_size(
    results: Path, tmp_path: Path
) -> None:
    (results / "eighth" / "noise-1.json").unlink()
    compared = comparison.compare(comparison.read_groups([results]), ["sky", "road"], "baseline")
    for entry in compared:
        of_all = comparison.compare(
            comparison.read_groups([results / entry.group.name]), [], "baseline"
        )
        for row, row_all in zip(entry.rows, of_all[0].rows, strict=True):
            shown = ("miou", "delta_miou", "delta_interval", "miou_best_on_val")
            assert [tables.over_all(row)[key] for key in shown] == [row_all[key] for key in shown]
        assert entry.rows[1]["delta_miou"] != entry.rows[1]["delta_miou_all"]
    full, eighth = (entry.rows[1] for entry in compared)
    of_two, of_all, *_ = output.as_text(compared).split("\n\n")
    assert "full: 80 training images; mIoU over sky, road" in of_two
    assert "{delta_miou:+.2f}".format(**full) in of_two
    assert "full: mIoU over all classes of the test images" in of_all
    assert "{delta_miou_all:+.2f}".format(**full) in of_all
    output.write(compared, tmp_path / "out")
    csv = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert csv["delta_miou_all"][1] == pytest.approx(full["delta_miou_all"], abs=1e-4)
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0].endswith("by number of training images, over sky, road")

    def gain(row: dict) -> str:
        return "{:+.1f} ({low:+.1f} to {high:+.1f}".format(
            row["delta_miou"], **row["delta_interval"]
        )

    heads = [
        number
        for number, line in enumerate(lines)
        if line == "| variant | 10 (1 seed) | 80 (2 seeds) |"
    ]
    for head, of in zip(heads, (lambda row: row, tables.over_all), strict=True):
        baseline, noise = lines[head + 2 : head + 4]
        values = [of(entry.rows[0])["miou"]["mean"] for entry in compared[::-1]]
        assert baseline == "| baseline | {:.1f} (2 seeds) | {:.1f} |".format(*values)
        assert noise == f"| noise | {gain(of(eighth))}) | {gain(of(full))}) |"
    wide = next(
        line
        for line in lines[lines.index("## " + compared[0].title) :]
        if line.startswith("| noise")
    )
    cells = wide.strip("| ").split(" | ")
    assert cells[2] == "{mean:.2f} ± {std:.2f}".format(**full["miou"])
    assert cells[5] == "{mean:.2f} ± {std:.2f}".format(**full["miou_best_on_val"])
    assert cells[6] == "{mean:.2f} ± {std:.2f}".format(**full["miou_all"])
    assert cells[3] == "{delta_miou:+.2f} ± {delta_std:.2f}".format(**full)
    assert cells[7] == "{delta_miou_all:+.2f} ± {delta_std_all:.2f}".format(**full)


def test_groups_of_other_data_have_separate_tables_and_no_curve(
    results: Path, tmp_path: Path
) -> None:
    """Two studies may name their experiments alike."""
    (results / "one").mkdir()
    (results / "two").mkdir()
    (results / "full").rename(results / "one" / "full")
    (results / "eighth").rename(results / "two" / "full")
    for file in (results / "two").rglob("*.json"):
        values = json.loads(file.read_text())
        images = {f"other {name}": counts for name, counts in values["images"].items()}
        file.write_text(json.dumps({**values, "experiment": "full", "images": images}))
    compared = comparison.compare(comparison.read_groups([results]), [], "baseline")
    assert [entry.group.name for entry in compared] == ["one/full", "two/full"]
    assert "curve.png" not in output.write(compared, tmp_path / "out")
    assert (
        (tmp_path / "out" / "comparison.md")
        .read_text()
        .startswith("## one/full: 80 training images")
    )


def test_runs_can_be_limited_to_seeds(results: Path, tmp_path: Path) -> None:
    compared = comparison.compare(comparison.read_groups([results], [1]), [], "baseline")
    assert {tuple(row["seeds"]) for entry in compared for row in entry.rows} == {(1,)}
    both = comparison.compare(comparison.read_groups([results]), [], "baseline")
    assert compared[0].rows[1]["delta_miou_values"] == both[0].rows[1]["delta_miou_values"][1:]
    with pytest.raises(
        ConfigError, match="--seed: there is no run of seed 7; the results have 0, 1"
    ):
        comparison.read_groups([results], [0, 7])


def test_rows_are_ordered_by_number_of_seeds_then_gain(
    tmp_path: Path,
) -> None:
    def group(name: str, size: int, **right: int) -> comparison.Group:
        runs = {
            name: [run_of(name, 0, {"a": image({0: pixels}, {(0, 1): 20 - pixels})})]
            for name, pixels in right.items()
        }
        unpaired = {"alone": [run_of("alone", 5, {"a": image({0: 19}, {(0, 1): 1})})]}
        return comparison.Group(name, size, {**unpaired, **runs})

    groups = [
        group("all", 3, worse=8, better=15, baseline=10, best=16),
        group("few", 2, baseline=9, best=11),
    ]
    groups[0].runs["best"].append(run_of("best", 5, {"a": image({0: 3}, {(0, 1): 17})}))
    compared = comparison.compare(groups, [], "baseline")
    assert [row["variant"] for row in compared[0].rows] == [
        "baseline",
        "best",
        "better",
        "worse",
        "alone",
    ]
    assert [tables.cells(row)[-1] for row in compared[0].rows] == ["1", "1 of 2", "1", "1", "1"]
    assert "| alone | — | — |" in output.as_markdown(compared)
    groups[0].runs["baseline"].append(run_of("baseline", 5, {"a": image({0: 2}, {(0, 1): 18})}))
    compared = comparison.compare(groups, [], "baseline")
    assert [row["variant"] for row in compared[0].rows] == [
        "baseline",
        "best",
        "alone",
        "better",
        "worse",
    ]
    output.write(comparison.compare([group("alone", 1, baseline=5)], [], "baseline"), tmp_path)
    assert not (tmp_path / "comparison.png").exists()


def test_unpaired_results_are_listed(results: Path) -> None:
    assert comparison.left_out(comparison.read_groups([results]), "baseline") == []
    (results / "full" / "baseline-1.json").unlink()
    for seed in (0, 1):
        (results / "eighth" / f"baseline-{seed}.json").unlink()
    lines = comparison.left_out(comparison.read_groups([results]), "baseline")
    named = [line.split(":")[0].removeprefix(f"{results}/") for line in lines]
    assert named == ["full/noise-1.json", "eighth/noise-0.json", "eighth/noise-1.json"]
    assert "there is no 'baseline' of seed 1" in lines[0]


def test_duplicate_and_foreign_result_files_are_refused(results: Path) -> None:
    with pytest.raises(ConfigError, match="there is no 'basline' among baseline, noise"):
        comparison.compare(comparison.read_groups([results]), [], "basline")
    double = results / "full" / "again-0.json"
    double.write_bytes((results / "full" / "noise-0.json").read_bytes())
    with pytest.raises(DataError, match="same variant and seed"):
        comparison.read_groups([results])
    double.write_text("{}")
    with pytest.raises(DataError, match="is no result of a study"):
        comparison.read_groups([results])
    with pytest.raises(DataError, match="there is no result file"):
        (results / "empty").mkdir()
        comparison.read_groups([results / "empty"])
