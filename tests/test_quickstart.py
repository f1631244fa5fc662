"""The quickstart's decoder, with more of its drawn scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import pipeline
from stages.commands.options import load_preset
from stages.commands.params import PARAMS, as_yaml
from stages.common.config import parse, with_settings
from tests.imports import ROOT


@pytest.mark.slow
def test_with_240_scenes_the_baseline_has_a_miou_of_80(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """240 scenes once an epoch are as many steps as 40 scenes six times; eight epochs, not four."""
    changes = {
        "prepare.root": str(ROOT / "data" / "wastesim"),
        "prepare.wastesim.train": 240,
        "train_decoder.repeats": 1,
        "train_decoder.epochs": 8,
    }
    plain = with_settings(load_preset("quickstart").plain(), changes)
    (tmp_path / "params.yaml").write_text(as_yaml(parse(PARAMS, plain), "# 240 scenes"))
    monkeypatch.chdir(tmp_path)
    for command in ("prepare", "extract", "train-decoder --variant baseline --seed 0"):
        result = CliRunner().invoke(pipeline.main, command.split())
        assert result.exit_code == 0, result.output
    test = json.loads(Path("metrics/baseline-0/test.json").read_text())
    assert test["miou"] >= 0.80
    assert test["iou"]["glass"] >= 0.6  # the rarest class
