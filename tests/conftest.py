"""A small data set of drawn images, and a project in which DVC has run every stage on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.factories import copy_project, run, tiny_params, write_photos

os.environ.setdefault("DVC_NO_ANALYTICS", "1")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if WORKERS:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for pytest-xdist: by file, or by the costly fixture that they share.

    Each group runs in one process, so that a costly fixture is made once. Slow tests start first.
    """
    for item in items:
        shared = {"project", "trained"} & set(getattr(item, "fixturenames", ()))
        if item.path.name == "test_training.py":
            shared.discard("trained")  # that file has a fixture of this name, which is not shared
        item.add_marker(pytest.mark.xdist_group(min(shared, default=item.path.name)))
    if WORKERS:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project in which ``dvc repro`` has finished; tests must not change its files."""
    target = tmp_path_factory.mktemp("dvc") / "project"
    copy_project(target)
    run("dvc", "repro", cwd=target)
    return target


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with features and the decoder ``baseline-0``, made without DVC.

    Tests must not change its files.
    """
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
    """Write a ``folder`` data set: 6 training, 3 validation and 3 test pairs of 64 x 64."""
    write_photos(tmp_path / "photos", {"train": 6, "val": 3, "test": 3})
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real images; skip where FEATUREGAN_TEST_DATA is not set."""
    root = os.environ.get("FEATUREGAN_TEST_DATA")
    if not root:
        pytest.skip("FEATUREGAN_TEST_DATA is not set")
    return Path(root)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed the global generators: no test depends on the tests before it."""
    np.random.seed(0)  # noqa: NPY002
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
