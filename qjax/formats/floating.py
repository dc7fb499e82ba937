"""Small floating-point formats: the code is the bit pattern."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from qjax.formats.base import Format


def floating(name: str, storage: str) -> Format:
    """The values of the ml_dtypes float `storage`, a dtype that devices hold.

    Encoding rounds half to even and saturates at the largest finite value.
    """
    info = ml_dtypes.finfo(storage)
    low, high = float(info.min), float(info.max)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return codes.astype(dtype)

    def encode(x: jax.Array) -> jax.Array:
        return narrow(jnp.clip(x, low, high), storage)

    return Format(name, storage, decode, encode, low, high, info.bits)


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """X, float32, in a narrower float dtype: rounded first, then cast, which changes nothing.

    A cast alone is not to be relied on. XLA for a GPU takes one there and back for the identity, so
    that codes or scales that are used where they are made would never be rounded; XLA:CPU casts to
    float4 by way of a shorter float inside loops (jax 0.10 to 0.12) and so rounds twice.
    """
    dtype = np.dtype(dtype)
    if dtype == np.float32:
        return x
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(dtype)
    return nearest(x, dtype).astype(dtype)


def nearest(x: jax.Array, storage: Any) -> jax.Array:
    """X, float32, rounded to the values of a small float, half to even, without its largest."""
    quantum, reciprocal = spacing(x, storage)
    return jnp.round(x * reciprocal) * quantum


def spacing(x: jax.Array, storage: Any) -> tuple[jax.Array, jax.Array]:
    """The distance of the values of a small float around x, float32, and its reciprocal."""
    info = ml_dtypes.finfo(storage)
    field = lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> 23
    lowest = round(np.log2(float(info.smallest_normal))) + 127
    exponent = jnp.maximum(field, lowest) - info.nmant
    power = lambda e: lax.bitcast_convert_type(e << 23, jnp.float32)
    return power(exponent), power(254 - exponent)


def six_bits(name: str, exponent: int, mantissa: int) -> Format:
    """A 6-bit float of a sign, `exponent` and `mantissa` bits, without infinities or NaN.

    No device dtype holds it: the bit patterns are planes. Encoding rounds half to even and
    saturates. Magnitudes are counted in units of the smallest one, 2^(1 - bias - mantissa).
    """
    assert exponent + mantissa == 5
    unit = 2.0 ** (2 - (1 << exponent - 1) - mantissa)
    largest = ((2 << mantissa) - 1) << ((1 << exponent) - 2)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        codes = codes.astype(jnp.int32)
        shift = jnp.maximum(((codes & 31) >> mantissa) - 1, 0)
        normal = (codes & 31) >= 1 << mantissa
        fraction = (codes & ((1 << mantissa) - 1)) + jnp.where(normal, 1 << mantissa, 0)
        magnitude = (fraction << shift).astype(dtype) * jnp.asarray(unit, dtype)
        return jnp.where(codes >= 32, -magnitude, magnitude)

    def encode(x: jax.Array) -> jax.Array:
        units = jnp.minimum(jnp.abs(x) * (1 / unit), largest)
        # The exponent field of a float32, less that of 2^mantissa: how far units are shifted.
        biased = lax.bitcast_convert_type(units, jnp.int32) >> 23
        shift = jnp.maximum(biased - (127 + mantissa), 0)
        scale = lax.bitcast_convert_type((127 - shift) << 23, jnp.float32)  # 2^-shift
        code = jnp.round(units * scale).astype(jnp.int32) + (shift << mantissa)
        return (code + jnp.where(jnp.signbit(x), 32, 0)).astype(jnp.uint8)

    return Format(name, ("uint4", "uint2"), decode, encode, -largest * unit, largest * unit, 6)


FLOATING = {
    "fp8_e4m3": floating("fp8_e4m3", "float8_e4m3fn"),
    "fp8_e5m2": floating("fp8_e5m2", "float8_e5m2"),
    "fp6_e2m3": six_bits("fp6_e2m3", 2, 3),
    "fp6_e3m2": six_bits("fp6_e3m2", 3, 2),
    "fp4_e2m1": floating("fp4_e2m1", "float4_e2m1fn"),
}
