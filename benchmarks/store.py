"""Shuffled reads of dense features: the feature store and common formats, with equal features.

    python -m benchmarks.store --folder FOLDER [--backbone resnet50] [--json FILE]

The features are those of real images (a ResNet's weights are random: nothing is downloaded).
Every method runs in separate processes, in turns, and reads all samples in shuffled order, in
several passes, into one reused buffer. The median pass counts. Before the passes
files are dropped from the page cache and read back: all methods start equally cached. ``--cold``
drops them before each pass.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

import click
import numpy as np

from benchmarks.process import in_a_process, measure_or_run

BATCH = 8
Reader = tuple[Callable[[int], np.ndarray], Callable[[list[int], np.ndarray], None]]


def rowwise(read: Callable[[int], np.ndarray]) -> Reader:
    """Make a reader of batches from a reader of samples: each sample is copied."""

    def batch(positions: list[int], out: np.ndarray) -> None:
        for row, position in enumerate(positions):
            out[row] = read(position)

    return read, batch


# -- methods: write(features (N, C, h, w) float16, folder); open(folder, shape) -> reader ----------


def _write_store(compression: str) -> Callable[[np.ndarray, Path], None]:
    def write(features: np.ndarray, folder: Path) -> None:
        import featurestore

        channels, height, width = features.shape[1:]
        spec = featurestore.StoreSpec(
            feature_shape=(channels, height, width),
            mask_shape=(1, 1),
            class_names=("all",),
            palette=((0, 0, 0),),
            backbone="benchmark",
            weights_digest="",
            output_stride=1,
            normalization_mean=(0, 0, 0),
            normalization_std=(1, 1, 1),
            resize="stretch",
            compute="fp32",
            nonnegative=bool((features >= 0).all()),
            compression=compression,
        )
        with featurestore.create(folder / "store", spec) as writer:
            for number, sample in enumerate(features):
                writer.append(id=str(number), features=sample, mask=np.zeros((1, 1), np.uint8))

    return write


def _open_store(folder: Path, shape: tuple[int, ...]) -> Reader:
    import featurestore

    store = featurestore.open(folder / "store")

    def batch(positions: list[int], out: np.ndarray) -> None:
        store.gather("features", positions, out)

    return store.features, batch


def _write_memmap(features: np.ndarray, folder: Path) -> None:
    features.tofile(folder / "features.bin")


def _open_memmap(folder: Path, shape: tuple[int, ...]) -> Reader:
    mapped = np.memmap(folder / "features.bin", np.float16, "r", shape=shape)
    return rowwise(mapped.__getitem__)


def _write_torch(features: np.ndarray, folder: Path) -> None:
    import torch

    for number, sample in enumerate(features):
        torch.save(torch.from_numpy(sample), folder / f"{number}.pt")


def _open_torch(folder: Path, shape: tuple[int, ...]) -> Reader:
    import torch

    return rowwise(
        lambda position: torch.load(folder / f"{position}.pt", weights_only=True).numpy()
    )


def _write_h5py(**options: object) -> Callable[[np.ndarray, Path], None]:
    def write(features: np.ndarray, folder: Path) -> None:
        import h5py

        settings = (
            {**options, "chunks": (1, *features.shape[1:])}
            if options.get("chunks") == "sample"
            else options
        )
        with h5py.File(folder / "features.h5", "w") as file:
            file.create_dataset("features", data=features, **settings)

    return write


def _open_h5py(folder: Path, shape: tuple[int, ...]) -> Reader:
    import h5py

    dataset = h5py.File(folder / "features.h5", "r")["features"]
    return rowwise(dataset.__getitem__)


def _write_zarr(features: np.ndarray, folder: Path) -> None:
    import zarr

    array = zarr.create_array(
        folder / "features.zarr",
        shape=features.shape,
        chunks=(1, *features.shape[1:]),
        dtype=features.dtype,
        compressors=None,
    )
    array[:] = features


def _open_zarr(folder: Path, shape: tuple[int, ...]) -> Reader:
    import zarr

    array = zarr.open_array(folder / "features.zarr", mode="r")
    return rowwise(lambda position: np.asarray(array[position]))


def _write_lmdb(features: np.ndarray, folder: Path) -> None:
    import lmdb

    with (
        lmdb.open(str(folder), map_size=2 * features.nbytes + (1 << 26)) as base,
        base.begin(write=True) as transaction,
    ):
        for number, sample in enumerate(features):
            transaction.put(b"%08d" % number, sample.tobytes())


def _open_lmdb(folder: Path, shape: tuple[int, ...]) -> Reader:
    import lmdb

    transaction = lmdb.open(str(folder), readonly=True, lock=False, readahead=False).begin(
        buffers=True
    )
    return rowwise(
        lambda position: np.frombuffer(transaction.get(b"%08d" % position), np.float16).reshape(
            shape[1:]
        )
    )


def _write_webdataset(features: np.ndarray, folder: Path) -> None:
    with tarfile.open(folder / "features.tar", "w") as archive:
        for number, sample in enumerate(features):
            content = io.BytesIO()
            np.save(content, sample)
            entry = tarfile.TarInfo(f"{number:08d}.npy")
            entry.size = content.tell()
            content.seek(0)
            archive.addfile(entry, content)


def _open_webdataset(folder: Path, shape: tuple[int, ...]) -> Reader:
    """Open a tar; samples come in its order, shuffled in a buffer, and positions are ignored."""
    import webdataset

    def stream() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield from (
                webdataset.WebDataset(
                    str(folder / "features.tar"), shardshuffle=False, empty_check=False
                )
                .shuffle(50)
                .decode()
            )

    samples = stream()
    return rowwise(lambda position: next(samples)["npy"])


def _write_litdata(features: np.ndarray, folder: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="256MB")
    for number, sample in enumerate(features):
        writer.add_item(number, {"features": sample})
    writer.done()
    writer.merge()


def _open_litdata(folder: Path, shape: tuple[int, ...]) -> Reader:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))
    return rowwise(lambda position: dataset[position]["features"])


def _write_streaming(features: np.ndarray, folder: Path) -> None:
    from streaming import MDSWriter

    channels, height, width = features.shape[1:]
    with MDSWriter(
        out=str(folder),
        columns={"features": f"ndarray:float16:{channels},{height},{width}"},
        size_limit=256 << 20,
    ) as writer:
        for sample in features:
            writer.write({"features": sample})


def _open_streaming(folder: Path, shape: tuple[int, ...]) -> Reader:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return rowwise(lambda position: dataset[position]["features"])


METHODS: dict[
    str, tuple[str, Callable[[np.ndarray, Path], None], Callable[[Path, tuple[int, ...]], Reader]]
] = {
    "featurestore": ("", _write_store("none"), _open_store),
    "np.memmap": ("", _write_memmap, _open_memmap),
    "h5py contiguous": ("", _write_h5py(), _open_h5py),
    "h5py chunked, a sample a chunk": ("", _write_h5py(chunks="sample"), _open_h5py),
    "h5py chunked, automatic": ("", _write_h5py(chunks=True), _open_h5py),
    "torch.load, a file a sample": ("", _write_torch, _open_torch),
    "zarr 3": ("zarr", _write_zarr, _open_zarr),
    "LMDB": ("lmdb", _write_lmdb, _open_lmdb),
    "WebDataset (in order)": ("webdataset", _write_webdataset, _open_webdataset),
    "LitData": ("litdata", _write_litdata, _open_litdata),
    "MosaicML Streaming": ("streaming", _write_streaming, _open_streaming),
    "featurestore zeros": ("numba", _write_store("zeros"), _open_store),
    "featurestore lz4": ("hdf5plugin", _write_store("lz4"), _open_store),
    "featurestore zstd": ("hdf5plugin", _write_store("zstd"), _open_store),
    "featurestore int8 (lossy)": ("numba", _write_store("int8"), _open_store),
    "h5py gzip": ("", _write_h5py(chunks="sample", compression="gzip"), _open_h5py),
}


class Measured(TypedDict):
    """Seconds of each pass, and MB of the process's memory."""

    seconds: list[float]
    peak_rss_mb: float
    anonymous_mb: float


