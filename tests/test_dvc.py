"""DVC reruns what changed and nothing else, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.factories import copy_project, run
from tests.imports import ROOT, import_closure

DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def changed(folder: Path) -> set[str]:
    """Stages that ``dvc repro`` would run, and those that wait for them."""
    status = json.loads(run("dvc", "status", "--json", cwd=folder).stdout)
    return {name.split("@")[0] for name in status}


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


@pytest.mark.parametrize("stage", sorted(DVC))
def test_a_stage_depends_on_exactly_the_sources_it_imports(stage: str) -> None:
    listed = {path for path in DVC[stage]["deps"] if path.endswith((".py", ".html"))}
    closure = {
        path.relative_to(ROOT).as_posix()
        for path in import_closure(f"stages.{stage.replace('-', '_')}")
    }
    if stage == "report":
        closure.add("stages/reporting/report.html")  # its template
    assert listed == closure


def test_every_section_of_the_parameters_belongs_to_a_stage() -> None:
    from stages.commands.options import SECTIONS

    used = {key.split(".")[0] for stage in DVC.values() for key in stage["params"]}
    assert used == set(SECTIONS)


def test_lock_and_metrics_belong_to_the_committed_pipeline() -> None:
    """dvc.lock names every stage of the committed parameters, with the sources and parameters as they are."""
    lock = YAML(typ="safe").load((ROOT / "dvc.lock").read_text())["stages"]
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    decoders = {
        f"train-decoder@{variant}-{seed}"
        for variant in params["compare"]["variants"]
        for seed in params["compare"]["seeds"]
    }
    assert set(lock) == {"prepare", "extract", "train-gan", "report"} | decoders
    for name, stage in lock.items():
        for dependency in stage["deps"]:
            path = ROOT / dependency["path"]
            if path.suffix in (".py", ".html"):
                assert hashlib.md5(path.read_bytes()).hexdigest() == dependency["md5"], (
                    f"{name}: {path} changed; run dvc repro and commit"
                )
        for key, value in stage["params"]["params.yaml"].items():
            current = params
            for part in key.split("."):
                current = current[part]
            assert current == value, f"{name}: {key} changed; run dvc repro and commit"
    rows = json.loads((ROOT / "reports" / "comparison.json").read_text())
    assert [row["variant"] for row in rows] == params["compare"]["variants"]


@pytest.mark.slow
def test_a_second_repro_runs_nothing_and_changes_rerun_only_what_they_touch(
    project: Path, tmp_path: Path
) -> None:
    assert "Data and pipelines are up to date" in run("dvc", "repro", cwd=project).stdout
    copy = tmp_path / "project"
    shutil.copytree(project, copy, symlinks=True)
    assert changed(copy) == set()

    edit(copy / "params.yaml", "  epochs: 2\n", "  epochs: 3\n")
    assert changed(copy) == {"train-decoder"}  # the report follows once they have run
    edit(copy / "params.yaml", "  epochs: 3\n", "  epochs: 2\n")

    edit(
        copy / "params.yaml",
        "featuregan-2x: {augmenter: featuregan, generator: joint, ratio: 2",
        "featuregan-2x: {augmenter: featuregan, generator: joint, ratio: 3",
    )
    status = json.loads(run("dvc", "status", "--json", cwd=copy).stdout)
    assert set(status) == {"train-decoder@featuregan-2x-0"}
    edit(copy / "params.yaml", "ratio: 3", "ratio: 2")

    edit(copy / "stages" / "models" / "generator.py", "UPSAMPLING = 4  #", "UPSAMPLING = 4  # !")
    assert changed(copy) == {"train-gan", "train-decoder", "report"}
    edit(copy / "stages" / "models" / "generator.py", "UPSAMPLING = 4  # !", "UPSAMPLING = 4  #")

    edit(copy / "params.yaml", "input_size: 64 ", "input_size: 96 ")
    planned = run("dvc", "repro", "--dry", cwd=copy).stdout
    assert "Running stage 'extract'" in planned
    assert "Running stage 'prepare'" not in planned


@pytest.mark.slow
def test_kill_9_in_the_middle_of_extract_and_repro_again(project: Path, tmp_path: Path) -> None:
    """The shards at the end are those of the project that nobody disturbed."""
    copy = tmp_path / "project"
    copy_project(copy)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        ["dvc", "repro", "extract"],
        cwd=copy,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not list((copy / "scratch").glob("train/*/*")):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (copy / "features" / "test").exists()
    run("dvc", "repro", "extract", cwd=copy)
    for file in (project / "features").rglob("*.*"):
        assert (copy / file.relative_to(project)).read_bytes() == file.read_bytes()
