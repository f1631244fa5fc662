"""Stores as PyTorch data: contents of batches, orders that depend only on seed and epoch."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from featurestore import FeatureStore, SpecMismatchError, StoreMemoryError
from featurestore.batch_order import BatchOrder
from featurestore.dataset import ExtraSamples, FeatureLoader, gather_maps
from tests.factories import SPEC, sample, write


@pytest.mark.parametrize("compression", ["none", "zeros", "lz4"])
@pytest.mark.parametrize("cache", ["none", "host", "device"])
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_hold_the_samples_of_their_positions(
    tmp_path: Path, workers: int, cache: str, compression: str
) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, compression=compression))
    batches = list(
        FeatureLoader(store, 3, seed=5, images=True, workers=workers, cache=cache).epoch(2)
    )
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(position for batch in batches for position in batch.positions.tolist()) == list(
        range(7)
    )
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            expected = sample(position)
            np.testing.assert_array_equal(batch.features[row], expected["features"])
            np.testing.assert_array_equal(batch.masks[row], expected["mask"])
            np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0), expected["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_only_on_seed_and_epoch(tmp_path: Path, workers: int) -> None:
    store = write(tmp_path / "store")

    def order(seed: int | None, epoch: int) -> list[list[int]]:
        return [
            batch.positions.tolist()
            for batch in FeatureLoader(store, 2, seed=seed, workers=workers).epoch(epoch)
        ]

    assert order(1, 3) == BatchOrder(7, 2, seed=1).epoch(3)
    assert order(1, 4) != order(1, 3)
    assert order(2, 3) != order(1, 3)
    assert order(None, 3) == [[0, 1], [2, 3], [4, 5], [6]]


def test_an_epoch_repeats_its_samples(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    loader = FeatureLoader(store, 2, seed=1, positions=[1, 4, 6], repeats=4, drop_last=True)
    batches = [batch.positions.tolist() for batch in loader.epoch(0)]
    assert len(batches) == len(loader) == 6
    assert sorted(position for batch in batches for position in batch) == sorted([1, 4, 6] * 4)
    resident = FeatureLoader(
        store, 2, seed=1, positions=[1, 4, 6], repeats=4, drop_last=True, cache="host"
    )
    for cached, read in zip(resident.epoch(0), loader.epoch(0), strict=True):
        assert torch.equal(cached.features, read.features)
    assert len(resident._resident["features"]) == 3
    once = FeatureLoader(store, 3, seed=1, positions=[1, 4, 6], repeats=4).epoch(0)
    assert all(
        sorted(batch.positions.tolist()) == [1, 4, 6] for batch in once
    )  # every repeat has all of them


def test_each_repeat_takes_one_view_of_each_sample(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    views = np.array([[0, 4], [1, 5], [2, 6]])
    loader = FeatureLoader(store, 3, seed=1, positions=views)
    epochs = [next(iter(loader.epoch(epoch))).positions.tolist() for epoch in range(40)]
    assert all(sorted(position % 4 for position in epoch) == [0, 1, 2] for epoch in epochs)
    # Each sample's view is drawn independently.
    assert {sum(position > 3 for position in epoch) for epoch in epochs} == {0, 1, 2, 3}
    assert (
        epochs[7]
        == next(iter(FeatureLoader(store, 3, seed=1, positions=views).epoch(7))).positions.tolist()
    )
    resident = FeatureLoader(store, 3, seed=1, positions=views, cache="host")
    for epoch in range(3):
        for cached, read in zip(resident.epoch(epoch), loader.epoch(epoch), strict=True):
            assert torch.equal(cached.features, read.features)
    whole = BatchOrder(11, 4, seed=3, views=2).epoch(5)
    parts = [BatchOrder(11, 4, seed=3, views=2, rank=rank, ranks=2).epoch(5) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="drawn at random; give a seed"):
        FeatureLoader(store, 3, positions=views)


def test_ranks_divide_the_batches_of_a_single_process() -> None:
    whole = BatchOrder(11, 4, seed=3).epoch(5)
    parts = [BatchOrder(11, 4, seed=3, rank=rank, ranks=2).epoch(5) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert [len(batch) for batch in parts[0]] == [2, 2, 2]
    with pytest.raises(ValueError, match="cannot be divided evenly over 3"):
        BatchOrder(11, 4, ranks=3)


def test_drop_last_leaves_out_a_short_batch() -> None:
    assert [len(batch) for batch in BatchOrder(7, 3, seed=0, drop_last=True).epoch(0)] == [3, 3]


def test_memory_is_reused_only_when_nothing_refers_to_it(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    loader = FeatureLoader(store, 2, workers=0)
    kept = [
        batch.features[1:] for batch in loader.epoch(0) if len(batch) == 2
    ]  # views outlive their batches
    for batch in loader.epoch(0):
        del batch
    for number, part in enumerate(kept):
        np.testing.assert_array_equal(part[0], sample(2 * number + 1)["features"])
    places = {part.untyped_storage().data_ptr() for part in kept}
    del kept, part
    gc.collect()
    again = {
        batch.features.untyped_storage().data_ptr() for batch in loader.epoch(0) if len(batch) == 2
    }
    assert again <= places


def test_an_abandoned_epoch_leaves_no_thread(tmp_path: Path) -> None:
    import threading

    store = write(tmp_path / "store")
    for batch in FeatureLoader(store, 1, workers=3).epoch(0):
        assert len(batch) == 1
        break
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_store_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write(tmp_path / "store")
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(StoreMemoryError, match="do not fit into memory .*use --cache none"):
        FeatureLoader(store, 2, cache="host")
    memory.available = 1_000_000
    FeatureLoader(store, 2, cache="host")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # every process has its own copy
    with pytest.raises(
        StoreMemoryError, match="do not fit into this process's share of memory, one of 1000"
    ):
        FeatureLoader(store, 2, cache="host")


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("compression", ["none", "zeros", "lz4"])
@pytest.mark.medium
def test_a_dataloader_with_worker_processes(tmp_path: Path, start: str, compression: str) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, compression=compression))
    store.features(0)  # handles that are open before the workers start
    loader = DataLoader(
        Maps(store),
        batch_size=3,
        num_workers=2,
        collate_fn=torch.cat,
        multiprocessing_context=start,
    )
    maps = torch.cat(list(loader))
    expected = np.stack([sample(position)["features"] for position in range(7)])
    torch.testing.assert_close(maps, torch.from_numpy(expected).float(), rtol=0, atol=0)


class Maps(Dataset[torch.Tensor]):
    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> torch.Tensor:
        return gather_maps(self.store, [position])


def test_images_are_refused_at_once_where_the_store_has_none(tmp_path: Path) -> None:
    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, has_images=False))
    with pytest.raises(SpecMismatchError, match="store_images"):
        FeatureLoader(store, 2, images=True)


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_extra_samples_come_with_their_batch(tmp_path: Path, cache: str) -> None:
    """Each batch brings the two that follow each of its samples, in every cache."""
    store, calls = write(tmp_path / "store"), []

    def choose(epoch: int, index: int, positions: list[int]) -> list[int]:
        calls.append((epoch, index, positions))
        return [p + step for p in positions for step in (1, 2)] if index < 2 else []

    loader = FeatureLoader(
        store,
        2,
        seed=3,
        positions=[0, 2, 4, 1, 3],
        images=True,
        cache=cache,
        extra=ExtraSamples(np.arange(7), choose),
    )
    batches = list(loader.epoch(4, 1))
    plain = FeatureLoader(store, 2, seed=3, positions=[0, 2, 4, 1, 3], images=True)
    expected = list(plain.epoch(4))[1:]
    assert calls == [(4, 1, expected[0].positions.tolist()), (4, 2, expected[1].positions.tolist())]
    for batch, alone in zip(batches, expected, strict=True):
        assert torch.equal(batch.features, alone.features)
        assert torch.equal(batch.positions, alone.positions)
    assert batches[1].extra is None
    first = batches[0].positions.tolist()
    for micro_batch, position in zip(batches[0].chunk(2), first, strict=True):
        extra = micro_batch.extra
        assert extra.positions.tolist() == [position + 1, position + 2]
        np.testing.assert_array_equal(extra.features, store.gather("features", extra.positions))
        np.testing.assert_array_equal(extra.masks, store.gather("masks", extra.positions))
        images = store.gather("images", extra.positions)
        np.testing.assert_array_equal(extra.images.permute(0, 2, 3, 1), images)
