"""The command `choose` on a project: what it reads, what it writes, and how it resumes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
from ruamel.yaml import YAML

import featurestore
from stages.commands.options import load_preset
from tests.factories import SPEC, call, one_line


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project of 10 training images, without its test images and their features."""
    target = tmp_path / "project"
    target.mkdir()
    shutil.copy(trained / "params.yaml", target)
    shutil.copytree(trained / "features", target / "features")
    shutil.rmtree(target / "features" / "test")
    monkeypatch.chdir(target)
    return target


@pytest.mark.slow
def test_the_chosen_variant_is_written_and_a_killed_choice_resumes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import train_decoder, train_gan

    before = (project / "params.yaml").read_text()
    calls: list[str] = []
    runs = {stage: stage.run for stage in (train_decoder, train_gan)}

    def counted(stage):
        def run(*arguments, features, **options):
            tested, learned = set(features["test"].ids), set(features["train"].ids)
            assert tested
            assert not tested & learned
            assert len(tested | learned) == 10
            calls.append(options.get("name", "gan"))
            if len(calls) == 7:
                raise KeyboardInterrupt
            return runs[stage](*arguments, features=features, **options)

        return run

    for stage in runs:
        monkeypatch.setattr(stage, "run", counted(stage))
    options = ("choose", "--folds", "2", "--device", "cpu", "--workers", "0")
    assert call(*options).exit_code != 0
    assert (project / "params.yaml").read_text() == before
    first = calls[:6]
    result = call(*options)
    assert result.exit_code == 0, result.output
    assert calls[6] == calls[7]  # the interrupted one
    assert len(calls) == len(set(calls)) + 1 + 3 + 2  # and three timed epochs, three GANs
    assert not set(first) & set(calls[7:])
    lines = result.output.splitlines()
    assert any(line.startswith("FeatureGAN takes about") for line in lines)
    assert any("over deeplab" in line or "over linear" in line for line in lines)
    assert lines[-1].startswith("params.yaml: variants.chosen is ")
    after = YAML(typ="safe").load((project / "params.yaml").read_text())
    chosen = after["variants"].pop("chosen")
    assert chosen["decoder"] in ("linear", "deeplab")
    lists = {"variants", "unlabelled_variants", "gan_variants"}
    names = {key: after["compare"][key] for key in lists}
    assert sum(map(len, names.values())) == 2
    assert "chosen" in names["variants"] + names["gan_variants"]
    kept = YAML(typ="safe").load(before)
    assert after["compare"]["generators"] == (["gan"] if names["gan_variants"] else [])
    for key in (*lists, "generators"):
        del kept["compare"][key], after["compare"][key]
    assert after == kept
    comments = [line.split("#")[1] for line in before.splitlines() if "#" in line]
    written = (project / "params.yaml").read_text()
    assert all(comment in written for comment in comments)


@pytest.mark.medium
def test_a_budget_below_one_candidate_says_how_long_one_takes(project: Path) -> None:
    message = one_line(call("choose", "--budget", "0.01s", "--device", "cpu", "--workers", "0"))
    assert "--budget 0.01s is too small for one candidate, which takes about" in message
    assert "on 5 folds" in message


def test_more_folds_than_images_are_refused(project: Path) -> None:
    message = one_line(call("choose", "--folds", "11", "--device", "cpu"))
    assert message == "Error: 10 training images are fewer than --folds 11; lower it"


def test_a_class_that_only_one_fold_shows_is_left_out_of_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder that is trained without this fold cannot learn the class."""
    from stages.commands.choose import scoring_of

    spec = dataclasses.replace(SPEC, feature_shape=(2, 2, 2), mask_shape=(4, 4), has_images=False)
    with featurestore.create(tmp_path / "train", spec, fingerprint="f") as writer:
        for number, classes in enumerate(((0, 2), (0, 1), (0, 1), (0, 0))):
            mask = np.repeat(np.uint8(classes), 8).reshape(4, 4)
            writer.append(id=str(number), features=np.zeros((2, 2, 2), np.float32), mask=mask)
    store = featurestore.open(tmp_path / "train")
    params = load_preset("voc2012-lite")
    scoring = scoring_of(params, store, [np.array([0, 1]), np.array([2, 3])])
    assert scoring.classes == [0, 1]
    name = spec.class_names[2]
    assert capsys.readouterr().out == (
        f"Left out of the mean, because only one fold shows them: {name}\n"
    )
    with pytest.raises(click.UsageError, match="no class is in two folds; lower --folds"):
        scoring_of(params, store, [np.array([0, 1])])
