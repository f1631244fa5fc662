"""A small data set of drawn images, and one whole project that DVC has run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from stages.datasets import wastesim
from tests.imports import ROOT

os.environ.setdefault("DVC_NO_ANALYTICS", "1")
if WORKERS := int(
    os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")
):  # several processes test at once: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

TINY = {
    "prepare.dataset": "folder",
    "prepare.root": "photos",
    "extract.input_size": 64,
    "train_gan.frozen_epochs": 2,
    "train_gan.batch_size": 4,
    "train_gan.spade_hidden": 8,
    "train_gan.ngf": 1,
    "train_gan.ndf": 4,
    "train_gan.z_dim": 8,
    "train_decoder.epochs": 2,
    "train_decoder.batch_size": 4,
    "train_decoder.width": 8,
    "compare.gan_variants": ["featuregan-1x", "featuregan-2x"],
    "compare.seeds": [0],
    "report.umap_points": 60,
    "report.grid_samples": 3,
    "report.grid_channels": 4,
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes share the tests file by file, slow files first; tests of one costly fixture go to one of them, so that it is made once."""
    for item in items:
        needed = getattr(item, "fixturenames", ())
        item.add_marker(
            pytest.mark.xdist_group(
                next((name for name in ("project", "trained") if name in needed), item.path.name)
            )
        )
    if WORKERS:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def tiny_params(changes: Mapping[str, object] | None = None) -> str:
    """Return the quickstart's parameters, reduced to sizes for tests, with ``section.key`` changes."""
    from stages.commands.options import load_preset
    from stages.commands.params import PARAMS, as_yaml
    from stages.common.config import parse, with_settings

    plain = with_settings(load_preset("quickstart").plain(), {**TINY, **(changes or {})})
    return as_yaml(parse(PARAMS, plain), "# the quickstart, reduced to sizes for tests")


def flat(values: dict[str, object], before: str = "") -> dict[str, object]:
    """Nested values by their dotted keys."""
    keys: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            keys |= flat(value, f"{before}{key}.")
        else:
            keys[f"{before}{key}"] = value
    return keys


def write_photos(root: Path, counts: dict[str, int], size: int = 64) -> None:
    """A ``folder`` data set with drawn scenes: images/SPLIT/*.jpg, masks/SPLIT/*.png, classes.csv."""
    abundances = wastesim.read_abundances(ROOT / "data" / "wastesim")
    for split, count in counts.items():
        for number in range(count):
            image, mask = wastesim.draw_scene(
                np.random.default_rng([len(split), number]), abundances, size, (3, 5)
            )
            for folder, name, pixels in (
                ("images", f"{number}.jpg", image),
                ("masks", f"{number}.png", mask),
            ):
                path = root / folder / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    colours = (
        f"{name},{red},{green},{blue}"
        for name, (red, green, blue) in zip(
            wastesim.CLASSES.names, wastesim.CLASSES.palette, strict=True
        )
    )
    (root / "classes.csv").write_text("\n".join(["name,red,green,blue", *colours]) + "\n")


def run(
    *command: str, cwd: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment (python, dvc, git) and return what it printed."""
    program = shutil.which(
        command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert program is not None, f"{command[0]} is not installed"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert not check or result.returncode == 0, (
        f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    return result


def copy_project(target: Path) -> None:
    """A git repository with the project's files, the tiny parameters and drawn images; nothing has run in it yet."""
    target.mkdir(parents=True)
    for name in (
        "featurestore",
        "stages",
        "data",
        "notebooks",
        "pipeline.py",
        "dvc.yaml",
        ".dvcignore",
        ".gitignore",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, target / name)
    (target / "params.yaml").write_text(tiny_params())
    write_photos(target / "photos", {"train": 10, "val": 4, "test": 4})
    (target / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", target / ".dvc" / "config")
    run("git", "init", "-q", cwd=target)
    run("git", "config", "user.email", "test@example.org", cwd=target)
    run("git", "config", "user.name", "test", cwd=target)
    run("git", "add", "-A", cwd=target)
    run("git", "commit", "-qm", "start", cwd=target)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which ``dvc repro`` has run through; tests must leave its files as they are."""
    target = tmp_path_factory.mktemp("dvc") / "project"
    copy_project(target)
    run("dvc", "repro", cwd=target)
    return target


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with features and the decoder ``baseline-0``, made without DVC; tests must leave its files as they are."""
    import pipeline

    target = tmp_path_factory.mktemp("trained")
    (target / "params.yaml").write_text(tiny_params())
    write_photos(target / "photos", {"train": 10, "val": 4, "test": 4})
    before = Path.cwd()
    os.chdir(target)
    try:
        for command in (
            "prepare",
            "extract --device cpu",
            "train-decoder --variant baseline --device cpu",
        ):
            result = CliRunner().invoke(pipeline.main, command.split())
            assert result.exit_code == 0, result.output
    finally:
        os.chdir(before)
    return target


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A fresh ``folder`` data set: 6 training, 3 validation and 3 test pairs of 64 x 64."""
    write_photos(tmp_path / "photos", {"train": 6, "val": 3, "test": 3})
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images (``voc2012-partial``, ``camvid``); skips where FEATUREGAN_TEST_DATA is unset."""
    root = os.environ.get("FEATUREGAN_TEST_DATA")
    if not root:
        pytest.skip("FEATUREGAN_TEST_DATA is not set")
    return Path(root)
