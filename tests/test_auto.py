"""`auto` runs each step once, stops at the first failure, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from ruamel.yaml import YAML

from stages.commands.steps import Steps


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that steps run, in place of running them; ``export`` fails."""
    run: list[list[str]] = []

    def record(command: list[str], *, cwd: Path, check: bool) -> SimpleNamespace:
        run.append(command[2:])
        return SimpleNamespace(returncode=1 if "export" in command else 0)

    monkeypatch.setattr("stages.commands.steps.subprocess.run", record)
    return run


def start(out: Path) -> Steps:
    return Steps(click.Context(click.Command("auto")), out, budget=60)


def test_a_step_runs_again_only_with_other_parameters_or_features(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    photos = tmp_path / "photos"
    (photos / "unlabelled").mkdir(parents=True)
    for _ in range(2):
        steps = start(tmp_path / "model")
        steps.write_params("quickstart", photos)
        steps.run("prepare")
        steps.run("train-decoder", "--variant", "baseline", once=True)
        steps.run("train-decoder", "--variant", "chosen", once=True)
    train = ["train-decoder", "--variant"]
    assert commands == [["prepare"], [*train, "baseline"], [*train, "chosen"], ["prepare"]]
    params = YAML(typ="safe").load((tmp_path / "model" / "params.yaml").read_text())
    assert (params["prepare"]["dataset"], params["prepare"]["split"]) == ("auto", "random")
    assert params["prepare"]["unlabelled"] == "unlabelled"
    index = tmp_path / "model" / "features" / "train" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text("other features")
    start(tmp_path / "model").run("train-decoder", "--variant", "baseline", once=True)
    assert commands[4:] == [[*train, "baseline"]]


def test_a_failure_ends_with_its_exit_code_and_is_tried_again(
    tmp_path: Path, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        steps = start(tmp_path)
        (tmp_path / "params.yaml").write_text("a: 1\n")
        with pytest.raises(click.exceptions.Exit) as stopped:
            steps.run("export", "decoder", once=True)
        assert stopped.value.exit_code == 1
    assert commands == [["export", "decoder"]] * 2
    assert "export failed; mend what it says and run the same command" in capsys.readouterr().err


def test_few_images_are_repeated(tmp_path: Path) -> None:
    steps = start(tmp_path)
    steps.write_params("quickstart", tmp_path)
    (tmp_path / "dataset").mkdir()
    summary = {"splits": {"train": {"images": 70}}}
    (tmp_path / "dataset" / "summary.json").write_text(json.dumps(summary))
    steps.fit_to_images()
    params = YAML(typ="safe").load((tmp_path / "params.yaml").read_text())
    assert params["train_decoder"]["repeats"] == params["train_gan"]["repeats"] == 5  # 350 samples
