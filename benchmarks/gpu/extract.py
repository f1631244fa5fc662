"""``extract`` by stage: decoding, transfers, the backbone in each precision, writing, all at once.

The backbone has random weights where its own would need a download. Images are drawn.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import featurestore
from benchmarks import common, extract
from benchmarks.gpu import ceilings
from benchmarks.gpu.device import PRECISIONS, Size, computing_in, precisions
from benchmarks.gpu.timing import measure
from benchmarks.train import STRIDE, store_spec
from featurestore.prefetch import prefetch
from stages.backbones.backbone import Backbone
from stages.backbones.compute import converted
from stages.common.runtime import make_accelerator, to_channels_last
from stages.data.manifest import read_manifest, read_pair
from stages.datasets.config import PrepareConfig, WastesimConfig
from stages.prepare import run as prepare

COLUMNS = ("stage", "precision", "threads", "images_per_s", "limit_per_s", "to_limit")
SCENES = 16  # drawn images, which are repeated
MIXTURE = Path(__file__).parents[2] / "data" / "wastesim"


def rows(device: torch.device, size: Size, scratch: Path) -> list[dict[str, Any]]:
    """Measure all stages alone, then the stage ``extract`` as a whole.

    The limits are a transfer of pinned memory and a product of matrices in the same precision; the
    limit of the whole is its slowest part.
    """
    dataset, pixels = scratch / "scenes", STRIDE * size.training.side
    draw_scenes(dataset, scratch, pixels, min(SCENES, size.images))
    extract.write_dataset(dataset, scratch / "dataset", size.images)
    backbone = common.backbone_for(size.training.backbone, scratch)
    batch = min(16, size.images)
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (batch, pixels, pixels, 3), np.uint8)
    ).permute(0, 3, 1, 2)
    found = [
        *decoding_rows(scratch / "dataset", size, pixels, batch),
        transfer_row(device, size, images),
        *backbone_rows(device, size, backbone, images),
        *store_rows(device, size, scratch, batch),
    ]
    return [*found, *whole_rows(device, size, scratch, found, batch)]


def row(
    stage: str, rate: float | None, limit: float | None = None, **more: object
) -> dict[str, Any]:
    """Make a row of images a second and the limit's images a second; None: not measured."""
    shown = {"stage": stage, "precision": None, "threads": None, **more, "images_per_s": rate}
    return {**shown, "limit_per_s": limit, "to_limit": rate / limit if rate and limit else None}


def draw_scenes(out: Path, scratch: Path, pixels: int, count: int) -> None:
    """Draw scenes of a waste-sorting belt, and write their manifest to ``out``."""
    scenes = WastesimConfig(train=count, val=1, test=1, size=pixels)
    config = PrepareConfig(dataset="wastesim", root=str(MIXTURE), split="official", wastesim=scenes)
    prepare(config, out=out, scratch=scratch, workers=threads()[-1])


def threads() -> list[int]:
    """List the numbers of threads to decode with: 1, 2, and one a core up to 16."""
    return sorted({1, 2, min(16, os.cpu_count() or 1)})


def decoding_rows(dataset: Path, size: Size, pixels: int, batch: int) -> Iterator[dict[str, Any]]:
    """Decode and resize images and masks in threads, as the stage does."""
    entries, classes = read_manifest(dataset)
    chosen = list(itertools.islice(itertools.cycle(entries), size.images))
    read = partial(read_pair, classes=classes, size=(pixels, pixels), rule="stretch")
    for workers in threads():
        start = time.perf_counter()
        for _ in prefetch(read, chosen, workers=workers, ahead=2 * batch):
            pass
        rate = len(chosen) / (time.perf_counter() - start)
        yield row("decode and resize", rate, threads=workers)


def transfer_row(device: torch.device, size: Size, images: Tensor) -> dict[str, Any]:
    """Copy images (B, 3, H, W) uint8 to pinned memory and to the device, as the stage does."""
    pin = device.type == "cuda"

    def call() -> None:
        (images.pin_memory() if pin else images).to(device, non_blocking=True, copy=True)

    rate = len(images) / measure(call, device, size.seconds).ms * 1000
    limit = ceilings.pinned_rate(device, size, to_device=True) * 1e9 / images[0].nbytes
    return row("host to device", rate, limit)


