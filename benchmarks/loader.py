"""An epoch of reading: the training loader, a plain loop and PyTorch's DataLoader.

    python -m benchmarks.loader features/train [--batch-size 16] [--json FILE]

Every method reads equal shuffled batches of one store, features and masks, for several epochs, in
separate processes, in turns. The median epoch counts, without the first. Of several layers the
plain loop reads each; all other methods also assemble them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click
import numpy as np

from benchmarks.process import in_a_process, measure_or_run

if TYPE_CHECKING:  # imports count as memory of the measured process
    from featurestore import FeatureStore

Epoch: TypeAlias = Callable[[int], Iterator[object]]  # number of the epoch -> its batches
Method: TypeAlias = "Callable[[FeatureStore, int], Epoch]"


def memmap(store: FeatureStore, batch_size: int) -> Epoch:
    """Index memory-mapped raw files of features and masks in one thread, as a plain script does."""
    from featurestore.batch_order import BatchOrder

    arrays = {
        name: np.memmap(
            path, store.spec.row(name)[1], "r", shape=(len(store), *store.spec.row(name)[0])
        )
        for name, path in raw_files(store).items()
    }
    order = BatchOrder(len(store), batch_size, seed=0, drop_last=True)

    def epoch(number: int) -> Iterator[object]:
        for positions in order.epoch(number):
            yield {name: array[positions] for name, array in arrays.items()}

    return epoch


def raw_files(store: FeatureStore) -> dict[str, Path]:
    """Name the plain script's files, beside the store."""
    path, names = store.path, (*store.spec.feature_names, "masks")
    return {name: path.with_name(f".{path.name}-{name.replace('/', '-')}.bin") for name in names}


def _feature_loader(workers: int, cache: str = "none") -> Method:
    def make(store: FeatureStore, batch_size: int) -> Epoch:
        from featurestore.dataset import FeatureLoader

        return FeatureLoader(
            store, batch_size, seed=0, drop_last=True, workers=workers, cache=cache
        ).epoch

    return make


def _torch_loader(workers: int) -> Method:
    def make(store: FeatureStore, batch_size: int) -> Epoch:
        import torch
        from torch.utils.data import DataLoader

        from featurestore.batch_order import BatchOrder
        from featurestore.dataset import gather_maps

        order = BatchOrder(len(store), batch_size, seed=0, drop_last=True)

        class Maps(torch.utils.data.Dataset):
            def __getitems__(self, positions: list[int]) -> torch.Tensor:
                return gather_maps(store, positions)

        class Batches:
            number = 0

            def __iter__(self) -> Iterator[list[int]]:
                return iter(order.epoch(self.number))

        batches = Batches()
        loader = DataLoader(
            Maps(),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=lambda batch: batch,
            persistent_workers=workers > 0,
        )

        def epoch(number: int) -> Iterator[object]:
            batches.number = number
            return iter(loader)

        return epoch

    return make


PLAIN = "np.memmap, one thread"
METHODS: dict[str, Method] = {
    PLAIN: memmap,
    "FeatureLoader, no thread": _feature_loader(workers=0),
    "FeatureLoader, 1 thread": _feature_loader(workers=1),
    "FeatureLoader, 2 threads": _feature_loader(workers=2),
    "FeatureLoader, 2 threads, cache host": _feature_loader(workers=2, cache="host"),
    "DataLoader, no process": _torch_loader(0),
    "DataLoader, 2 processes": _torch_loader(2),
}


def measure(method: str, path: str, batch_size: int, epochs: int) -> list[float]:
    """Measure the seconds of each epoch of a method, without the first."""
    import featurestore

    store = featurestore.open(path)
    epoch, seconds = METHODS[method](store, batch_size), []
    for number in range(epochs + 1):
        start = time.perf_counter()
        for _ in epoch(number):
            pass
        if number:
            seconds.append(time.perf_counter() - start)
    return seconds


@click.command(help=__doc__)
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--epochs", type=click.IntRange(1), default=5, show_default=True, help="Epochs a process."
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Processes a method, in turns.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(METHODS)),
    help="Measure only these methods and the plain loop.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows here too.")
def main(
    store: Path, batch_size: int, epochs: int, rounds: int, only: tuple[str, ...], file: Path | None
) -> None:
    """Run the benchmark."""
    import featurestore
    from benchmarks import common

    opened = featurestore.open(store)
    print(
        f"{common.machine()}\n{opened}, {opened.spec.compression}, batches of {batch_size}\n",
        flush=True,
    )
    results: dict[str, list[float]] = {}
    chosen = [method for method in METHODS if not only or method in (PLAIN, *only)]
    for name, path in raw_files(opened).items():
        opened.gather(name, range(len(opened))).tofile(path)
    common.read_back([*raw_files(opened).values(), *store.glob("*.h5")])
    for _ in range(rounds):
        for method in chosen:
            results.setdefault(method, []).extend(
                in_a_process("benchmarks.loader", method, str(store), batch_size, epochs)
            )
    for path in raw_files(opened).values():
        path.unlink()
    count = len(opened) // batch_size * batch_size
    rates = {method: count / statistics.median(seconds) for method, seconds in results.items()}
    plain = rates[PLAIN]
    rows = [
        {"method": method, "samples_per_s": rate, "to_memmap": rate / plain}
        for method, rate in rates.items()
    ]
    common.report(rows, ("method", "samples_per_s", "to_memmap"), file)


if __name__ == "__main__":
    measure_or_run(measure, main)
