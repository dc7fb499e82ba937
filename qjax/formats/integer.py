"""Integers: the code is the value."""

import jax
import jax.numpy as jnp

from qjax.formats.base import Format

# Widths that no device dtype holds are cut into planes.
PLANES = {
    3: ("uint2", "uint1"),
    5: ("uint4", "uint1"),
    6: ("uint4", "uint2"),
    7: ("uint4", "uint2", "uint1"),
}


def integer(name: str, bits: int, low: int) -> Format:
    """The integers low .. low + 2^bits - 1, rounded half to even and saturated.

    Where the codes are planes they are stored as value - low, so that every plane is unsigned.
    """
    high = low + (1 << bits) - 1
    storage = PLANES.get(bits, f"{'int' if low < 0 else 'uint'}{bits}")
    bias = low if bits in PLANES else 0
    joined = jnp.uint8 if bits in PLANES or low >= 0 else jnp.int8

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        values = jax.lax.convert_element_type(codes, dtype)
        return values + jnp.asarray(bias, dtype) if bias else values

    def encode(x: jax.Array) -> jax.Array:
        return (jnp.clip(jnp.round(x), low, high) - bias).astype(joined)

    return Format(name, storage, decode, encode, float(low), float(high), bits)


INTEGER = {
    "int8": integer("int8", 8, -128),
    "int4": integer("int4", 4, -8),
    "uint8": integer("uint8", 8, 0),
    "uint6": integer("uint6", 6, 0),
    "uint4": integer("uint4", 4, 0),
}
