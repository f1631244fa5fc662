"""Tests that need a GPU: skipped where PyTorch finds none. `make gpu-tests` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda.on_device import GENERATORS, Folders, train_gan, write_stores


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")


@pytest.fixture
def device() -> str:
    """Name the device under test, as ``--device`` does."""
    return "cuda"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore what trainings set for the whole process, also after a test that failed."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Write stores, and train a generator of each kind for two steps on the CPU."""
    root = tmp_path_factory.mktemp("cuda")
    stores = write_stores(root)
    for name, (store, settings) in GENERATORS.items():
        train_gan(stores[store], root / name, "cpu", **settings)
    return Folders(stores, {name: Path(root / name / "gan") for name in GENERATORS})
