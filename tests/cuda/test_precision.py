"""One update on a GPU is that of the CPU: losses, gradients, and new weights."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages import train_decoder as decoder_stage
from stages import train_gan as gan_stage
from stages.reporting.curves import read_curves
from tests.cuda.on_device import (
    GANS,
    VARIANTS,
    Folders,
    Update,
    equal_draws,
    recorded,
    train_decoder,
    train_gan,
)

pytestmark = [pytest.mark.cuda, pytest.mark.medium]

# Largest relative errors against float32 on the CPU, of losses and of gradients. Float32: another
# order of additions, cuDNN's algorithms and atomic additions; without TF32. Two float32 algorithms
# of one CPU differ by 7e-5. The lower precisions: their rounding of 2^-9 and 2^-12, which the
# layers of two networks amplify. On a CPU, bf16 changes these gradients by up to 0.19.
TOLERANCES = {"no": (1e-4, 1e-3), "bf16": (3e-2, 0.4), "fp16": (1e-2, 0.15)}
LOW = ("bf16", "fp16")
LOW_GANS = ("hinge", "encoder", "segmentation", "flow")
LOW_VARIANTS = ("none", "isda", "joint", "edited", "pyramid", "linear")
Outcome = tuple[dict[str, float], Update]


def one_step(
    name: str, folders: Folders, root: Path, device: str, precision: str, **changes: Any
) -> Outcome:
    """Train a generator or a decoder for one step on all 12 samples."""
    changes = {"batch_size": 12, "mixed_precision": precision, **changes}
    if name in GANS:
        store, settings = GANS[name]
        with equal_draws(), recorded(gan_stage) as updates:
            train_gan(folders.stores[store], root, device, **settings, **changes)
    else:
        store, gan, variant = folders.of(name)
        with equal_draws(), recorded(decoder_stage) as updates:
            train_decoder(store, gan, root, device, variant, **changes)
    (update,) = updates
    curves = {
        curve: float(values.iloc[0]) for curve, values in read_curves(root / "metrics").items()
    }
    # Of 12 samples: one pixel that is on the other side of a threshold changes them much.
    measures = ("val/", "discriminator/accuracy")
    return {key: curves[key] for key in curves if not key.startswith(measures)}, update


def error(actual: Tensor, expected: Tensor) -> float:
    """Compute the relative error of all values together."""
    return float((actual - expected).norm() / expected.norm())


def flattened(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_close(actual: Outcome, expected: Outcome, precision: str) -> None:
    of_losses, of_gradients = TOLERANCES[precision]
    (losses, update), (expected_losses, expected_update) = actual, expected
    assert losses.keys() == expected_losses.keys()
    for name, value in expected_losses.items():
        # A critic's loss is a small difference of larger scores.
        assert losses[name] == pytest.approx(value, rel=of_losses, abs=of_losses / 2), name
    assert update.rates == expected_update.rates
    for number, rate in enumerate(update.rates):
        gradients = [flattened(each.gradients[number]) for each in (update, expected_update)]
        assert error(*gradients) < of_gradients
        moved = [
            (flattened(each.after[number]) - flattened(each.before[number])) / rate
            for each in (update, expected_update)
        ]
        assert flattened(update.before[number]).equal(flattened(expected_update.before[number]))
        assert moved[1].any()
        # Adam's first steps depend on a gradient's sign, which rounding decides near 0.
        others = (moved[0] - moved[1]).abs() > 0.1
        assert float(others.float().mean()) < (0.01 if precision == "no" else 0.2)


@pytest.mark.parametrize("name", [*GANS, *VARIANTS])
def test_a_step_in_float32_is_that_of_the_cpu(
    folders: Folders, tmp_path: Path, device: str, name: str
) -> None:
    expected = one_step(name, folders, tmp_path / "cpu", "cpu", "no")
    assert_close(one_step(name, folders, tmp_path / "gpu", device, "no"), expected, "no")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", [*LOW_GANS, *LOW_VARIANTS])
def test_a_step_in_low_precision_is_that_of_the_cpu_to_its_rounding(
    folders: Folders,
    tmp_path: Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: str,
) -> None:
    start_with_scale(monkeypatch, 2.0**8)  # no gradient overflows at it
    expected = one_step(name, folders, tmp_path / "cpu", "cpu", "no")
    actual = one_step(name, folders, tmp_path / "gpu", device, precision)
    assert actual[1].scale == (2.0**8 if precision == "fp16" else 1)
    assert_close(actual, expected, precision)


@pytest.mark.parametrize("name", ["hinge", "flow", "none", "joint"])
def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale(
    folders: Folders, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From a scale at which every gradient overflows down to one at which all are finite."""
    start_with_scale(monkeypatch, 2.0**40)
    if name in GANS:
        store, settings = GANS[name]
        with recorded(gan_stage) as updates:
            settings = {**settings, "frozen_epochs": 13, "mixed_precision": "fp16"}
            train_gan(folders.stores[store], tmp_path, device, **settings)
    else:
        store, gan, variant = folders.of(name)
        with recorded(decoder_stage) as updates:
            changes = {"epochs": 13, "mixed_precision": "fp16"}
            train_decoder(store, gan, tmp_path, device, variant, **changes)
    assert len(updates) == 39
    check_overflows(updates, 2.0**40)


def check_overflows(updates: list[Update], scale: float) -> None:
    """Compare updates with what a dynamic loss scale does."""
    assert updates[0].is_skipped()
    for update in updates:
        assert update.scale == scale
        finite = [flattened(group).isfinite().all() for group in update.gradients]
        for number, is_finite in enumerate(finite):
            before, after = (flattened(side[number]) for side in (update.before, update.after))
            assert after.isfinite().all()
            assert before.equal(after) != is_finite
        scale = scale if all(finite) else scale / 2
    assert not updates[-1].is_skipped()
    assert scale < 2.0**30


def start_with_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Let the loss scale of fp16 start there."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(scaler, "__init__", partialmethod(scaler.__init__, init_scale=scale))
