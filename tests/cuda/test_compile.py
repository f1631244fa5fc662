"""Compiled networks compute what the same networks compute without compilation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages import train_decoder as decoder_stage
from stages import train_gan as gan_stage
from stages.reporting.curves import read_curves
from tests.cuda.on_device import GANS, Folders, Update, recorded, train_decoder, train_gan

pytestmark = [pytest.mark.cuda, pytest.mark.slow]


def step(
    name: str, folders: Folders, root: Path, device: str, precision: str, compiled: bool
) -> tuple[dict[str, float], Update]:
    """Train for one step on all 12 samples."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    machine = {"compile": compiled}
    changes = {"batch_size": 12, "mixed_precision": precision}
    if name in GANS:
        store, settings = GANS[name]
        with recorded(gan_stage) as updates:
            train_gan(folders.stores[store], root, device, machine, **settings, **changes)
    else:
        store, gan, variant = folders.of(name)
        with recorded(decoder_stage) as updates:
            train_decoder(store, gan, root, device, variant, machine, **changes)
    assert bool(torch._dynamo.utils.counters["stats"]) == compiled  # something was compiled
    curves = read_curves(root / "metrics").items()
    return {name: float(curve.iloc[0]) for name, curve in curves}, updates[0]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("hinge", "no"), ("flow", "no"), ("none", "no"), ("pyramid", "bf16")],
)
def test_a_compiled_step_is_the_eager_one(
    folders: Folders, tmp_path: Path, device: str, name: str, precision: str
) -> None:
    """Fused operations round otherwise: as CPU and GPU do in test_precision.py."""
    losses, update = step(name, folders, tmp_path / "eager", device, precision, False)
    compiled, other = step(name, folders, tmp_path / "compiled", device, precision, True)
    tolerance = 1e-3 if precision == "no" else 0.2
    assert compiled.keys() == losses.keys()
    for key, value in losses.items():
        if "accuracy" not in key and not key.startswith("val/"):  # one pixel changes them much
            assert compiled[key] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), key
    for gradients, others in zip(update.gradients, other.gradients, strict=True):
        eager = torch.cat([gradient.flatten() for gradient in gradients])
        found = torch.cat([gradient.flatten() for gradient in others])
        assert float((found - eager).norm() / eager.norm()) < tolerance
    for before, after in zip(other.before, other.after, strict=True):
        assert any(not x.equal(y) for x, y in zip(before, after, strict=True))
