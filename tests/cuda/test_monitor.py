"""The monitor computes on a GPU what it computes on the CPU."""

from __future__ import annotations

import pytest

import featurestore
from stages.common.runtime import make_accelerator
from stages.gan.monitor import Monitor, MonitorConfig
from stages.training.models import load_generator
from tests.cuda.on_device import Folders, equal_draws

pytestmark = [pytest.mark.cuda, pytest.mark.medium]

# One held-out pixel on the other side of a ball or of a class boundary changes a fraction by this.
ONE_PIXEL = 0.01


def measures(folders: Folders, device: str) -> dict[str, float]:
    generator = load_generator(folders.generators["hinge"])
    accelerator = make_accelerator(device, "no")
    generator.to(accelerator.device)
    train, held_out = (
        featurestore.open(folders.stores["single"] / split) for split in ("train", "val")
    )
    with equal_draws():
        monitor = Monitor(
            MonitorConfig(every=1, samples=4, vectors=200),
            accelerator,
            train=train,
            held_out=held_out,
            feature_scale=generator.feature_scale,
            seed=0,
        )
        return monitor.measure(generator)


def test_measures_equal_those_of_the_cpu(folders: Folders, device: str) -> None:
    found, expected = measures(folders, device), measures(folders, "cpu")
    assert found == pytest.approx(expected, rel=1e-3, abs=ONE_PIXEL)
