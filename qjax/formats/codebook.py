"""Codebooks: the code is an index into a table of values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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

# bitsandbytes' FP4: a sign bit and 0, 1/192, 8, 12, 4, 6, 2, 3 twelfths. It is not E2M1.
FP4_BNB_VALUES = tuple(
    sign * twelfths / 12 for sign in (1.0, -1.0) for twelfths in (0, 1 / 16, 8, 12, 4, 6, 2, 3)
)

# llama.cpp's non-linear 4-bit values (IQ4_NL, IQ4_XS).
IQ4_VALUES = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)


def dynamic_values(bits: int = 8, signed: bool = True) -> np.ndarray:
    """The dynamic map (Dettmers, arXiv:2110.02861), to the bit as bitsandbytes has it.

    Decade i = 0..d - 1, d = bits - 1, holds the midpoints of 2^i intervals of [0.1, 1], times
    10^(i - d + 1), with both signs; unsigned, those of 2^(i + 1) intervals. So there are d decades,
    with more fraction bits near the top. 0 and 1 complete the 2^bits values. The edges are counted
    from the nearer end, each rounded once.
    """
    start, stop, decades = np.float32(0.1), np.float32(1), bits - 1
    values = [np.array([0, 1], np.float32)]
    for i in range(decades):
        intervals = 2 ** (i + (not signed))
        step = np.float64((stop - start) / np.float32(intervals))
        k = np.arange(intervals + 1)
        up, down = start + step * k, stop - step * (intervals - k)
        edges = np.where(k < (intervals + 1) // 2, up, down).astype(np.float32)
        scale = np.float32(10.0 ** (i - decades + 1))
        middles = scale * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))


def codebook(name: str, storage: str, table: np.ndarray, bits: int) -> Format:
    """The nearest entry of a float32 table.

    A value exactly halfway takes the lower one, as in bitsandbytes.
    """
    order = np.argsort(table, kind="stable")
    ordered = table[order]
    middles = (ordered[:-1] + ordered[1:]) / np.float32(2)
    sorted_codes = bool(np.all(order == np.arange(len(table))))

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return _take(table, codes.astype(jnp.uint8), dtype)

    def encode(x: jax.Array) -> jax.Array:
        if len(middles) < 32:  # a sum of comparisons fuses into one pass
            codes = sum(((x > m).astype(jnp.uint8) for m in middles), jnp.zeros(x.shape, jnp.uint8))
        else:
            codes = _count_below(x, middles)
        return codes if sorted_codes else _take(order, codes, jnp.dtype(jnp.uint8))

    integer = bool(np.all(table == np.round(table)))
    low, high = float(ordered[0]), float(ordered[-1])
    return Format(name, storage, decode, encode, low, high, bits, integer)


def _count_below(x: jax.Array, middles: np.ndarray) -> jax.Array:
    """How many of the sorted `middles` each x exceeds (`searchsorted`, left), in one lookup.

    The sign and the leading bits of |x| name a bucket so narrow that it holds one middle at most.
    Its entry is how many middles lie below it and the other bits of its own, which are compared
    with those of x: one lookup fuses with whatever makes x, where two would not.
    """
    assert np.all(middles != 0)
    bits = np.abs(middles).view(np.int32)
    negative = middles < 0
    for shift in range(23, 0, -1):
        names = (bits >> shift) + np.where(negative, 1 << 23, 0)
        if len(np.unique(names)) == len(names):
            break
    first, last = int(bits.min() >> shift), int(bits.max() >> shift)
    count, mask = last - first + 3, (1 << shift) - 1  # a bucket below and one above the others
    low = (np.arange(first - 1, last + 2, dtype=np.int32) << shift).view(np.float32)
    low[0] = 0
    high = np.append(low[1:], np.float32(np.inf))
    below = np.append(np.searchsorted(middles, low), np.searchsorted(middles, -high, "right"))
    own = np.append(np.full(count, mask), np.zeros(count, int))  # nothing is beyond, on either side
    own[(bits >> shift) - (first - 1) + count * negative] = bits & mask
    signed = lax.bitcast_convert_type(x, jnp.int32)
    below_zero, found = signed < 0, signed & 0x7FFFFFFF
    side = jnp.where(below_zero, count, 0)
    bucket = jnp.clip((found >> shift) - (first - 1), 0, count - 1) + side
    entry = _take((below << shift | own).astype(np.int32), bucket, jnp.dtype(jnp.int32))
    beyond = (found & mask) - (entry & mask)
    passed = jnp.where(below_zero, beyond < 0, beyond > 0)
    return ((entry >> shift) + passed.astype(jnp.int32)).astype(jnp.uint8)


def _take(table: np.ndarray, indices: jax.Array, dtype: jnp.dtype) -> jax.Array:
    where = _compat.explicit_sharding(indices)
    return jnp.asarray(table, dtype).at[indices].get(mode="clip", out_sharding=where)


CODEBOOK = {
    "nf4": codebook("nf4", "uint4", np.array(NF4_VALUES, np.float32), 4),
    "fp4_bnb": codebook("fp4_bnb", "uint4", np.array(FP4_BNB_VALUES, np.float32), 4),
    "dynamic8": codebook("dynamic8", "uint8", dynamic_values(), 8),
    "dynamic4": codebook("dynamic4", "uint4", dynamic_values(4), 4),
    "udynamic8": codebook("udynamic8", "uint8", dynamic_values(signed=False), 8),
}
