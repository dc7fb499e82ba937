"""Codes of less than a byte, packed into bytes: the one layout of files that qjax writes itself."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

# Bits of every dtype that holds less than a byte.
BITS: dict[np.dtype, int] = {
    np.dtype(ml_dtypes.int4): 4,
    np.dtype(ml_dtypes.uint4): 4,
    np.dtype(ml_dtypes.float4_e2m1fn): 4,
    np.dtype(ml_dtypes.int2): 2,
    np.dtype(ml_dtypes.uint2): 2,
}


def packed_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes that an array of `shape` and a dtype of `BITS` takes when packed."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs an array in row-major order, the first code in the lowest bits of the first byte.

    A byte holds two 4-bit or four 2-bit codes; what the last byte has left is zero.

    Args:
      codes: of a dtype in `BITS`, any shape.

    Returns:
      uint8 [packed_size(codes.shape, codes.dtype)].

    Example:
      >>> pack(np.array([1, 2, 15], ml_dtypes.uint4)).tolist()
      [33, 15]
    """
    bits = BITS[codes.dtype]
    per_byte = 8 // bits
    size = packed_size(codes.shape, codes.dtype)
    values = np.zeros(size * per_byte, np.uint8)
    values[: codes.size] = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    values &= (1 << bits) - 1
    values = values.reshape(size, per_byte)
    packed = values[:, 0].copy()
    for i in range(1, per_byte):
        packed |= values[:, i] << np.uint8(bits * i)
    return packed


def unpack(packed: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array that `pack` was given.

    Args:
      packed: uint8 [packed_size(shape, dtype)].
      shape, dtype: of the array; the dtype is one of `BITS`.

    Raises:
      ValueError: if `packed` has another length, or bits set behind the last code.
    """
    bits, size = BITS[dtype], packed_size(shape, dtype)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{dtype} codes of shape {shape} are packed into uint8 ({size},), got {packed.dtype} "
            f"{packed.shape}"
        )
    values = np.empty((size, 8 // bits), np.uint8)
    for i in range(8 // bits):
        values[:, i] = (packed >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
    values, count = values.reshape(-1), math.prod(shape)
    if values[count:].any():
        raise ValueError(f"bits behind the last of {count} packed {dtype} codes are set")
    return values[:count].view(dtype).reshape(shape)
