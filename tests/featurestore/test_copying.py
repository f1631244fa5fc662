"""Rows copied past the caches: the right bytes, and no other bytes change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featurestore
from featurestore.copying import LARGE, take_rows
from tests.factories import SPEC


@settings(deadline=None, max_examples=200)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["uint8", "float16", "float32"]),
    offset=st.integers(0, 70),
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
@pytest.mark.medium
def test_any_shape_at_any_address(
    shape: tuple[int, ...], dtype: str, offset: int, rows: list[int]
) -> None:
    source = np.random.default_rng(0).integers(0, 255, (7, *shape)).astype(dtype)
    size = len(rows) * source[0].nbytes
    offset *= source.itemsize
    memory = np.full(offset + size + 100, 77, np.uint8)
    out = memory[offset : offset + size].view(dtype).reshape(len(rows), *shape)
    take_rows(source, np.array(rows, np.int64), out, past_caches=True)
    np.testing.assert_array_equal(out, source[rows])
    assert (np.concatenate([memory[:offset], memory[offset + size :]]) == 77).all()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 4), np.float32),
        np.zeros((2, 3), np.float16),
        np.zeros((2, 6), np.float32)[:, ::2],
    ],
)
def test_memory_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="out"):
        take_rows(np.ones((5, 3), np.float32), np.array([0, 1]), out, past_caches=True)
    assert not out.any()


@pytest.mark.medium
def test_a_large_batch_over_several_shards(tmp_path: Path) -> None:
    spec = dataclasses.replace(
        SPEC, feature_shape=(64, 32, 32), mask_shape=(8, 8), has_images=False
    )
    features = np.random.default_rng(0).random((80, 64, 32, 32)).astype(np.float16)
    with featurestore.create(tmp_path / "store", spec, samples_per_shard=30) as writer:
        for number, sample in enumerate(features):
            writer.append(id=str(number), features=sample, mask=np.zeros((8, 8), np.uint8))
    order = np.random.default_rng(1).permutation(80)
    gathered = featurestore.open(tmp_path / "store").gather("features", order)
    assert gathered.nbytes >= LARGE
    np.testing.assert_array_equal(gathered, features[order])
