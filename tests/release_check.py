"""What a release needs besides passing tests: dvc.lock, metrics and reports of this very commit.

``make release-check`` runs this file; ``make test`` does not collect it, so that an edited comment
needs no run of the whole quickstart.
"""

from __future__ import annotations

import json

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from tests.imports import ROOT

REMEDY = "run `make demo` and commit dvc.lock, metrics/ and reports/"
PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
COMPARED = ("variants", "unlabelled_variants", "gan_variants")
VARIANTS = [name for key in COMPARED for name in PARAMS["compare"][key]]


def test_lock_belongs_to_sources_parameters_metrics_and_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data that git does not hold may be missing; everything else is as dvc.lock records it."""
    monkeypatch.chdir(ROOT)
    with Repo(str(ROOT)) as repo:
        cached = {str(output) for output in repo.index.outs if output.use_cache}
        stages = {stage.addressing for stage in repo.index.stages}
        reasons = [(stage, reason) for stage, of in repo.status().items() for reason in of]

    def may_be_missing(path: str) -> bool:
        return any(output == path or output.startswith(f"{path}/") for output in cached)

    changes = [
        (stage, path, state)
        for stage, reason in reasons
        for paths in (reason.values() if isinstance(reason, dict) else [{"cmd": reason}])
        for path, state in paths.items()
        if state not in ("deleted", "not in cache") or not may_be_missing(path)
    ]
    assert changes == [], REMEDY
    assert set(YAML(typ="safe").load((ROOT / "dvc.lock").read_text())["stages"]) == stages, REMEDY


def test_comparison_belongs_to_the_parameters() -> None:
    rows = json.loads((ROOT / "reports" / "comparison.json").read_text())
    assert [row["variant"] for row in rows] == VARIANTS, REMEDY
    assert [row["seeds"] for row in rows] == [PARAMS["compare"]["seeds"]] * len(rows), REMEDY


def test_metrics_are_of_the_compared_decoders_and_the_gan() -> None:
    expected = {f"{name}-{seed}" for name in VARIANTS for seed in PARAMS["compare"]["seeds"]}
    assert {path.name for path in (ROOT / "metrics").iterdir()} == {"train-gan", *expected}, REMEDY
