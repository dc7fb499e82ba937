"""Round to nearest: how a scale is chosen from a block, and codes from the scale.

One function per value of `Spec.scale_method`, all `(w float32, spec, block, whole) -> Rounded`,
elementwise or block-wise, so that they run under jit on arrays of any rank. `whole` is the block of
everything that one weight of a stack spans.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks, exact, microscaling
from qjax.formats import FORMATS
from qjax.ggml_rounding import ggml
from qjax.scaling import Rounded, reciprocal, round_scale, saturate
from qjax.spec import Spec


def absmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Symmetric: scale = max|w| / largest code; codes = encode(w / scale)."""
    return _symmetric(w, spec, block, blocks.largest(w, block))


def _symmetric(w: jax.Array, spec: Spec, block: blocks.Block, largest: jax.Array) -> Rounded:
    """The scale takes `largest` to the largest code."""
    fmt = FORMATS[spec.format]
    scale = round_scale(exact.divide(largest, fmt.max), largest, spec.scale_dtype)
    if spec.scale_dtype == "float32":  # one rounding instead of the two of 1 / scale
        inverse = fmt.max / jnp.where(scale == 0, jnp.inf, largest)
    else:
        inverse = reciprocal(scale)
    codes = blocks.apply(lambda x, s: fmt.encode(x * s), w, block, inverse)
    return Rounded(codes, scale, inverse=inverse)


def minmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Asymmetric: scale = (max - min) / (number of codes - 1).

    With `zero_dtype` the range is widened to hold zero and the zero point is a code; without it the
    block's minimum is the offset.
    """
    return _affine(w, spec, block, *blocks.extremes(w, block))


def _affine(
    w: jax.Array, spec: Spec, block: blocks.Block, low: jax.Array, high: jax.Array
) -> Rounded:
    """The codes span `low` to `high`."""
    fmt = FORMATS[spec.format]
    if spec.zero_dtype is not None:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    width = high - low
    scale = round_scale(exact.divide(width, fmt.max - fmt.min), width, spec.scale_dtype)
    inverse = reciprocal(scale)
    if spec.zero_dtype is not None:
        zero = jnp.clip(fmt.min - jnp.round(low * inverse), fmt.min, fmt.max)
        codes = blocks.apply(
            lambda x, s, z: fmt.encode(jnp.round(x * s) + z), w, block, inverse, zero
        )
        return Rounded(codes, scale, zero_point=zero.astype(spec.zero_dtype), inverse=inverse)
    offset = saturate(low - fmt.min * scale.astype(jnp.float32), spec.scale_dtype)
    start = offset.astype(jnp.float32)
    codes = blocks.apply(lambda x, s, o: fmt.encode((x - o) * s), w, block, inverse, start)
    return Rounded(codes, scale, offset=offset, inverse=inverse)


def mean(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Double quantization of scales: less their mean over `whole`, then symmetric by blocks.

    The mean is kept once per block, so that leaves stay alike in shape.
    """
    view, within, _ = blocks.split(w, whole)
    lines = jnp.moveaxis(view, within, range(view.ndim - len(within), view.ndim))
    count = math.prod(view.shape[a] for a in within)
    lines = lines.reshape(*lines.shape[: view.ndim - len(within)], count)
    average = _sum_by_halves(lines) / max(count, 1)
    average = average.reshape(blocks.scale_shape(w.shape, whole))
    centered = blocks.apply(jnp.subtract, w, whole, average)
    rounded = absmax(centered, spec, block, whole)
    return rounded._replace(offset=jnp.broadcast_to(average, blocks.scale_shape(w.shape, block)))


