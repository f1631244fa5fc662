"""Loss of mIoU by ``int8``: decoders trained on features as stored, and on quantised ones.

    python -m benchmarks.int8 features [--seeds 3] [--epochs 12] [--json FILE]

``features`` holds the stores ``train``, ``val`` and ``test``. Every seed trains a decoder on each
kind of features; each decoder is evaluated on test features of both kinds.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path

import click
import torch

import featurestore
from featurestore.dataset import FeatureLoader
from stages.augment.registry import NoneConfig
from stages.common.runtime import Machine, make_accelerator
from stages.gan.monitor import MonitorConfig
from stages.segmentation.evaluation import evaluate
from stages.train_decoder import TrainDecoderConfig, run
from stages.training.models import load_decoder


def quantised(source: Path, target: Path) -> None:
    """Write the stores of ``source`` again with ``compression: int8``."""
    for split in ("train", "val", "test"):
        store = featurestore.open(source / split)
        spec = dataclasses.replace(store.spec, compression="int8")
        with featurestore.create(
            target / split, spec, fingerprint=f"int8 of {store.fingerprint}"
        ) as writer:
            writer.resume(len(store))
            for sample in store:
                writer.append(
                    id=sample.id,
                    view=sample.view,
                    features=sample.layers,
                    mask=sample.mask,
                    image=sample.image,
                )


@click.command(help=__doc__)
@click.argument("features", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=16, show_default=True)
@click.option("--precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    features: Path, seeds: int, epochs: int, batch_size: int, precision: str, file: Path | None
) -> None:
    """Run the benchmark."""
    from benchmarks import common

    config = TrainDecoderConfig(
        epochs=epochs,
        repeats=1,
        batch_size=batch_size,
        gradient_accumulation=1,
        decoder="deeplab",
        width=64,
        atrous_rates=(12, 24, 36),
        lr=5e-4,
        lr_schedule="constant",
        betas=(0.9, 0.999),
        mixed_precision=precision,
    )
    thresholds = {
        "min_variance_ratio": 0,
        "min_coverage": 0,
        "min_consistency": 0,
        "max_frechet": 1,
        "max_accuracy": 1,
    }
    unwatched = MonitorConfig(
        every=0, samples=1, vectors=200, patience=0, on_collapse="warn", **thresholds
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        quantised(features, work / "int8")
        stores = {"float16": features, "int8": work / "int8"}
        scores: dict[tuple[str, str], list[float]] = {}
        for seed in range(seeds):
            for trained_on, folder in stores.items():
                out = work / f"{trained_on}-{seed}"
                run(
                    config,
                    NoneConfig(augmenter="none"),
                    unwatched,
                    name=trained_on,
                    seed=seed,
                    features=folder,
                    gan=work / "none",
                    out=out,
                    metrics=work / "metrics",
                    logs=work / "logs",
                    machine=Machine(scratch=work / "scratch", checkpoint_minutes=1e9),
                )
                accelerator = make_accelerator("auto", "no")
                decoder = load_decoder(out).to(accelerator.device)
                for scored_on, held_out in stores.items():
                    store = featurestore.open(held_out / "test")
                    batches = FeatureLoader(store, batch_size, device=accelerator.device)
                    with torch.no_grad():
                        found = evaluate(accelerator, decoder, batches, store)
                    scores.setdefault((trained_on, scored_on), []).append(100 * found.miou)
        sizes = {
            kind: sum(record.bytes for record in featurestore.open(folder / "train").records)
            for kind, folder in stores.items()
        }
    plain = scores["float16", "float16"]
    rows = [
        {
            "trained_on": trained_on,
            "scored_on": scored_on,
            "miou": f"{statistics.fmean(values):.2f}",
            "difference": f"{statistics.fmean(values) - statistics.fmean(plain):+.2f}",
            "by_seed": ", ".join(f"{value:.2f}" for value in values),
            "train_store_mb": round(sizes[trained_on] / 1e6),
        }
        for (trained_on, scored_on), values in scores.items()
    ]
    common.report(
        rows, ("trained_on", "scored_on", "miou", "difference", "by_seed", "train_store_mb"), file
    )


if __name__ == "__main__":
    main()
