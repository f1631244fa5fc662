"""Stores as PyTorch data: right contents, orders that depend on seed and epoch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featurestore import SpecMismatchError
from featurestore.dataset import BatchOrder, FeatureDataset, loader
from tests.featurestore.test_store import SPEC, sample, write


def test_batches_hold_the_samples_of_their_positions(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    batches = list(loader(store, 3, seed=5, images=True))
    assert [len(batch.positions) for batch in batches] == [3, 3, 1]
    assert sorted(position for batch in batches for position in batch.positions.tolist()) == list(range(7))
    for batch in batches:
        for row, position in enumerate(batch.positions.tolist()):
            expected = sample(position)
            np.testing.assert_array_equal(batch.features[row], expected["features"])
            np.testing.assert_array_equal(batch.masks[row], expected["mask"])
            np.testing.assert_array_equal(batch.images[row].permute(1, 2, 0), expected["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path: Path, workers: int) -> None:
    store = write(tmp_path / "store")

    def order(seed: int | None, epoch: int) -> list[list[int]]:
        batches = loader(store, 2, seed=seed, workers=workers)
        batches.batch_sampler.set_epoch(epoch)
        return [batch.positions.tolist() for batch in batches]

    expected = BatchOrder(7, 2, seed=1)
    expected.set_epoch(3)
    assert order(1, 3) == list(expected)
    assert order(1, 4) != order(1, 3)
    assert order(2, 3) != order(1, 3)
    assert order(None, 3) == [[0, 1], [2, 3], [4, 5], [6]]


def test_a_short_last_batch_is_left_out_on_request() -> None:
    assert [len(batch) for batch in BatchOrder(7, 3, seed=0, drop_last=True)] == [3, 3]


def test_images_that_are_not_there_are_refused_at_once(tmp_path: Path) -> None:
    import dataclasses

    store = write(tmp_path / "store", spec=dataclasses.replace(SPEC, has_images=False))
    with pytest.raises(SpecMismatchError, match="store_images"):
        FeatureDataset(store, images=True)
