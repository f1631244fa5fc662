"""Writing stores: samples a second of the feature store, of plain writing, and their limit.

    python -m benchmarks.write [--disk FOLDER] [--memory /dev/shm] [--json FILE]

Samples are features (C, 32, 32) float16 of which half are zero, a mask and an image of 256 x 256.
``threads`` prepares samples in one thread a core and writes them in another, as ``extract`` does.
The limit of a place is the lower of two rates. One is plain ``write`` and ``fsync`` of equal bytes.
The other is all that a writer must compute, ``write, sha256, statistics``, in one thread per core.
``extract`` is the stage, in separate processes. Its backbone costs nothing and gives C channels.
The number of samples is announced, as ``extract`` does. All implementations of a place run in
turns, and the median of the rounds counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import torch
from torch import Tensor, nn

import featurestore
from benchmarks import common, extract
from benchmarks.gpu.extract import draw_scenes
from benchmarks.process import in_a_process, measure_or_run
from benchmarks.train import SIZES, store_spec
from featurestore.files import file_sha256, sync
from featurestore.prefetch import prefetch
from featurestore.statistics import Statistics
from stages import extract as stage
from stages.backbones.backbone import Backbone, BackboneLayer

COLUMNS = (
    "what",
    "implementation",
    "where",
    "channels",
    "compression",
    "samples_per_s",
    "to_limit",
)
DRAWN = 16  # different samples, which are repeated
CORES = os.cpu_count() or 1
LIMIT = "write, sha256, statistics"


@dataclasses.dataclass(frozen=True)
class Case:
    """Samples to write: their number, and the spec of the store."""

    count: int
    spec: featurestore.StoreSpec
    features: np.ndarray  # (DRAWN, C, 32, 32) float16
    mask: np.ndarray  # (256, 256) uint8
    image: np.ndarray  # (256, 256, 3) uint8

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments of :meth:`featurestore.StoreWriter.append`."""
        for number in range(self.count):
            features = self.features[number % DRAWN]
            yield {
                "id": f"{number:06d}",
                "features": features,
                "mask": self.mask,
                "image": self.image,
            }

    @property
    def shards(self) -> list[int]:
        """Numbers of samples in files of the size of a shard."""
        size = max(1, featurestore.writer.SHARD_BYTES // self.spec.sample_bytes)
        return [min(size, self.count - first) for first in range(0, self.count, size)]


def case(count: int, channels: int, compression: str) -> Case:
    """Draw samples of a ResNet's kind: half of the features are zero."""
    spec = dataclasses.replace(
        store_spec(SIZES["thesis"]),
        feature_shape=(channels, 32, 32),
        nonnegative=True,
        has_images=True,
        compression=compression,
    )
    rng = np.random.default_rng(0)
    features = rng.standard_normal((DRAWN, channels, 32, 32), np.float32)
    mask = rng.integers(0, spec.num_classes, (32, 32)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    image = rng.integers(0, 256, (256, 256, 3), np.uint8)
    return Case(count, spec, np.maximum(features, 0).astype(np.float16), mask, image)


# -- implementations: write a case below a folder that does not exist ------------------------------


def append(case: Case, folder: Path) -> None:
    with featurestore.create(folder, case.spec) as writer:
        writer.resume(case.count)
        for sample in case.samples():
            writer.append(**sample)


def threads(case: Case, folder: Path) -> None:
    with featurestore.create(folder, case.spec) as writer:
        writer.resume(case.count)
        prepared = prefetch(
            lambda sample: writer.prepare(**sample), case.samples(), workers=CORES, ahead=32
        )
        for _ in prefetch(writer.write, prepared, workers=1, ahead=16):
            pass


def plain_hdf5(case: Case, folder: Path) -> None:
    """Write rows with h5py, without checks, statistics and hashes."""
    folder.mkdir()
    samples = case.samples()
    for number, count in enumerate(case.shards):
        with h5py.File(folder / f"{number}.h5", "w") as file:
            shapes = {"features": case.features, "mask": case.mask[None], "image": case.image[None]}
            rows = {
                name: file.create_dataset(name, (count, *array.shape[1:]), array.dtype)
                for name, array in shapes.items()
            }
            for row in range(count):
                sample = next(samples)
                for name, dataset in rows.items():
                    dataset[row] = sample[name]
        sync(folder / f"{number}.h5")


def plain_write(case: Case, folder: Path) -> None:
    folder.mkdir()
    samples = case.samples()
    for number, count in enumerate(case.shards):
        with open(folder / str(number), "wb", buffering=0) as file:
            for _ in range(count):
                sample = next(samples)
                for name in ("features", "mask", "image"):
                    file.write(sample[name])
            os.fsync(file.fileno())


# -- limits ----------------------------------------------------------------------------------------


def rate(write: Callable[[Case, Path], None], case: Case, folder: Path) -> float:
    """Measure samples a second, and remove what was written."""
    os.sync()
    start = time.perf_counter()
    write(case, folder)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return case.count / seconds


def on_all_cores(case: Case, folder: Path) -> None:
    """Write, hash and measure samples in one thread a core, each thread its fraction of them."""
    folder.mkdir()

    def work(core: int) -> None:
        count = len(range(core, case.count, CORES))
        part = dataclasses.replace(case, count=count)
        plain_write(part, folder / str(core))
        for file in (folder / str(core)).iterdir():
            file_sha256(file)
        for sample in part.samples():
            Statistics.of_sample(case.spec, [sample["features"]], sample["mask"])

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(work, range(CORES)))


def rows_of(case: Case, where: str, folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure all implementations in a folder."""
    writers: dict[str, Callable[[Case, Path], None]] = {
        "featurestore, threads": threads,
        "featurestore, append": append,
    }
    plain = case.spec.compression == "none"
    if plain:  # what the others write
        writers |= {"h5py, plain": plain_hdf5, "write and fsync": plain_write}
        writers |= {LIMIT: on_all_cores}
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(rounds):
        for name, write in writers.items():
            rates[name].append(rate(write, case, folder / "out"))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    limit = min(medians["write and fsync"], medians[LIMIT]) if plain else None
    for name, value in medians.items():
        yield {
            "what": "write",
            "implementation": name,
            "where": where,
            "channels": case.spec.feature_shape[0],
            "compression": case.spec.compression,
            "samples_per_s": value,
            "to_limit": value / limit if limit and name.startswith("featurestore") else None,
        }


def hash_rate(case: Case) -> float:
    """Measure sha256 alone, of a sample in memory, in samples a second."""
    start = time.perf_counter()
    for sample in case.samples():
        hashlib.sha256(sample["features"]).digest()
    return case.count / (time.perf_counter() - start)


# -- extract with a backbone that costs nothing ----------------------------------------------------


class Given(nn.Module):
    """Gives the same maps for any batch."""

    def __init__(self, features: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("maps", torch.from_numpy(features).float())

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.maps[: len(images)]]


def measure(channels: int, dataset: str, count: int) -> float:
    """Measure the seconds of an extraction of ``count`` images, in a separate process."""
    given = case(DRAWN, channels, "none")
    layers = [BackboneLayer("given", channels, 8)]
    backbone = Backbone(
        name="given", network=Given(given.features), layers=layers, nonnegative=True
    )
    stage.build_backbone = lambda **_: backbone
    with tempfile.TemporaryDirectory(dir=Path(dataset).parent) as work:
        extract.write_dataset(Path(dataset), Path(work) / "dataset", count)
        config = {"backbone": "resnet101", "input_size": 256, "batch_size": DRAWN}
        return extract.extract(config, work, "cpu", CORES)["seconds"]


def extract_rate(channels: int, dataset: Path, count: int) -> float:
    """Measure images a second of the stage, without its start."""
    few, many = (
        in_a_process("benchmarks.write", channels, str(dataset), number)
        for number in (count // 4, count)
    )
    return (count - count // 4) / (many - few)


@click.command(help=__doc__)
@click.option(
    "--disk", type=click.Path(path_type=Path, file_okay=False), help="A folder on a disk."
)
@click.option(
    "--memory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/dev/shm"),
    show_default=True,
    help="On a tmpfs.",
)
@click.option("--samples", type=click.IntRange(8), default=384, show_default=True)
@click.option("--channels", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here, too.")
def main(
    disk: Path | None, memory: Path, samples: int, channels: int, rounds: int, file: Path | None
) -> None:
    print(f"{common.machine()}, {CORES} cores\n")
    rows: list[dict[str, Any]] = []
    plain = case(samples, channels, "none")
    for where, parent in (("memory", memory), ("disk", disk)):
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            for compression in ("none", "zeros") if where == "memory" else ("none",):
                chosen = dataclasses.replace(
                    plain, spec=dataclasses.replace(plain.spec, compression=compression)
                )
                rows += rows_of(chosen, where, Path(folder), rounds)
            if where == "disk":
                draw_scenes(Path(folder) / "scenes", Path(folder), 256, DRAWN)
                found = [
                    extract_rate(channels, Path(folder) / "scenes", samples) for _ in range(rounds)
                ]
    shared = {"channels": channels, "compression": "none"}
    values = (
        ("hash", "sha256 alone", "memory", hash_rate(plain)),
        ("extract", "backbone of no cost", "disk", statistics.median(found)),
    )
    for what, implementation, where, value in values:
        named = {"what": what, "implementation": implementation, "where": where}
        rows.append({**named, **shared, "samples_per_s": value})
    common.report(rows, COLUMNS, file)


if __name__ == "__main__":
    measure_or_run(measure, main)
