"""No step of a training waits for the GPU: PyTorch raises an error at each call that would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from featurestore.dataset import Batch
from stages.augment.registry import AUGMENTERS
from stages.training.session import Session
from tests.cuda.on_device import GANS, VARIANTS, Folders, train_decoder, train_gan

gpu = pytest.mark.cuda


@contextmanager
def waiting_forbidden(device: str) -> Iterator[None]:
    """Turn every wait for the GPU, such as ``item()``, into a RuntimeError."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def steps(device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forbid waiting in all steps of an epoch but the first; return the numbers of these steps.

    The loader's part of a step counts, too. The first step of an epoch prepares what later ones
    use again, such as the sums of logged losses.
    """
    batches, watched = Session.batches, []

    def watch(self: Session, epoch: int) -> Iterator[tuple[int, Batch]]:
        every = batches(self, epoch)
        yield next(every)
        with waiting_forbidden(device):
            for number, batch in every:
                watched.append(number)
                yield number, batch

    monkeypatch.setattr(Session, "batches", watch)
    return watched


def precisions(*names: str) -> list[tuple[str, str]]:
    """List pairs of a name and a precision that a GPU computes in."""
    return [(name, precision) for name in names for precision in ("bf16", "fp16", "tf32")]


def test_every_augmenter_has_a_variant_here() -> None:
    kinds = {str(kind.model_fields["augmenter"].annotation) for kind in AUGMENTERS}
    tested = {variant["augmenter"] for _, variant in VARIANTS.values()}
    assert len(tested) == len(AUGMENTERS) + 1  # combined is not in the list
    assert all(any(repr(name) in kind for name in tested) for kind in kinds)


@gpu
def test_a_wait_is_found(device: str) -> None:
    value = torch.ones(3, device=device)
    with waiting_forbidden(device), pytest.raises(RuntimeError, match="synchronizing"):
        value.sum().item()
    assert value.sum().item() == 3


@gpu
@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "no") for name in GANS), *precisions("hinge", "encoder", "flow")],
)
def test_no_step_of_a_generator_waits(
    folders: Folders, tmp_path: Path, device: str, steps: list[int], name: str, precision: str
) -> None:
    store, settings = GANS[name]
    train_gan(folders.stores[store], tmp_path, device, mixed_precision=precision, **settings)
    assert steps == [1, 2]


@gpu
@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "no") for name in VARIANTS),
        *precisions("none", "isda", "joint", "edited", "pyramid"),
    ],
)
def test_no_step_of_a_decoder_waits(
    folders: Folders, tmp_path: Path, device: str, steps: list[int], name: str, precision: str
) -> None:
    store, gan, variant = folders.of(name)
    train_decoder(store, gan, tmp_path, device, variant, mixed_precision=precision)
    assert steps == [1, 2]


@gpu
@pytest.mark.medium
@pytest.mark.parametrize(
    "machine", [{"cache": "host"}, {"cache": "device"}, {"workers": 0}], ids=str
)
def test_no_step_waits_wherever_features_are(
    folders: Folders, tmp_path: Path, device: str, steps: list[int], machine: dict[str, Any]
) -> None:
    store, settings = GANS["encoder"]  # it reads images, too
    train_gan(folders.stores[store], tmp_path / "gan", device, machine, **settings)
    store, gan, variant = folders.of("pyramid")  # it reads several layers
    train_decoder(store, gan, tmp_path / "decoder", device, variant, machine)
    assert steps == [1, 2, 1, 2]
