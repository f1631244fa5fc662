"""What a preset's whole run computes and stores: floating-point operations counted, hours estimated from them.

    python -m benchmarks.flops voc2012-thesis --train 2039 --val 437 --test 437 --tflops 50

Operations are counted by PyTorch's counter on one batch of two, in convolutions and matrix products (two a multiplication and addition).
Hours are an **estimate**: operations over ``--tflops``, which is what your device sustains in training, not its peak; a third of
the peak is common. The number of trainings is that of the preset's `compare`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.train import CLASSES, STRIDE, Size, new_decoder, our_steps
from commands.options import PRESETS, load_params

BATCH = 2
SIZES = {"resnet50": 2048, "resnet101": 2048, "efficientnet_lite0": 320}
COLUMNS = ("part", "gflop_a_sample", "samples", "pflop", "hours")


def count(run: Callable[[], object]) -> float:
    """Operations a sample, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / BATCH / 1e9


@click.command(help=__doc__)
@click.argument("preset", type=click.Choice(sorted(path.stem for path in PRESETS.glob("*.yaml"))))
@click.option("--train", type=click.IntRange(1), required=True, help="Training photographs.")
@click.option("--val", type=click.IntRange(0), required=True)
@click.option("--test", type=click.IntRange(0), required=True)
@click.option("--tflops", type=click.FloatRange(0, min_open=True), required=True, help="Sustained, in units of 1e12 a second.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(preset: str, train: int, val: int, test: int, tflops: float, file: Path | None) -> None:
    params = load_params(PRESETS / f"{preset}.yaml")
    extract, gan, decoder, compared = (params[name] for name in ("extract", "train_gan", "train_decoder", "compare"))
    height, width = extract.input_size
    channels, side = SIZES[extract.backbone], height // STRIDE
    size = Size(extract.backbone, channels, BATCH, gan.z_dim, gan.ngf, gan.spade_hidden, gan.ndf, decoder.width, side)
    features = torch.rand(BATCH, channels, side, side)
    masks = torch.randint(0, CLASSES, (BATCH, height, width), dtype=torch.uint8)
    steps = our_steps(size, "cpu", "no", features, masks)
    with tempfile.TemporaryDirectory() as folder:
        backbone = common.backbone_for(extract.backbone, Path(folder))
    images = torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8)
    alone = new_decoder(size)

    def decoder_step() -> None:
        alone(features, (height, width)).sum().backward()

    variants = [params["variants"][name] for name in compared.variants]
    joint = [variant for variant in variants if variant.augmenter == "featuregan" and variant.generator == "joint"]
    seen, seeds = decoder.epochs * decoder.passes * train, len(compared.seeds)
    parts: list[tuple[str, float, float]] = [
        ("extract: backbone", count(lambda: backbone(images)), train + val + test),
        ("train-gan: a step", count(steps["gan step"]), gan.frozen_epochs * gan.passes * train),
        ("train-decoder: baseline", count(decoder_step), seen * seeds),
    ]
    for ratio in sorted({variant.ratio for variant in joint if variant.ratio <= 2}):
        runs = sum(variant.ratio == ratio for variant in joint)
        parts.append((f"train-decoder: joint {ratio}:1", count(steps[f"joint step {ratio}:1"]), seen * seeds * runs))
    rows: list[dict[str, Any]] = []
    for name, gflop, samples in parts:
        rows.append({"part": name, "gflop_a_sample": gflop, "samples": samples, "pflop": gflop * samples / 1e6})
    rows.append({"part": "all", "pflop": sum(row["pflop"] for row in rows)})
    for row in rows:
        row["hours"] = row["pflop"] * 1e3 / tflops / 3600
    common.report(rows, COLUMNS, file)
    stored = (train + val + test) * (channels * side * side * 2 + height * width * (4 if extract.store_images else 1))
    print(f"\nfeatures on disk: {stored / 1e9:.1f} GB (uncompressed, float16, {'with' if extract.store_images else 'without'} photographs)")


if __name__ == "__main__":
    main()
