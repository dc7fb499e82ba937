"""Round to nearest: how a scale is chosen from a block, and codes from the scale.

One function per value of `Spec.scale_method`, all `(w float32, spec, block, whole) -> Rounded`, elementwise or block-wise, so
that they run under jit on arrays of any rank.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax import blocks
from qjax.formats import FORMATS
from qjax.spec import Spec


class Rounded(NamedTuple):
    """Joined codes and what undoes them; `scale`, `zero_point` and `offset` have one value per block."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    offset: jax.Array | None = None


def absmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Symmetric: scale = max|w| / largest code; codes = encode(w / scale)."""
    fmt = FORMATS[spec.format]
    view, within, keep = blocks.split(w, block)
    largest = jnp.max(jnp.abs(view), axis=within, keepdims=True)
    scale = _round_scale(largest * (1 / fmt.max), jnp.isfinite(largest), spec.scale_dtype)
    scale = scale.reshape(blocks.scale_shape(w.shape, block))
    codes = blocks.apply(lambda x, s: fmt.encode(x * s), w, block, _reciprocal(scale))
    return Rounded(codes, scale)


def minmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Asymmetric: scale = (max - min) / (number of codes - 1).

    With `zero_dtype` the range is widened to hold zero and the zero point is a code; without it the block's minimum is the
    offset.
    """
    fmt = FORMATS[spec.format]
    view, within, keep = blocks.split(w, block)
    low, high = (f(view, axis=within, keepdims=True) for f in (jnp.min, jnp.max))
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    if spec.zero_dtype is not None:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    steps = 1 / (fmt.max - fmt.min)
    shape = blocks.scale_shape(w.shape, block)
    scale = _round_scale(high * steps - low * steps, finite, spec.scale_dtype).reshape(shape)
    inverse, low = _reciprocal(scale), low.reshape(shape)
    if spec.zero_dtype is not None:
        zero = jnp.clip(fmt.min - jnp.round(low * inverse), fmt.min, fmt.max)
        codes = blocks.apply(lambda x, s, z: fmt.encode(jnp.round(x * s) + z), w, block, inverse, zero)
        return Rounded(codes, scale, zero_point=zero.astype(jnp.int8 if fmt.min < 0 else jnp.uint8).astype(spec.zero_dtype))
    offset = _saturate(low - fmt.min * scale.astype(jnp.float32), spec.scale_dtype)
    codes = blocks.apply(lambda x, s, o: fmt.encode((x - o) * s), w, block, inverse, offset.astype(jnp.float32))
    return Rounded(codes, scale, offset=offset)


def mean(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Double quantization of scales: less their mean over `whole`, then symmetric by blocks.

    The mean is kept once per block, so that leaves stay alike in shape.
    """
    view, within, keep = blocks.split(w, whole)
    average = jnp.mean(view, axis=within, keepdims=True).reshape(blocks.scale_shape(w.shape, whole))
    centered = blocks.apply(jnp.subtract, w, whole, average)
    rounded = absmax(centered, spec, block, whole)
    return rounded._replace(offset=jnp.broadcast_to(average, rounded.scale.shape))


SCALE_METHODS = {"absmax": absmax, "minmax": minmax, "mean": mean}


def _round_scale(scale: jax.Array, finite: jax.Array, dtype: str) -> jax.Array:
    """`scale` in `dtype`, saturated; below the smallest normal float32 it is 0 (the block decodes to its offset or 0), and
    where the block was not finite it is NaN, so that a bad weight can never look like a number."""
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    return jnp.where(finite, _saturate(scale, dtype), jnp.asarray(jnp.nan, dtype))


def _saturate(x: jax.Array, dtype: str) -> jax.Array:
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype)


def _reciprocal(scale: jax.Array) -> jax.Array:
    scale = scale.astype(jnp.float32)
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
