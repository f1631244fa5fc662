"""The monitor of a GAN: time of one measurement, as a fraction of the training between two."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import train
from benchmarks.gpu.device import PRECISIONS, Size, computing_in, synchronize
from benchmarks.gpu.stores import write_store
from benchmarks.gpu.timing import measure
from stages.gan.monitor import Monitor, MonitorConfig

COLUMNS = ("what", "ms", "fraction_of_training")
STEPS = 5 * 63  # between two measurements of the thesis's experiment: 5 epochs of 2,039 samples
REPEATS = 5


def rows(device: torch.device, size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Time measurements with the default settings, and steps of the GAN in bf16 on a GPU."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    with computing_in(precision):
        trainer = train.our_trainer(size.training, device.type, PRECISIONS[precision])
        features, masks = train.draw_batch(size.training, device)
        rng = torch.Generator(device).manual_seed(0)
        step = measure(lambda: train.gan_step(trainer, features, masks, rng), device, size.seconds)
        generator = trainer.generator()
        monitor = Monitor(
            MonitorConfig(samples=min(64, size.samples)),
            trainer.accelerator,
            train=write_store(scratch / "train", size, size.samples),
            held_out=write_store(scratch / "val", size, size.samples),
            feature_scale=generator.feature_scale,
            seed=0,
        )
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            monitor.measure(generator)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    milliseconds = 1000 * statistics.median(seconds)
    return [
        {"what": "step of the GAN", "ms": step.ms, "fraction_of_training": None},
        {
            "what": "measurement",
            "ms": milliseconds,
            "fraction_of_training": milliseconds / (STEPS * step.ms),
        },
    ]
