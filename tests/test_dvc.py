"""DVC reruns what an edit changes and nothing else, and an interrupted stage resumes."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.common.sources import imported_sources
from tests.factories import copy_project, run
from tests.imports import ROOT

DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
MODULES = {
    name: f"stages.{'train_decoder' if 'decoder' in name else name}".replace("-", "_")
    for name in DVC
}
DECODERS = {"train-decoder", "train-decoder-gan"}
TRAINING = {"train-gan", "report", *DECODERS}


# -- what dvc.yaml says ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", DVC)
def test_a_stage_depends_on_all_sources_that_it_imports(stage: str) -> None:
    listed = {
        ROOT / path for path in DVC[stage]["deps"] if path.startswith(("featurestore", "stages"))
    }
    imported = set(imported_sources(MODULES[stage])) - {ROOT / "stages" / "__init__.py"}
    assert {path for path in imported if not listed & {path, *path.parents}} == set()
    assert {
        path for path in listed if not any(path in (file, *file.parents) for file in imported)
    } == set()


def test_the_package_that_no_stage_depends_on_holds_no_code() -> None:
    assert len(ast.parse((ROOT / "stages" / "__init__.py").read_text()).body) == 1


def test_every_section_of_the_parameters_belongs_to_a_stage() -> None:
    from stages.commands.params import Params

    used = {key.split(".")[0] for stage in DVC.values() for key in stage["params"]}
    assert used == set(Params.model_fields)


# -- what an edit reruns ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project whose dvc.lock records placeholders for the outputs of all stages."""
    folder = tmp_path_factory.mktemp("recorded") / "project"
    copy_project(folder)
    with pytest.MonkeyPatch.context() as patch, Repo(str(folder)) as repo:
        patch.chdir(folder)
        for output in (output for stage in repo.index.stages for output in stage.outs):
            path = Path(output.fs_path)
            path = path if path.suffix else path / "placeholder"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(output))
        repo.commit(force=True)
    return folder


