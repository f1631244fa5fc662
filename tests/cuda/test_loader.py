"""Batches on a GPU: equal wherever features stay, in memory that does not grow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featurestore
from featurestore import StoreMemoryError
from featurestore.dataset import FeatureLoader
from stages.augment.views import training_views
from tests.cuda.on_device import GANS, Folders, train_gan
from tests.factories import SPEC

pytestmark = pytest.mark.cuda
EPOCHS = 40
PIECE = 20 << 20  # bytes that PyTorch reserves at a time for tensors of 1 to 10 MB


def loader(folders: Folders, device: str, kind: str, cache: str, **changes: Any) -> FeatureLoader:
    """Read the training samples as a decoder's training does, with images."""
    store = featurestore.open(folders.stores[kind] / "train")
    settings = {"seed": 3, "images": True, "positions": training_views(store, "random")}
    return FeatureLoader(store, 5, device=device, cache=cache, **{**settings, **changes})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> featurestore.FeatureStore:
    """Write 32 samples, of which eight are megabytes: PyTorch reserves no less."""
    spec = dataclasses.replace(SPEC, feature_shape=(64, 64, 64), mask_shape=(512, 512))
    path, rng = tmp_path_factory.mktemp("large") / "train", np.random.default_rng(0)
    with featurestore.create(path, spec, samples_per_shard=16) as writer:
        for number in range(32):
            writer.append(
                id=str(number),
                features=rng.random(spec.feature_shape, np.float32),
                mask=rng.integers(0, 3, spec.mask_shape, np.uint8),
                image=rng.integers(0, 256, (*spec.mask_shape, 3), np.uint8),
            )
    return featurestore.open(path)


@pytest.mark.medium
@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_memory_does_not_grow_with_the_epochs(
    large: featurestore.FeatureStore, device: str, cache: str
) -> None:
    batches = FeatureLoader(large, 8, seed=3, images=True, device=device, cache=cache)
    reserved = []
    for epoch in range(3 + EPOCHS):
        for batch in batches.epoch(epoch):
            assert batch.images is not None
            total = batch.features.float().mean() + batch.masks.sum() + batch.images.sum()
        assert total.isfinite()
        reserved.append(torch.cuda.memory_reserved())
    # The first epochs reserve what a loop needs. A copy that a busy GPU delays may need one piece
    # more, once; a batch kept by each epoch would need 400 MB.
    assert max(reserved[3:]) - reserved[2] <= PIECE


@pytest.mark.parametrize("kind", ["single", "layered"])
@pytest.mark.parametrize("cache", ["host", "device"])
def test_a_cache_changes_no_batch(folders: Folders, device: str, kind: str, cache: str) -> None:
    for epoch in range(3):
        batches, expected = (
            list(loader(folders, device, kind, how).epoch(epoch, first=1))
            for how in (cache, "none")
        )
        assert len(batches) == len(expected) == 2  # 12 samples, and without the first five
        for batch, other in zip(batches, expected, strict=True):
            assert batch.positions.equal(other.positions)
            assert batch.images is not None
            assert other.images is not None
            for name in ("features", "masks", "images"):
                ours, theirs = getattr(batch, name), getattr(other, name)
                assert ours.device.type == theirs.device.type == device
                assert ours.dtype == theirs.dtype
                assert ours.equal(theirs), name


def test_features_are_read_once_into_the_memory_of_the_device(
    folders: Folders, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = loader(folders, device, "layered", "device", workers=0)

    def gather(*arguments: object, **options: object) -> None:
        raise AssertionError("the store was read again")

    monkeypatch.setattr(featurestore.FeatureStore, "gather", gather)
    assert len(list(batches.epoch(0))) == 3
    resident = batches._resident
    assert {tensor.device.type for tensor in resident.values()} == {device}
    samples = {len(tensor) for tensor in resident.values()}
    assert samples == {24}  # both views


def test_features_that_the_device_has_no_room_for_are_refused(
    folders: Folders, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 100_000_000))
    with pytest.raises(StoreMemoryError, match="do not fit into the device .* use --cache none"):
        loader(folders, device, "single", "device")


@pytest.mark.medium
def test_a_training_from_the_cache_of_the_device_has_the_same_losses(
    folders: Folders, tmp_path: Path, device: str
) -> None:
    store, settings = GANS["encoder"]
    losses = [
        train_gan(folders.stores[store], tmp_path / cache, device, {"cache": cache}, **settings)
        for cache in ("none", "device")
    ]
    # Three steps with atomic additions, whose order differs, and Adam; see test_precision.py.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2, abs=1e-2)
