"""Packed codes: the bytes are as documented, and every code comes back."""

import ml_dtypes
import numpy as np
import pytest

from qjax.io import packing

DTYPES = sorted(packing.BITS, key=lambda dtype: dtype.name)


def codes(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Every code of `dtype`, over and over."""
    bits = packing.BITS[dtype]
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.uint8) & ((1 << bits) - 1)).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 8), (3, 5), (2, 0, 3), (257,)])
def test_codes_round_trip(dtype, shape):
    array = codes(dtype, shape)
    packed = packing.pack(array)
    assert packed.dtype == np.uint8
    assert packed.shape == (packing.packed_size(shape, dtype),)
    back = packing.unpack(packed, shape, dtype)
    assert back.dtype == dtype
    assert back.shape == shape
    np.testing.assert_array_equal(back.astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_lie_low_code_first(dtype):
    array = codes(dtype, (3, 7))
    bits = packing.BITS[dtype]
    stream = sum(int(c) << (bits * i) for i, c in enumerate(array.reshape(-1).view(np.uint8)))
    size = packing.packed_size((3, 7), dtype)
    assert packing.pack(array).tobytes() == stream.to_bytes(size, "little")


def test_negative_codes_and_a_transposed_array():
    array = np.array([[-8, -1, 0], [7, 1, -3]], np.int8).astype(ml_dtypes.int4).T
    back = packing.unpack(packing.pack(array), (3, 2), array.dtype)
    assert back.astype(np.int8).tolist() == [[-8, 7], [-1, 1], [0, -3]]


def test_a_wrong_length_and_stray_bits_are_refused():
    dtype = np.dtype(ml_dtypes.uint4)
    with pytest.raises(ValueError, match=r"packed into uint8 \(2,\), got uint8 \(3,\)"):
        packing.unpack(np.zeros(3, np.uint8), (3,), dtype)
    with pytest.raises(ValueError, match="behind the last of 3"):
        packing.unpack(np.array([0, 16], np.uint8), (3,), dtype)