@pytest.fixture
def edited(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to the recorded project; restore its sources and parameters after the test."""
    monkeypatch.chdir(recorded)
    yield recorded
    run("git", "checkout", "-q", ".", cwd=recorded)
    run("git", "clean", "-fdxq", "featurestore", "stages", cwd=recorded)


def reruns(folder: Path) -> set[str]:
    """Return the stages that ``dvc repro`` would run, with those that read their outputs."""
    with Repo(str(folder)) as repo:
        changed = {name for name in repo.status() if name}
        graph = repo.index.graph  # from a stage to the stages whose outputs it reads
        return changed | {
            reader.addressing
            for stage in repo.index.stages
            if stage.addressing in changed
            for reader in networkx.ancestors(graph, stage)
        }


def names(stages: set[str]) -> set[str]:
    """Return names of stages without the items of their matrix."""
    return {stage.split("@")[0] for stage in stages}


def set_key(folder: Path, key: str, value: object) -> None:
    """Set ``section.key`` of params.yaml; comments stay."""
    yaml = YAML()
    params = section = yaml.load(folder / "params.yaml")
    *parents, last = key.split(".")
    for parent in parents:
        section = section[parent]
    assert section[last] != value
    section[last] = value
    yaml.dump(params, folder / "params.yaml")


def test_nothing_reruns_without_an_edit(edited: Path) -> None:
    assert reruns(edited) == set()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("stages/datasets", {"prepare", "extract", *TRAINING}),
        ("stages/data", {"prepare", "extract", *TRAINING}),
        ("stages/backbones", {"extract", *TRAINING}),
        ("stages/models", TRAINING),
        ("stages/gan", TRAINING),
        ("stages/segmentation", TRAINING),
        ("stages/training", TRAINING),
        ("featurestore/dataset.py", TRAINING),
        ("stages/augment", {*DECODERS, "report"}),
        ("stages/reporting", {"report"}),
        ("stages/use", set()),
        ("stages/commands", set()),
    ],
)
@pytest.mark.medium
def test_an_edit_of_sources_reruns_only_stages_that_import_them(
    edited: Path, sources: str, expected: set[str]
) -> None:
    path = edited / sources
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        file.write_text(file.read_text() + "# edited\n")
    assert names(reruns(edited)) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("extract.input_size", 96, {"extract", *TRAINING}),
        ("train_gan.frozen_epochs", 3, TRAINING - {"train-decoder"}),
        ("monitor.patience", 6, TRAINING - {"train-decoder"}),
        ("train_decoder.epochs", 3, {*DECODERS, "report"}),
        ("report.grid_samples", 2, {"report"}),
    ],
)
def test_an_edit_of_parameters_reruns_only_stages_that_read_them(
    edited: Path, key: str, value: int, expected: set[str]
) -> None:
    set_key(edited, key, value)
    assert names(reruns(edited)) == expected


def test_a_comment_in_the_parameters_reruns_nothing(edited: Path) -> None:
    params = edited / "params.yaml"
    params.write_text("# a comment\n" + params.read_text())
    assert reruns(edited) == set()


def test_an_edit_of_a_variant_trains_only_that_variant(edited: Path) -> None:
    set_key(edited, "variants.featuregan-2x.ratio", 3)
    assert reruns(edited) == {"train-decoder-gan@featuregan-2x-0", "report"}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("variants", ["duplicate", "baseline"], {"train-decoder@duplicate-0"}),
        (
            "gan_variants",
            ["featuregan-frozen", "featuregan-1x", "featuregan-2x"],
            {"train-decoder-gan@featuregan-frozen-0"},
        ),
        (
            "seeds",
            [7, 0],
            {
                "train-decoder@baseline-7",
                "train-decoder-gan@featuregan-1x-7",
                "train-decoder-gan@featuregan-2x-7",
            },
        ),
        ("gan_variants", [], set()),
    ],
    ids=["variant", "variant with a GAN", "seed", "no variant with a GAN"],
)
def test_new_variants_and_seeds_train_only_their_decoders(
    edited: Path, key: str, value: list, expected: set[str]
) -> None:
    set_key(edited, f"compare.{key}", value)
    assert reruns(edited) == {*expected, "report"}


def test_without_variants_that_read_a_gan_none_is_trained(edited: Path) -> None:
    set_key(edited, "compare.gan_variants", [])
    set_key(edited, "compare.generators", [])
    with Repo(str(edited)) as repo:
        planned = names({stage.addressing for stage in repo.index.stages})
    assert planned == {"prepare", "extract", "train-decoder", "report"}
    assert reruns(edited) == {"report"}


def test_only_a_gan_and_variants_with_unlabelled_images_or_a_gan_read_them(edited: Path) -> None:
    params = YAML().load(edited / "params.yaml")
    params["variants"]["student"] = {"augmenter": "self-training"}
    params["compare"]["unlabelled_variants"] = ["student"]
    YAML().dump(params, edited / "params.yaml")
    assert reruns(edited) == {"train-decoder-unlabelled@student-0", "report"}
    readers = {name for name, stage in DVC.items() if "features/unlabelled" in stage["deps"]}
    assert readers == {"train-gan", "train-decoder-unlabelled", "train-decoder-gan"}


def test_compiled_modules_rerun_nothing(edited: Path) -> None:
    for folder in ("featurestore", "stages/common", "stages/gan"):
        (edited / folder / "__pycache__").mkdir()
        (edited / folder / "__pycache__" / "module.pyc").write_bytes(b"compiled")
    assert reruns(edited) == set()


# -- dvc repro -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_repro_runs_nothing_and_an_edit_runs_its_stage(
    project: Path, tmp_path: Path
) -> None:
    assert "Data and pipelines are up to date" in run("dvc", "repro", cwd=project).stdout
    copy = tmp_path / "project"
    shutil.copytree(project, copy, symlinks=True)
    set_key(copy, "extract.input_size", 96)
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
