"""XLA:CPU in the few shapes that it runs fast, for the layouts "nibbles" and "bytes".

XLA:CPU has a fast float32 dot and, for two rows or more against `[n, k]`, a fast int8 one; a dot
with a convert in front of it at m = 1 is fifteen times slower. Hence:

- x that holds int8 codes, on int8 codes with one scale per channel: the int8 dot itself, a single
  row padded to two.
- everything else: the rows of the weight are decoded to float32, a few megabytes at a time so that
  they stay in the cache, each block followed by its float32 dot.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.problem import Problem, Weight
from pallas_kernels.quantized_matmul.rows import SIGN, padded_group, run_length

BLOCK = 1_400_000  # weights decoded at a time; 344 rows of 4096 were the best of 16 to 1376
MAX_K = 2**31 // (127 * 128)  # int32 sums of int8 products are exact up to here


def supports(problem: Problem, device: Device) -> str | None:
    """Both row layouts, x in a float of at most 32 bits or in int8."""
    if device.platform != "cpu":
        return "it is written for XLA:CPU"
    if problem.layout not in ("nibbles", "bytes"):
        return f"it reads the layouts nibbles and bytes, not {problem.layout}"
    if problem.x not in ("float32", "bfloat16", "float16", "int8"):
        return f"it takes x in float32, bfloat16, float16 or int8, not {problem.x}"
    return None if problem.config is None else "it takes no config"


def run(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """See the module; `[m, k] -> [m, n]`."""
    if problem.x == "int8" and _has_plain_channels(problem.weight):
        scale = arrays["scale"].astype(jnp.float32).reshape(1, -1)
        y = _integer_dot(x, arrays["codes"]).astype(jnp.float32) * scale
    else:
        y = _blocked_dot(x.astype(jnp.float32), arrays, problem)
    return y.astype(problem.out)


def _has_plain_channels(weight: Weight) -> bool:
    plain = weight.zero is None and weight.offset is None and weight.values is None
    return weight.code == "int8" and weight.groups == 1 and plain and weight.k <= MAX_K


def _integer_dot(x: jax.Array, codes: jax.Array) -> jax.Array:
    """int32 `x @ codes.T`; a single row is padded to two, which is what makes it fast."""
    m = x.shape[0]
    x = jnp.pad(x, ((0, 1), (0, 0))) if m == 1 else x
    return _dot(x, codes, jnp.int32)[:m]


def _blocked_dot(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    weight, nibbles = problem.weight, problem.layout == "nibbles"
    m, group = x.shape[0], padded_group(weight, nibbles)
    x = jnp.pad(x, ((0, 0), (0, weight.groups * group - weight.k)))
    if nibbles:
        run = run_length(weight)
        halves = x.reshape(m, -1, 2, run // 2)
        xs = [halves[:, :, 0].reshape(m, -1), halves[:, :, 1].reshape(m, -1)]
        cut = (weight.groups, group // run, run // 2)
    else:
        xs, cut = [x], (weight.groups, 1, group)
    cut = [s for s in cut if s != 1] or [1]  # each extra axis costs time
    names = [n for n in ("codes", "scale", "zero", "offset") if n in arrays]
    if weight.code.startswith("float8"):  # XLA:CPU converts a float8 array even to slice it
        arrays = {**arrays, "codes": lax.bitcast_convert_type(arrays["codes"], jnp.uint8)}

    def one(*block: jax.Array) -> jax.Array:
        part = dict(zip(names, block, strict=True))
        codes = _after(x, part.pop("codes")).reshape(-1, *cut)
        planes = (codes & jnp.uint8(15), codes >> jnp.uint8(4)) if nibbles else (codes,)
        ws = [_decode(p, part, weight).reshape(codes.shape[0], -1) for p in planes]
        dots = [_dot(a, w, jnp.float32) for a, w in zip(xs, ws, strict=True)]
        return sum(dots[1:], dots[0])

    return _over_rows(one, [arrays[n] for n in names], weight.n, weight.k)


def _after(x: jax.Array, codes: jax.Array) -> jax.Array:
    """The same codes, which depend on x as far as XLA can see.

    XLA runs first whatever depends on no other operation: it would decode all layers of a model
    before the first matmul, and hold them all.
    """
    zero = lax.optimization_barrier(
        lax.bitcast_convert_type(x[0, 0], jnp.uint32) >> jnp.uint32(31)
    ) >> jnp.uint32(1)
    bits = lax.bitcast_convert_type(codes, jnp.uint8)
    return lax.bitcast_convert_type(bits ^ zero.astype(jnp.uint8), codes.dtype)


def _decode(codes: jax.Array, part: dict[str, jax.Array], weight: Weight) -> jax.Array:
    """Float32 weights from unsigned nibbles or from whole codes, `[rows, (groups,) ...]`."""
    groups = () if weight.groups == 1 else (weight.groups,)
    ones = [1] * (codes.ndim - 1 - len(groups))
    spread = lambda v: v.astype(jnp.float32).reshape(codes.shape[0], *groups, *ones)
    per_group = {name: spread(v) for name, v in part.items()}
    if weight.values is not None:
        w = select(codes, weight.values)
    elif weight.code.startswith("float8"):
        w = widen(codes, weight.code)
    else:
        w = codes.astype(jnp.float32) - jnp.float32(SIGN if weight.code == "int4" else 0)
    if weight.zero is not None:
        w = w - per_group["zero"]
    w = w * per_group["scale"]
    return w if weight.offset is None else w + per_group["offset"]


def widen(bits: jax.Array, dtype: str) -> jax.Array:
    """The float32 values of float8 bits in uint8, exactly, by integer vector instructions; the
    conversion of XLA:CPU is many times slower.

    The bits of a normal number are moved to where float32 has them, and its exponent is raised by
    the difference of the biases; a subnormal one is its mantissa times a power of two.
    """
    kind, bits = jnp.finfo(dtype), bits.astype(jnp.uint32)
    magnitude, sign = bits & jnp.uint32(0x7F), (bits & jnp.uint32(0x80)) << jnp.uint32(24)
    bias = 1 - kind.minexp
    moved = (magnitude << jnp.uint32(23 - kind.nmant)) + jnp.uint32((127 - bias) << 23)
    normal = lax.bitcast_convert_type(moved, jnp.float32)
    small = magnitude.astype(jnp.float32) * jnp.float32(kind.smallest_subnormal)
    value = jnp.where(magnitude < 1 << kind.nmant, small, normal)
    infinity, nan = (0x7C, 0x7D) if dtype == "float8_e5m2" else (None, 0x7F)
    value = jnp.where(magnitude >= nan, jnp.float32(jnp.nan), value)
    if infinity is not None:
        value = jnp.where(magnitude == infinity, jnp.float32(jnp.inf), value)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint32) | sign, jnp.float32)


def select(codes: jax.Array, values: Sequence[float]) -> jax.Array:
    """`values[codes]` in float32 by a tree of selects, which are vector instructions; XLA:CPU
    would look one element up at a time.
    """
    bits = max(len(values) - 1, 1).bit_length()
    level = [jnp.float32(v) for v in (*values, *(values[-1],) * ((1 << bits) - len(values)))]
    for bit in range(bits):
        is_set = (codes & jnp.uint8(1 << bit)) != 0
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [jnp.where(is_set, odd, even) for even, odd in pairs]
    return level[0]


def _over_rows(
    one: Callable[..., jax.Array], arrays: Sequence[jax.Array], n: int, k: int
) -> jax.Array:
    """`one` over equal blocks of rows, side by side; the last begins earlier if rows are left."""
    rows = math.ceil(n / math.ceil(n * k / BLOCK))
    count = math.ceil(n / rows)
    if count == 1:
        return one(*arrays)

    def at(start: jax.Array) -> jax.Array:
        return one(*(lax.dynamic_slice_in_dim(a, start, rows) for a in arrays))

    y = lax.map(at, jnp.minimum(jnp.arange(count) * rows, n - rows))
    first = jnp.moveaxis(y[:-1], 0, 1).reshape(y.shape[1], -1)
    return jnp.concatenate([first, y[-1, :, count * rows - n :]], axis=1)


def _dot(x: jax.Array, rows: jax.Array, out: jnp.dtype) -> jax.Array:
    """`x [m, k]` by `rows [n, k]`."""
    return lax.dot_general(x, rows, (((1,), (1,)), ((), ())), preferred_element_type=out)
