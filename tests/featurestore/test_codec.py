"""Our own layouts of features: packed zeros come back to the bit, eight bits a value within their bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featurestore import codec

EVERY_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY_FLOAT16[(EVERY_FLOAT16.view(np.uint16) & 0x7FFF) < 0x7C00]


def test_every_finite_float16_becomes_its_float32() -> None:
    values = codec.as_float32(FINITE)
    np.testing.assert_array_equal(values, FINITE.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(values), np.signbit(FINITE))


def test_what_is_not_finite_or_negative_is_seen_by_its_bits() -> None:
    assert codec.all_finite(FINITE)
    for value in EVERY_FLOAT16[(EVERY_FLOAT16.view(np.uint16) & 0x7FFF) >= 0x7C00][::97]:
        assert not codec.all_finite(np.array([0, value, 1], np.float16))
    assert not codec.all_finite(np.array([1, np.nan], np.float32))
    assert not codec.any_negative(np.abs(FINITE))
    for dtype in (np.float16, np.float32):
        assert not codec.any_negative(np.array([0.0, -0.0], dtype))
        assert codec.any_negative(np.array([1, -6e-8], dtype))


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
def test_packed_zeros_come_back_to_the_bit(features: np.ndarray) -> None:
    bits, values = codec.pack_zeros(features)
    out = np.full_like(features, 7)
    codec.unpack_zeros(bits, values, out)
    assert out.tobytes() == features.tobytes()  # -0.0, NaN and subnormal numbers included
    assert len(bits) == -(-features.size // 8)
    assert values.size == np.count_nonzero(features.view(f"u{features.itemsize}"))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_number_of_values_that_is_not_that_of_the_bits_is_an_error(change: int) -> None:
    bits, values = codec.pack_zeros(np.array([[[0, 1, 2, 0, 3]]], np.float16))
    damaged = values[:-1] if change < 0 else np.append(values, values[:1])
    with pytest.raises(ValueError, match="number of values"):
        codec.unpack_zeros(bits, damaged, np.empty((1, 1, 5), np.float16))
    with pytest.raises(ValueError, match="number of values"):
        codec.unpack_zeros(bits, values[:0], np.empty((1, 1, 5), np.float16))


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    hnp.arrays(
        np.float16,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
        elements=st.floats(-1000, 1000, width=16),
    ),
)
def test_eight_bits_are_off_by_half_a_scale_at_most(
    nonnegative: bool, features: np.ndarray
) -> None:
    if nonnegative:
        features = np.abs(features)
    codes, scales = codec.quantise(features, nonnegative=nonnegative)
    assert codes.dtype == (np.uint8 if nonnegative else np.int8)
    out = np.empty(features.shape, np.float32)
    codec.dequantise(codes, scales, out)
    error = np.abs(out - features.astype(np.float32)).max(axis=(1, 2))
    assert (error <= 0.5001 * scales + 1e-30).all()
    half = np.empty_like(features)
    codec.dequantise(codes, scales, half)
    np.testing.assert_array_equal(half, out.astype(np.float16))
