"""Codebooks: the code is an index into a sorted table of values."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _compat
from qjax.formats.base import Format

# NF4 (QLoRA, arXiv:2305.14314, appendix E), the float32 values that bitsandbytes stores.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dynamic_values() -> np.ndarray:
    """The signed 8-bit dynamic map (Dettmers, arXiv:2110.02861), to the bit as bitsandbytes has it.

    Decade i = 0..6 holds the midpoints of 2^i intervals of [0.1, 1], times 10^(i - 6), with both
    signs: seven decades, more fraction bits near the top. 0 and 1 complete the 256 values. The
    edges are counted from the nearer end, each rounded once.
    """
    start, stop = np.float32(0.1), np.float32(1)
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        intervals = 2**i
        step = np.float64((stop - start) / np.float32(intervals))
        k = np.arange(intervals + 1)
        up, down = start + step * k, stop - step * (intervals - k)
        edges = np.where(k < (intervals + 1) // 2, up, down).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


def codebook(name: str, storage: str, table: np.ndarray, bits: int) -> Format:
    """The nearest entry of a sorted float32 table.

    A value exactly halfway takes the lower code, as in bitsandbytes.
    """
    middles = (table[:-1] + table[1:]) / np.float32(2)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        where = _compat.explicit_sharding(codes)
        indices = codes.astype(jnp.uint8)
        return jnp.asarray(table, dtype).at[indices].get(mode="clip", out_sharding=where)

    def encode(x: jax.Array) -> jax.Array:
        if len(middles) < 32:  # a sum of comparisons fuses into one pass; a search is a loop
            return sum(((x > m).astype(jnp.uint8) for m in middles), jnp.zeros(x.shape, jnp.uint8))
        return jnp.searchsorted(jnp.asarray(middles), x, side="left").astype(jnp.uint8)

    return Format(name, storage, decode, encode, float(table[0]), float(table[-1]), bits)


CODEBOOK = {
    "nf4": codebook("nf4", "uint4", np.array(NF4_VALUES, np.float32), 4),
    "dynamic8": codebook("dynamic8", "uint8", dynamic_values(), 8),
}