def measure(
    method: str, read: str, place: str, shape: list[int], passes: int, cold: bool
) -> Measured:
    """Measure the seconds of each pass over all samples, shuffled, and this process's memory."""
    folder = Path(place)
    sample, batch = METHODS[method][2](folder, tuple(shape))
    buffer = np.zeros((BATCH, *shape[1:]), np.float16)
    rng, seconds = np.random.default_rng(0), []
    for number in range(passes + 1):
        order = rng.permutation(shape[0]).tolist()
        if cold:
            for file in filter(Path.is_file, folder.rglob("*")):
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        start = time.perf_counter()
        if read == "sample":
            for position in order:
                buffer[0] = sample(position)
        else:
            for first in range(0, len(order) - BATCH + 1, BATCH):
                batch(order[first : first + BATCH], buffer)
        if number:  # the first pass warms up: page faults, imports, compilation
            seconds.append(time.perf_counter() - start)
    memory = {
        line.split(":")[0]: int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if " kB" in line
    }
    return {"seconds": seconds, "peak_rss_mb": memory["VmHWM"], "anonymous_mb": memory["RssAnon"]}


@click.command(help=__doc__)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder of images.",
)
@click.option(
    "--backbone",
    default="efficientnet_lite0",
    show_default=True,
    help="efficientnet_lite0 (320 channels) or resnet50 (2048).",
)
@click.option(
    "--size",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    help="Side of the images in pixels.",
)
@click.option(
    "--samples",
    type=click.IntRange(BATCH),
    default=200,
    show_default=True,
    help="Number of images.",
)
@click.option(
    "--passes", type=click.IntRange(1), default=5, show_default=True, help="Passes a process."
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Processes a method, in turns.",
)
@click.option("--cold", is_flag=True, help="Drop the files from the page cache before each pass.")
@click.option(
    "--only", multiple=True, type=click.Choice(list(METHODS)), help="Measure only these methods."
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the files go; default: the system's.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    folder: Path,
    backbone: str,
    size: int,
    samples: int,
    passes: int,
    rounds: int,
    cold: bool,
    only: tuple[str, ...],
    scratch: Path | None,
    file: Path | None,
) -> None:
    """Run the benchmark."""
    from benchmarks import common

    work = Path(tempfile.mkdtemp(prefix="featurestore-", dir=scratch))
    try:
        features = _features(folder, backbone, size, samples, work)
        zeros = float((features == 0).mean())
        shape, state = " x ".join(map(str, features.shape[1:])), "cold" if cold else "in page cache"
        print(common.machine())
        print(
            f"{samples} samples of {shape} float16 ({backbone}),"
            f" {zeros:.0%} zeros; {state}; shuffled\n",
            flush=True,
        )
        folders = _write_all(features, only or tuple(METHODS), work)
        whole = features.shape
        del features
        results: dict[tuple[str, str], list[Measured]] = {}
        for _ in range(rounds):
            for method, folder in folders.items():
                for read in ("sample", "batch"):
                    measured = in_a_process(
                        "benchmarks.store", method, read, str(folder), whole, passes, cold
                    )
                    results.setdefault((method, read), []).append(measured)
        common.report(_rows(results, folders, whole), COLUMNS, file)
    finally:
        shutil.rmtree(work)