def _sum_by_halves(x: jax.Array) -> jax.Array:
    """The sum along the last axis in one order on every machine: XLA's depends on the processor."""
    length = 1 << (max(x.shape[-1], 1) - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
    while (half := x.shape[-1] // 2) > 0:
        x = lax.optimization_barrier(x[..., :half] + x[..., half:])
    return x[..., 0]


def mse(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """The clip of each block that gives the least squared error, by search.

    Symmetric formats, codebooks and floats try max|w| times 1, 0.98, ... 0.3 in place of max|w|
    (powers of two: times 1, 2 and 1/2); asymmetric ones move both ends of the range inwards, then
    each end. The search starts from what absmax (or mx_even, nvfp4, minmax) would do and takes only
    improvements. The scale is rounded before the codes are chosen and the error is measured.
    """
    if spec.scale_spec is not None and spec.scale_spec.scale_method == "ggml":
        raise ValueError(
            f'scale_method "mse" cannot choose the scales of {spec.format}, which have codes of '
            'their own: use "ggml"'
        )
    if not spec.symmetric:
        return _mse_affine(w, spec, block)
    largest = blocks.largest(w, block)
    powers = spec.scale_dtype == "float8_e8m0fnu"
    rule = lambda clip: _clipped(w, spec, block, whole, clip)
    (best,) = _search(
        lambda clip: _squared_error(w, spec, block, largest, *rule(clip)),
        (largest,),
        lambda factor: (largest * factor,),
        _OCTAVES if powers else _CLIPS,
    )
    return rule(best)[0]


_CLIPS = np.linspace(0.98, 0.3, 35, dtype=np.float32)
_OCTAVES = np.array([2.0, 0.5], np.float32)
_ENDS = np.linspace(0.02, 0.4, 20, dtype=np.float32)


def _clipped(
    w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block, largest: jax.Array
) -> tuple[Rounded, Any]:
    """What blocks with the maximum `largest` become, and the values of their scales."""
    if spec.scale_spec is not None and spec.scale_spec.block == ():
        return microscaling.nvfp4_for(w, spec, block, whole, largest)
    if spec.scale_dtype == "float8_e8m0fnu":
        found = microscaling.mx_for(w, spec, block, largest, "mx_even")
    else:
        found = _symmetric(w, spec, block, largest)
    return found, found.scale


def _mse_affine(w: jax.Array, spec: Spec, block: blocks.Block) -> Rounded:
    best = blocks.extremes(w, block)
    width = best[1] - best[0]

    def error(low: jax.Array, high: jax.Array) -> jax.Array:
        found = _affine(w, spec, block, low, high)
        return _squared_error(w, spec, block, width, found, found.scale)

    for low_moves, high_moves in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0)):

        def move(factor: jax.Array, low=best[0], high=best[1], a=low_moves, b=high_moves):
            return low + width * factor * a, high - width * factor * b

        best = _search(error, best, move, _ENDS)
    return _affine(w, spec, block, *best)


def _search(
    error: Callable[..., jax.Array],
    start: tuple[jax.Array, ...],
    move: Callable[[jax.Array], tuple[jax.Array, ...]],
    factors: np.ndarray,
) -> tuple[jax.Array, ...]:
    """Per block, the candidate of least error: `start`, or what `move` makes of a factor."""

    def step(best: tuple[jax.Array, ...], factor: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        candidate = move(factor)
        found = (error(*candidate), *candidate)
        better = found[0] < best[0]
        return tuple(jnp.where(better, n, o) for n, o in zip(found, best, strict=True)), None

    best, _ = lax.scan(step, (error(*start), *start), jnp.asarray(factors))
    return best[1:]


def _squared_error(
    w: jax.Array, spec: Spec, block: blocks.Block, unit: jax.Array, rounded: Rounded, scale: Any
) -> jax.Array:
    """Of each block, summed, in units that neither overflow nor vanish; `scale` as it is held."""
    fmt = FORMATS[spec.format]
    zero = jnp.zeros_like(scale, jnp.float32)
    held: tuple[Any, Any] = rounded.zero_point, rounded.offset
    start, offset = (zero if v is None else v for v in held)

    def equation(codes: jax.Array, *per_block: jax.Array) -> jax.Array:
        scale, start, offset = (v.astype(jnp.float32) for v in per_block)
        return (fmt.decode(codes, jnp.dtype(jnp.float32)) - start) * scale + offset

    values = blocks.apply(equation, rounded.codes, block, scale, start, offset)
    errors = blocks.apply(jnp.multiply, values - w, block, reciprocal(unit))
    return blocks.totals(jnp.square(errors), block)


SCALE_METHODS = {
    "absmax": absmax,
    "minmax": minmax,
    "mean": mean,
    "mse": mse,
    "ggml": ggml,
    **dict.fromkeys(microscaling.MX_RULES, microscaling.mx),
    "nvfp4": microscaling.nvfp4,
}
