"""Layouts of features: equal bytes as ever, lossless ones to the bit, int8 within its bound."""

from __future__ import annotations

import dataclasses
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import featurestore
from featurestore.float16 import all_finite, any_negative, as_float32
from featurestore.layouts import BITS, FEATURES, LAYOUTS, SCALES, STARTS, VALUES, Int8, PackedZeros
from tests.factories import SPEC

EVERY_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY_FLOAT16[(EVERY_FLOAT16.view(np.uint16) & 0x7FFF) < 0x7C00]


def packed_zeros(features: np.ndarray) -> PackedZeros:
    return PackedZeros(features.shape, features.dtype.name, nonnegative=False)


def unpacked(layout: PackedZeros, bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Decode one sample."""
    arrays = {BITS: bits[None], VALUES: values, STARTS: np.array([0, len(values)])}
    out = np.full(layout.shape, 7, layout.dtype)
    layout.decode(arrays, FEATURES, 0, out)
    return out


def test_every_finite_float16_becomes_its_float32() -> None:
    values = as_float32(FINITE)
    np.testing.assert_array_equal(values, FINITE.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(values), np.signbit(FINITE))


def test_values_that_are_not_finite_or_negative_are_found() -> None:
    assert all_finite(FINITE)
    for value in EVERY_FLOAT16[(EVERY_FLOAT16.view(np.uint16) & 0x7FFF) >= 0x7C00][::97]:
        assert not all_finite(np.array([0, value, 1], np.float16))
    assert not all_finite(np.array([1, np.nan], np.float32))
    assert not any_negative(np.abs(FINITE))
    for dtype in (np.float16, np.float32):
        assert not any_negative(np.array([0.0, -0.0], dtype))
        assert any_negative(np.array([1, -6e-8], dtype))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([np.float16, np.float32]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
            elements={"allow_subnormal": True},
            fill=st.just(0),
        )
    )
)
def test_packed_zeros_are_lossless(features: np.ndarray) -> None:
    layout = packed_zeros(features)
    encoded = layout.encode(features)
    bits, values = encoded[BITS], encoded[VALUES]
    # To the bit: -0.0, NaN and subnormal numbers included.
    assert unpacked(layout, bits, values).tobytes() == features.tobytes()
    assert layout.rows == {BITS: (bits.shape, "uint8")}
    assert values.size == np.count_nonzero(features.view(f"u{features.itemsize}"))


@pytest.mark.parametrize("change", [-1, 1])
def test_packed_zeros_refuse_a_wrong_number_of_values(change: int) -> None:
    features = np.array([[[0, 1, 2, 0, 3]]], np.float16)
    layout = packed_zeros(features)
    encoded = layout.encode(features)
    bits, values = encoded[BITS], encoded[VALUES]
    damaged = values[:-1] if change < 0 else np.append(values, values[:1])
    for wrong in (damaged, values[:0]):
        with pytest.raises(ValueError, match="number of values"):
            unpacked(layout, bits, wrong)


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    hnp.arrays(
        np.float16,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
        elements=st.floats(-1000, 1000, width=16),
    ),
)
def test_int8_has_an_error_of_half_a_scale_at_most(nonnegative: bool, features: np.ndarray) -> None:
    if nonnegative:
        features = np.abs(features)
    layout = Int8(features.shape, "float16", nonnegative=nonnegative)
    encoded = layout.encode(features)
    assert encoded[FEATURES].dtype == (np.uint8 if nonnegative else np.int8)
    arrays = {name: row[None] for name, row in encoded.items()}
    exact, half = np.empty(features.shape, np.float32), np.empty_like(features)
    layout.decode(arrays, FEATURES, 0, exact)
    layout.decode(arrays, FEATURES, 0, half)
    error = np.abs(exact - features.astype(np.float32)).max(axis=(1, 2))
    assert (error <= 0.5001 * encoded[SCALES] + 1e-30).all()
    np.testing.assert_array_equal(half, exact.astype(np.float16))


@pytest.mark.parametrize("compression", LAYOUTS)
def test_the_size_of_a_sample_is_exact_where_it_is_said_to_be(
    tmp_path: Path, compression: str
) -> None:
    spec = dataclasses.replace(SPEC, compression=compression, has_images=False)
    features, mask = np.zeros(spec.feature_shape, np.float16), np.zeros(spec.mask_shape, np.uint8)
    stored = spec.layouts[""].encode(features)
    size = sum(array.nbytes for array in stored.values()) + mask.nbytes
    assert spec.exact_size == (compression in ("none", "int8"))
    assert (size == spec.sample_bytes) == (compression != "zeros")
    with featurestore.create(tmp_path / "store", spec, fingerprint="f") as writer:
        writer.resume(1)
        assert writer.bytes_announced[1] == (size if spec.exact_size else 0)
        writer.append(id="a", features=features, mask=mask)


# sha256 of the shards that version 0.1.0 wrote of the samples below. The bytes of ``none`` depend
# on no library but HDF5, whose file format is fixed; the other layouts have round-trip tests.
SHARDS_OF_0_1_0 = {
    "shard-00000.h5": "5e679f6e1ad2bf48d1a971844d20105cee9993f6c532b2263613c3d11bac69c8",
    "shard-00001.h5": "af8edd7ff4f51f118b1ddbfb752077fb6b6617bde598d622af716f2c7aa216fc",
}


def test_shards_have_the_bytes_that_version_0_1_0_wrote(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, feature_shape=(40, 16, 16))
    with featurestore.create(tmp_path / "store", spec, samples_per_shard=2) as writer:
        for number in range(3):
            features = np.arange(40 * 16 * 16).reshape(40, 16, 16) % (7 + number)
            mask = (np.arange(32 * 40).reshape(32, 40) % 3).astype(np.uint8)
            writer.append(
                id=f"image {number} é",
                features=features.astype(np.float16),
                mask=mask,
                image=np.stack([mask * 3, mask * 5, mask * 7 + number], axis=-1, dtype=np.uint8),
                view="hflip" if number == 1 else "identity",
            )
    shards = sorted((tmp_path / "store").glob("*.h5"))
    assert {path.name: sha256(path.read_bytes()).hexdigest() for path in shards} == SHARDS_OF_0_1_0