COLUMNS = (
    "method",
    "read",
    "samples_per_s",
    "gb_per_s",
    "to_memmap",
    "bytes_per_sample",
    "peak_rss_mb",
    "anonymous_mb",
)


def _features(folder: Path, backbone: str, size: int, samples: int, work: Path) -> np.ndarray:
    """Compute (N, C, h, w) float16 features of real images."""
    import torch

    from benchmarks import common

    network = common.backbone_for(backbone, work)
    features = None
    for number, image in enumerate(common.read_images(folder, samples, size)):
        computed = (
            network(torch.tensor(image).permute(2, 0, 1)[None])[0][0].to(torch.float16).numpy()
        )
        if features is None:
            features = np.empty((samples, *computed.shape), np.float16)
        features[number] = computed
    assert features is not None
    return features


def _write_all(features: np.ndarray, methods: tuple[str, ...], work: Path) -> dict[str, Path]:
    from benchmarks import common

    folders = {}
    for number, method in enumerate(methods):
        needs, write, _ = METHODS[method]
        try:
            if needs:
                importlib.import_module(needs)
        except ImportError as error:
            print(f"{method}: not measured ({error})")
            continue
        folder = work / str(number)
        folder.mkdir()
        write(features, folder)
        common.read_back([path for path in folder.rglob("*") if path.is_file()])
        folders[method] = folder
    return folders


def _rows(
    results: dict[tuple[str, str], list[Measured]],
    folders: dict[str, Path],
    shape: tuple[int, ...],
) -> list[dict[str, str | float | None]]:
    rows: list[dict[str, str | float | None]] = []
    rates: dict[tuple[str, str], float] = {}
    for (method, read), runs in results.items():
        count = shape[0] if read == "sample" else shape[0] // BATCH * BATCH
        rate = count / statistics.median([second for run in runs for second in run["seconds"]])
        size = (
            sum(path.stat().st_size for path in folders[method].rglob("*") if path.is_file())
            / shape[0]
        )
        rates[method, read] = rate
        rows.append(
            {
                "method": method,
                "read": read,
                "samples_per_s": rate,
                "to_memmap": None,
                "gb_per_s": rate * float(np.prod(shape[1:])) * 2 / 1e9,
                "bytes_per_sample": round(size),
                "peak_rss_mb": round(max(run["peak_rss_mb"] for run in runs)),
                "anonymous_mb": round(max(run["anonymous_mb"] for run in runs)),
            }
        )
    for row, (_, read), rate in zip(rows, rates, rates.values(), strict=True):
        if ("np.memmap", read) in rates:
            row["to_memmap"] = rate / rates["np.memmap", read]
    return rows


if __name__ == "__main__":
    measure_or_run(measure, main)