def backbone_rows(
    device: torch.device, size: Size, backbone: Backbone, images: Tensor
) -> Iterator[dict[str, Any]]:
    """Compute the features of images (B, 3, H, W); the stage has fp32 and bf16."""
    backbone, images = to_channels_last(backbone, device), images.to(device)
    with FlopCounterMode(display=False) as counter:
        backbone(images)
    operations = counter.get_total_flops() / len(images)
    for precision in precisions(device):
        accelerator = make_accelerator(device.type, PRECISIONS[precision])

        def call(accelerator: Any = accelerator) -> None:
            with accelerator.autocast():
                backbone(images)

        # The stage's settings of cuDNN: deterministic, TF32 only where it is measured.
        tf32 = precision == "tf32"
        flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32)
        with computing_in(precision), flags:
            rate = len(images) / measure(call, device, size.seconds).ms * 1000
        limit = ceilings.matmul_tflops(device, size, precision) * 1e12 / operations
        yield row("backbone", rate, limit, precision=precision)


def store_rows(
    device: torch.device, size: Size, scratch: Path, batch: int
) -> Iterator[dict[str, Any]]:
    """Copy features to the host, converted to float16, and write them with masks to a store."""
    spec = store_spec(size.training)
    shape = (batch, *spec.feature_shape)
    features = torch.rand(shape, device=device).contiguous(memory_format=torch.channels_last)
    timing = measure(lambda: converted(features, torch.float16), device, size.seconds)
    limit = ceilings.pinned_rate(device, size, to_device=False) * 1e9 / (features[0].nbytes / 2)
    yield row("device to host", batch / timing.ms * 1000, limit)
    stored, mask = features.half().cpu().contiguous().numpy(), np.zeros(spec.mask_shape, np.uint8)
    count = min(size.images, 256)
    start = time.perf_counter()
    with featurestore.create(scratch / "written", spec) as writer:
        writer.resume(count)
        samples = (
            {"id": f"{number:06d}", "features": stored[number % batch], "mask": mask}
            for number in range(count)
        )
        prepared = prefetch(
            lambda sample: writer.prepare(**sample), samples, workers=threads()[-1], ahead=2 * batch
        )
        for _ in prefetch(writer.write, prepared, workers=1, ahead=batch):
            pass
    yield row("write", count / (time.perf_counter() - start))


def whole_rows(
    device: torch.device, size: Size, scratch: Path, parts: list[dict[str, Any]], batch: int
) -> Iterator[dict[str, Any]]:
    """Run the stage with one thread a core, on a quarter of the images and on all.

    The difference of the two times excludes the start. Where it is less than a tenth of the longer
    time, there are too few images for a rate.
    """
    workers, few = threads()[-1], max(1, size.images // 4)
    weights = scratch / f"{size.training.backbone}.pth"  # random; see common.backbone_for
    for precision in ("fp32", "bf16"):
        config = {
            "backbone": size.training.backbone,
            "weights": str(weights) if weights.exists() else "default",
            "input_size": STRIDE * size.training.side,
            "batch_size": batch,
            "compute": precision,
            "store_images": False,
        }
        seconds = {}
        for count in (few, size.images):
            work = scratch / f"{precision}-{count}"
            work.mkdir()
            extract.write_dataset(scratch / "scenes", work / "dataset", count)
            seconds[count] = extract.extract(config, str(work), device.type, workers)["seconds"]
            shutil.rmtree(work)
        elapsed = seconds[size.images] - seconds[few]
        enough = elapsed > 0.1 * seconds[size.images]
        used = [
            part["images_per_s"]
            for part in parts
            if part["precision"] in (None, precision) and part["threads"] in (None, workers)
        ]
        rate = (size.images - few) / elapsed if enough else None
        yield row("extract, whole", rate, min(used), precision=precision, threads=workers)
