"""Casts of GEMM operands: amax, scale, codes. Kernels replace `cast_both`: see `kernels`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks, microscaling
from qjax.activation import hadamard
from qjax.formats import FORMATS, Format, floating
from qjax.qtensor import QTensor
from qjax.training import kernels
from qjax.training.recipes import Cast

Axes = tuple[int, ...]

SMALLEST = 2.0**-110  # an amax below counts as this, so that 1 / scale stays finite
ROTATED = 16  # neighbors that a Hadamard matrix mixes
SIGNS = np.random.default_rng(0).choice([-1.0, 1.0], ROTATED).astype(np.float32)


def cast_both(
    x: jax.Array,
    hows: Sequence[Cast | None],
    contracts: Sequence[Axes],
    whole: Axes,
    amax: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple["QTensor | jax.Array", ...]:
    """One tensor as it enters two GEMMs that contract different axes of it.

    Both are one QTensor where the same codes serve, as those of one scale for the whole tensor do,
    except that a kernel writes them once for each.

    Args:
      x: floating point, any shape.
      hows: its cast for each GEMM; `None` hands x on as it is.
      contracts: the axes that each GEMM contracts.
      whole: the axes that a tensor's scale spans: all but those of stacked layers.
      amax: float32, for delayed scales: what they are made from; a scalar, or one per scale.
      key: of the stochastic rounding.
    """
    first, second = hows
    if first is not None and first == second:
        pair = [block_of(first, x.shape, contract, whole) for contract in contracts]

        def scales(which: int, top: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
            wide = x.astype(jnp.float32)
            return _scales(wide, first, FORMATS[first.format], pair[which], whole, amax, top)

        both = kernels.cast_both(x, first, contracts, pair, scales)
        if both is not None:
            return both
    a = cast(x, first, contracts[0], whole, amax, key)
    if first == second and first is not None and _serves_both(first):
        return a, a
    other = None if key is None else jax.random.fold_in(key, 1)
    return a, cast(x, second, contracts[1], whole, amax, other)


def _serves_both(how: Cast) -> bool:
    tile = isinstance(how.block, tuple) and len(set(how.block)) <= 1
    return tile and not how.hadamard


def cast(
    x: jax.Array,
    how: Cast | None,
    contract: Axes,
    whole: Axes,
    amax: jax.Array | None = None,
    key: jax.Array | None = None,
) -> "QTensor | jax.Array":
    """X in the codes and scales of `how`: amax in float32, codes = round(x / scale), saturated.

    A block that holds Inf or NaN decodes to NaN; under a delayed scale Inf saturates. E4M3 scales
    are rounded to nearest, but up where rounding is stochastic.
    """
    if how is None:
        return x
    dtype, fmt = np.dtype(x.dtype), FORMATS[how.format]
    made = kernels.cast_rows(x, how, contract, block_of(how, x.shape, contract, whole))
    if made is not None:
        return made
    x = x.astype(jnp.float32)
    if how.hadamard:
        x = rotated(x, contract[-1])
    block = block_of(how, x.shape, contract, whole)
    scale, inverse = _scales(x, how, fmt, block, whole, amax)
    scaled = blocks.apply(jnp.multiply, x, block, inverse)
    if how.stochastic:
        assert key is not None
        scaled = stochastic(scaled, fmt, key)
    held = how.format
    if fmt.bits == 4 and not fmt.integer:  # XLA:CPU fails on some conversions of float4
        held, scaled = "fp8_e4m3", jnp.clip(floating.nearest(scaled, fmt.storage), fmt.min, fmt.max)
    codes = FORMATS[held].encode(scaled)
    return QTensor(codes, scale, None, None, None, held, blocks.trim(block), dtype)


def block_of(how: Cast, shape: Sequence[int], contract: Axes, whole: Axes) -> blocks.Block:
    """One length per axis; a GEMM that contracts nothing shares one scale."""
    block = [1] * len(shape)
    free = [a for a in whole if a not in contract]
    if how.block == () or not contract:
        lengths = {a: shape[a] for a in whole}
    elif how.block is None:
        lengths = {a: shape[a] for a in contract}
    elif isinstance(how.block, int):
        lengths = {contract[-1]: how.block}
    else:
        lengths = {contract[-1]: how.block[0]} | ({free[-1]: how.block[1]} if free else {})
    for a, n in lengths.items():
        block[a] = max(1, min(n, shape[a]))
    return tuple(block)


def largest(x: jax.Array, block: Sequence[int]) -> jax.Array:
    """The largest magnitude of each block, float32; Inf where a block holds NaN or Inf."""
    view, within, _ = blocks.split(x, block)
    magnitude = jnp.abs(view.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    top = jnp.max(magnitude, axis=within, initial=0.0)
    return top.reshape(blocks.scale_shape(x.shape, block))


def _scales(
    x: jax.Array,
    how: Cast,
    fmt: Format,
    block: blocks.Block,
    whole: Axes,
    amax: jax.Array | None,
    top: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """float32 scales of the blocks, and their reciprocals, each rounded once.

    `top` is `largest(x, block)` where that is known.
    """
    if how.scale == "delayed":
        assert amax is not None
        top = jnp.where(amax > 0, amax, fmt.max)  # a scale of 1 until something was seen
        return _linear(jnp.broadcast_to(top, blocks.scale_shape(x.shape, block)), fmt)
    top = largest(x, block) if top is None else top
    if how.scale == "current":
        return _linear(top, fmt)
    if how.scale == "power_of_two":
        rule = microscaling.MX_RULES["mx_ceil"](fmt)
        scale = microscaling.power_of_two(top, fmt, rule)
        return scale.astype(jnp.float32), microscaling.inverse(scale)
    tensor = tuple(max(s, 1) if a in whole else 1 for a, s in enumerate(x.shape))
    inner = FORMATS["fp8_e4m3"]
    outer = jnp.maximum(largest(x, tensor), SMALLEST) / (fmt.max * inner.max)
    fine = blocks.scale_shape(x.shape, block)
    outer = blocks.expand(outer, fine, [-(-t // b) for t, b in zip(tensor, block, strict=True)])
    wanted = jnp.clip(top / (fmt.max * outer), 2.0**-9, inner.max)
    codes = inner.encode(wanted)
    if how.stochastic:  # a scale rounded down would saturate the largest: a bias
        below = codes.astype(jnp.float32) < wanted
        bits = lax.bitcast_convert_type(codes, jnp.uint8) + below.astype(jnp.uint8)
        codes = lax.bitcast_convert_type(bits, codes.dtype)
    scale = codes.astype(jnp.float32) * outer
    return scale, 1 / scale


def _linear(top: jax.Array, fmt: Format) -> tuple[jax.Array, jax.Array]:
    top = jnp.maximum(top, SMALLEST)
    return top / fmt.max, fmt.max / top


def stochastic(x: jax.Array, fmt: Format, key: jax.Array) -> jax.Array:
    """X rounded to one of its two neighbors in `fmt`, so that the mean is x.

    floor(x / q + u) * q with u uniform in [0, 1) and q the distance of the neighbors; what lies
    beyond the largest value is left to saturate.
    """
    u = jax.random.uniform(key, x.shape, jnp.float32)
    if fmt.integer:
        return jnp.floor(x + u)
    quantum, reciprocal = floating.spacing(x, fmt.storage)
    return jnp.where(jnp.isfinite(x), jnp.floor(x * reciprocal + u) * quantum, x)


def rotated(x: jax.Array, axis: int) -> jax.Array:
    """X times a fixed random Hadamard matrix, 16 neighbors along `axis` at a time, zero-padded."""
    length = x.shape[axis]
    x = jnp.pad(x, [(0, -length % ROTATED * (a == axis)) for a in range(x.ndim)])
    x = jnp.moveaxis(x, axis, -1)
    cut = x.reshape(*x.shape[:-1], x.shape[-1] // ROTATED, ROTATED)
    signs = jnp.asarray(SIGNS).reshape((1,) * (cut.ndim - 1) + (ROTATED,))
    return jnp.moveaxis(hadamard(cut * signs).reshape(x.shape), -1, axis)
