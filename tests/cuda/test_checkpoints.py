"""A training that was interrupted on one device resumes on another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import train_decoder as decoder_stage
from stages import train_gan as gan_stage
from stages.reporting.curves import read_curves
from stages.training.models import load_decoder, load_generator
from tests.cuda.on_device import (
    GANS,
    Folders,
    Update,
    equal_draws,
    recorded,
    train_decoder,
    train_gan,
)
from tests.factories import stop_after

pytestmark = [pytest.mark.cuda, pytest.mark.medium]
NAMES = ["hinge", "encoder", "flow", "none", "isda", "joint-2x"]


def train(name: str, folders: Folders, root: Path, device: str) -> list[Update]:
    """Train for two epochs of three steps, saving after each; return what was updated."""
    always = {"checkpoint_minutes": 0}
    if name in GANS:
        store, settings = GANS[name]
        with equal_draws(), recorded(gan_stage) as updates:
            settings = {**settings, "frozen_epochs": 2}
            train_gan(folders.stores[store], root, device, always, **settings)
        return updates
    store, gan, variant = folders.of(name)
    with equal_draws(), recorded(decoder_stage) as updates:
        train_decoder(store, gan, root, device, variant, always, epochs=2)
    return updates


def tensors_of(state: Any, where: str = "") -> dict[str, torch.Tensor]:
    """List the tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return {where: state}
    if not isinstance(state, dict | list | tuple):
        return {}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {
        key: tensor
        for name, value in items
        for key, tensor in tensors_of(value, f"{where}/{name}").items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to_gpu", [True, False], ids=["to GPU", "to CPU"])
def test_a_training_resumes_on_the_other_device(
    folders: Folders,
    tmp_path: Path,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    to_gpu: bool,
) -> None:
    first, second = ("cpu", device) if to_gpu else (device, "cpu")
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        train(name, folders, stayed, first)
    (checkpoint,) = stayed.glob("scratch/*/*/checkpoint.pt")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    shutil.copytree(stayed, moved)

    expected, actual = train(name, folders, stayed, first), train(name, folders, moved, second)
    assert len(expected) == len(actual) == 2  # of six steps; the others were not repeated
    weights = list(tensors_of(saved["states"]).values())
    for group in actual[0].before:  # bit for bit those that the other device had
        for tensor in group:
            assert any(
                tensor.shape == each.shape and tensor.equal(each.float()) for each in weights
            )
    for number, gradients in enumerate(actual[0].gradients):
        other = torch.cat([x.flatten() for x in expected[0].gradients[number]])
        gradient = torch.cat([x.flatten() for x in gradients])
        assert float((gradient - other).norm() / other.norm()) < 1e-3  # as in test_precision.py
    before, after = (read_curves(root / "metrics") for root in (stayed, moved))
    assert before.keys() == after.keys()
    for curve, values in before.items():
        if "accuracy" in curve or curve.startswith("val/"):
            continue  # a single pixel changes them much
        assert after[curve].iloc[0] == values.iloc[0]  # the epoch before the interruption
        assert after[curve].iloc[1] == pytest.approx(values.iloc[1], rel=2e-2, abs=1e-2)
    assert not list(moved.glob("scratch/*/*/checkpoint.pt"))


@pytest.mark.parametrize("to_gpu", [True, False], ids=["to GPU", "to CPU"])
def test_a_gan_of_one_device_is_trained_further_on_the_other(
    folders: Folders, tmp_path: Path, device: str, to_gpu: bool
) -> None:
    """Its optimizers' moments are read, too: the updates are those of the device it came from."""
    first, second = ("cpu", device) if to_gpu else (device, "cpu")
    store, settings = GANS["encoder"]
    train_gan(folders.stores[store], tmp_path, first, **settings)
    updates = []
    for place in (first, second):
        with equal_draws(), recorded(decoder_stage) as recording:
            variant = {"augmenter": "featuregan"}
            root = tmp_path / place
            train_decoder(folders.stores[store], tmp_path / "gan", root, place, variant)
        updates.append(recording[0])
    for one, other, rate in zip(updates[0].after, updates[1].after, updates[0].rates, strict=True):
        moved = torch.cat([(x - y).abs().flatten() for x, y in zip(one, other, strict=True)])
        # Adam takes whole steps where a gradient is rounding noise, see test_precision.py.
        assert float((moved > 0.1 * rate).float().mean()) < 0.01


def test_saved_networks_compute_alike_on_both_devices(
    folders: Folders, tmp_path: Path, device: str
) -> None:
    store, gan, variant = folders.of("joint")
    train_decoder(store, gan, tmp_path, device, variant)
    features, masks = torch.rand(3, 12, 8, 8), torch.randint(0, 4, (3, 64, 64), dtype=torch.uint8)
    decoder, generator = (
        load_decoder(tmp_path / "decoder"),
        load_generator(tmp_path / "decoder/gan"),
    )
    z = torch.randn(3, generator.z_dim)
    logits, generated = decoder(features), generator.generate(masks, z=z)
    decoder, generator = decoder.to(device), generator.to(device)
    masks, z, features = masks.to(device), z.to(device), features.to(device)
    torch.testing.assert_close(decoder(features).cpu(), logits, rtol=1e-4, atol=1e-5)
    found = generator.generate(masks, z=z).cpu()
    torch.testing.assert_close(found, generated, rtol=1e-3, atol=1e-4)
