"""``extract`` against its limit, the bare backbone; CNNs dilated and at their native strides.

    python -m benchmarks.extract --dataset dataset [--backbone resnet101] [--layer NAME ...]

``--dataset`` is a folder that ``python pipeline.py prepare`` wrote. Two runs extract N and 10 N of
its training images into a scratch folder; images are repeated where there are fewer. The extraction
rate is 9 N images over the difference of the two times, which excludes the start-up. The backbone's
rate is the median over batches in memory, before and after both runs. Bytes a sample exclude image
and mask. Peak memory is measured in each process.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.process import in_a_process, measure_or_run


def extract(config: dict[str, Any], folder: str, device: str, workers: int) -> dict[str, float]:
    """Measure the seconds of one extraction and this process's peak memory."""
    from stages import extract as stage

    work = Path(folder)

    start = time.perf_counter()
    stage.run(
        stage.ExtractConfig(**config),
        dataset=work / "dataset",
        out=work / "features",
        scratch=work / "scratch",
        device=device,
        workers=workers,
    )
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(
        int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )
    return {"seconds": seconds, "peak_rss_mb": peak}


def bare(config: dict[str, Any], batches: int, device: str) -> dict[str, float]:
    """Measure images a second of the backbone alone, and the bytes of a sample's features."""
    import torch

    from stages.backbones.build import build_backbone
    from stages.common.runtime import make_accelerator

    accelerator = make_accelerator(device, "bf16" if config["compute"] == "bf16" else "no")
    network = build_backbone(
        name=config["backbone"],
        weights=config["weights"],
        layers=config["layers"],
        dilate=config["dilate"],
    ).to(accelerator.device, memory_format=torch.channels_last)
    shape = (config["batch_size"], config["input_size"], config["input_size"], 3)
    images = (
        torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        .permute(0, 3, 1, 2)
        .to(accelerator.device)
    )
    seconds = []
    for number in range(batches + 2):
        start = time.perf_counter()
        with accelerator.autocast():
            maps = network(images)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    values = sum(features[0].numel() for features in maps)
    return {
        "images_per_s": config["batch_size"] / statistics.median(seconds),
        "bytes_a_sample": 2 * values,
    }


def measure(what: str, config: dict[str, Any], *arguments: Any) -> dict[str, float]:
    """Call the measurement ``what``; :func:`in_a_process` runs this function."""
    return {"bare": bare, "extract": extract}[what](config, *arguments)


@click.command(help=__doc__)
@click.option(
    "--dataset",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder of the manifest.",
)
@click.option(
    "--backbone",
    default="efficientnet_lite0",
    show_default=True,
    help="efficientnet_lite0, resnet50 or resnet101.",
)
@click.option(
    "--layer", "layers", multiple=True, help="extract.layers; repeat for several.  [default: last]"
)
@click.option(
    "--size", type=click.IntRange(64), default=256, show_default=True, help="extract.input_size."
)
@click.option(
    "--compute",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="extract.compute.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="extract.batch_size.",
)
@click.option("--images", type=click.IntRange(1), default=300, show_default=True, help="N.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the stores go; default: the system's.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    dataset: Path,
    backbone: str,
    layers: tuple[str, ...],
    size: int,
    compute: str,
    batch_size: int,
    images: int,
    device: str,
    workers: int,
    scratch: Path | None,
    file: Path | None,
) -> None:
    """Measure the dilated backbone and that of native strides, and report the rows."""
    from benchmarks import common

    work = Path(tempfile.mkdtemp(prefix="extract-", dir=scratch))
    rows = []
    try:
        common.backbone_for(backbone, work)
        print(common.machine(), flush=True)
        for dilate in (True, False):
            config = {
                "backbone": backbone,
                "weights": str(work / f"{backbone}.pth")
                if backbone.startswith("resnet")
                else "default",
                "layers": layers,
                "dilate": dilate,
                "input_size": size,
                "compute": compute,
                "batch_size": batch_size,
            }
            name = f"{backbone} {size} {compute} {'dilated' if dilate else 'native'}"
            rows += [
                {"backbone": name, **row}
                for row in _rows(config, images, dataset, work, device, workers)
            ]
    finally:
        shutil.rmtree(work)
    common.report(
        rows,
        (
            "backbone",
            "what",
            "images",
            "images_per_s",
            "to_backbone",
            "bytes_a_sample",
            "peak_rss_mb",
            "growth",
        ),
        file,
    )


def _rows(
    config: dict[str, Any], images: int, dataset: Path, work: Path, device: str, workers: int
) -> list[dict[str, Any]]:
    """Measure one backbone: alone, and in ``extract`` of N and of ten times N images."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}  # as the extract command sets it
    batches = max(3, images // config["batch_size"] // 2)

    def alone() -> dict[str, float]:
        arguments = ("bare", config, batches, device)
        result: dict[str, float] = in_a_process("benchmarks.extract", *arguments, **environment)
        return result

    bare_runs, runs = [alone()], {}
    for count in (images, 10 * images):
        write_dataset(dataset, work / "dataset", count)
        runs[count] = in_a_process(
            "benchmarks.extract", "extract", config, str(work), device, workers, **environment
        )
        shutil.rmtree(work / "features")
        bare_runs.append(alone())
    limit = statistics.median(run["images_per_s"] for run in bare_runs)
    rate = 9 * images / (runs[10 * images]["seconds"] - runs[images]["seconds"])
    return [
        {
            "what": "backbone alone",
            "images": batches * config["batch_size"],
            "images_per_s": limit,
            "bytes_a_sample": bare_runs[0]["bytes_a_sample"],
        },
        {
            "what": "extract",
            "images": 9 * images,
            "images_per_s": rate,
            "to_backbone": rate / limit,
        },
        {
            "what": f"extract of {images}",
            "images": images,
            "peak_rss_mb": round(runs[images]["peak_rss_mb"]),
        },
        {
            "what": f"extract of {10 * images}",
            "images": 10 * images,
            "peak_rss_mb": round(runs[10 * images]["peak_rss_mb"]),
            "growth": runs[10 * images]["peak_rss_mb"] / runs[images]["peak_rss_mb"] - 1,
        },
    ]


def write_dataset(source: Path, target: Path, count: int) -> None:
    """Write a manifest of ``count`` training images, repeated under new ids, and 1 val and test."""
    from stages.data.manifest import SUMMARY_NAME, read_manifest, write_manifest

    entries = [entry for entry in read_manifest(source)[0] if entry.split == "train"]
    chosen = [
        dataclasses.replace(entries[number % len(entries)], id=f"{number}")
        for number in range(count)
    ]
    held_out = [dataclasses.replace(entries[0], id=split, split=split) for split in ("val", "test")]
    target.mkdir(exist_ok=True)
    write_manifest(
        target, chosen + held_out, json.loads((source / SUMMARY_NAME).read_text(encoding="utf-8"))
    )


if __name__ == "__main__":
    measure_or_run(measure, main)
