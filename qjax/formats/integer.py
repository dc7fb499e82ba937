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

    Where no device dtype has that range, or the codes are planes, they are stored as value - low,
    so that all of them are unsigned.
    """
    high = low + (1 << bits) - 1
    native = bits not in PLANES and low in (0, -(1 << bits - 1))
    unsigned = low == 0 or not native
    storage = PLANES.get(bits, f"{'uint' if unsigned else 'int'}{bits}")
    bias, joined = (0 if native else low), (jnp.uint8 if unsigned else jnp.int8)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        values = jax.lax.convert_element_type(codes, dtype)
        return values + jnp.asarray(bias, dtype) if bias else values

    def encode(x: jax.Array) -> jax.Array:
        return (jnp.clip(jnp.round(x), low, high) - bias).astype(joined)

    return Format(name, storage, decode, encode, float(low), float(high), bits, integer=True)


INTEGER = {
    **{f"int{n}": integer(f"int{n}", n, -(1 << n - 1)) for n in range(8, 1, -1)},
    **{f"uint{n}": integer(f"uint{n}", n, 0) for n in range(8, 1, -1)},
}
