"""Codebooks: the code is an index into a sorted table of values."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.base import Format

# NF4 (QLoRA, arXiv:2305.14314, appendix E), the float32 values that bitsandbytes stores.
NF4_VALUES = tuple(
    float.fromhex(v)
    for v in (
        "-1 -0x1.647362p-1 -0x1.0cd660p-1 -0x1.946540p-2 -0x1.23449ap-2 -0x1.7a6a7ep-3 -0x1.74f0e2p-4 0 "
        "0x1.45f5fep-4 0x1.4995c6p-3 0x1.f809bap-3 0x1.5a0674p-2 0x1.c34970p-2 0x1.200f56p-1 0x1.722726p-1 1"
    ).split()
)


def dynamic_values() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (Dettmers, arXiv:2110.02861): seven decades, more fraction bits near the top.

    Decade i = 0..6 holds the midpoints of 2^i intervals of [0.1, 1], times 10^(i - 6), with both signs; 0 and 1 complete
    the 256 values.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        values += [sign * float(np.float32(10.0 ** (i - 6)) * m) for m in middles for sign in (-1, 1)]
    return tuple(sorted(float(np.float32(v)) for v in values))


def codebook(name: str, storage: str, values: tuple[float, ...], bits: int) -> Format:
    """Nearest entry of a sorted table; a value exactly halfway takes the lower code, as in bitsandbytes."""
    table = np.asarray(values, np.float32)
    middles = (table[:-1] + table[1:]) / np.float32(2)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(jnp.asarray(table, dtype), codes.astype(jnp.uint8), axis=0, mode="clip")

    def encode(x: jax.Array) -> jax.Array:
        if len(middles) < 32:  # a sum of comparisons fuses into one pass; a search is a loop
            return sum(((x > m).astype(jnp.uint8) for m in middles), jnp.zeros(x.shape, jnp.uint8))
        return jnp.searchsorted(jnp.asarray(middles), x, side="left").astype(jnp.uint8)

    return Format(name, storage, decode, encode, float(table[0]), float(table[-1]), bits)


CODEBOOK = {
    "nf4": codebook("nf4", "uint4", NF4_VALUES, 4),
    "dynamic8": codebook("dynamic8", "uint8", dynamic_values(), 8),
}
