"""Round to nearest: how a scale is chosen from a block, and codes from the scale.

One function per value of `Spec.scale_method`, all `(w float32, spec, block, whole) -> Rounded`,
elementwise or block-wise, so that they run under jit on arrays of any rank. `whole` is the block of
everything that one weight of a stack spans.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax import blocks, exact, kquants
from qjax.formats import FORMATS, Format
from qjax.spec import Spec


class Rounded(NamedTuple):
    """Joined codes and what undoes them.

    `scale`, `zero_point` and `offset` have one value per block. A scale or offset that is itself
    `Rounded` is held as `Spec.scale_spec` says.
    """

    codes: jax.Array
    scale: "jax.Array | Rounded"
    zero_point: jax.Array | None = None
    offset: "jax.Array | Rounded | None" = None


def absmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Symmetric: scale = max|w| / largest code; codes = encode(w / scale)."""
    fmt = FORMATS[spec.format]
    largest = blocks.largest(w, block)
    scale = _round_scale(exact.divide(largest, fmt.max), largest, spec.scale_dtype)
    if spec.scale_dtype == "float32":  # one rounding instead of the two of 1 / scale
        inverse = fmt.max / jnp.where(scale == 0, jnp.inf, largest)
    else:
        inverse = _reciprocal(scale)
    return Rounded(blocks.apply(lambda x, s: fmt.encode(x * s), w, block, inverse), scale)


def minmax(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Asymmetric: scale = (max - min) / (number of codes - 1).

    With `zero_dtype` the range is widened to hold zero and the zero point is a code; without it the
    block's minimum is the offset.
    """
    fmt = FORMATS[spec.format]
    low, high = blocks.extremes(w, block)
    if spec.zero_dtype is not None:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    width = high - low
    scale = _round_scale(exact.divide(width, fmt.max - fmt.min), width, spec.scale_dtype)
    inverse = _reciprocal(scale)
    if spec.zero_dtype is not None:
        zero = jnp.clip(fmt.min - jnp.round(low * inverse), fmt.min, fmt.max)
        codes = blocks.apply(
            lambda x, s, z: fmt.encode(jnp.round(x * s) + z), w, block, inverse, zero
        )
        return Rounded(codes, scale, zero_point=zero.astype(spec.zero_dtype))
    offset = _saturate(low - fmt.min * scale.astype(jnp.float32), spec.scale_dtype)
    start = offset.astype(jnp.float32)
    codes = blocks.apply(lambda x, s, o: fmt.encode((x - o) * s), w, block, inverse, start)
    return Rounded(codes, scale, offset=offset)


def mean(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """Double quantization of scales: less their mean over `whole`, then symmetric by blocks.

    The mean is kept once per block, so that leaves stay alike in shape.
    """
    view, within, _ = blocks.split(w, whole)
    average = jnp.mean(view, axis=within).reshape(blocks.scale_shape(w.shape, whole))
    centered = blocks.apply(jnp.subtract, w, whole, average)
    rounded = absmax(centered, spec, block, whole)
    return rounded._replace(offset=jnp.broadcast_to(average, blocks.scale_shape(w.shape, block)))


def ggml(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """llama.cpp's own rule for its block types, to the byte (`ggml-quants.c`, no importances).

    q8_0: scale = max|w| / 127. q4_0, q5_0: scale = the element of largest magnitude / smallest
    code, which it therefore hits. q4_1, q5_1: scale = (max - min) / (number of codes - 1), offset =
    min. Codes are w times the reciprocal of the float32 scale, half away from zero; only then is
    the scale rounded to float16.
    """
    return GGML_METHODS[spec.format](w, FORMATS[spec.format], block)


def _ggml_symmetric(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    largest = blocks.largest(w, block)
    scale = _float16_range(exact.divide(largest, fmt.max), largest)
    codes = blocks.apply(
        lambda x, s: (
            jax.lax.round(x * s, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
            .clip(fmt.min, fmt.max)
            .astype(jnp.int8)
        ),
        w,
        block,
        _reciprocal(scale),
    )
    return Rounded(codes, scale.astype(jnp.float16))


def _ggml_signed(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    """The first element of largest magnitude, with its sign, becomes the smallest code."""
    view, within, _ = blocks.split(w, block)
    first = jnp.argmax(jnp.abs(view), axis=within[0], keepdims=True)
    extreme = jnp.take_along_axis(view, first, axis=within[0])
    extreme = jnp.where(extreme == 0, 0.0, extreme).reshape(blocks.scale_shape(w.shape, block))
    scale = _float16_range(extreme / fmt.min, extreme)  # a power of two: exact
    codes = blocks.apply(
        lambda x, s: _truncate(exact.rounded(x * s) + (0.5 - fmt.min), fmt),
        w,
        block,
        _reciprocal(scale),
    )
    signed = isinstance(fmt.storage, str)
    if signed:
        codes = codes.astype(jnp.int8) + jnp.int8(fmt.min)
    return Rounded(codes, scale.astype(jnp.float16))


def _ggml_affine(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    low, high = blocks.extremes(w, block)
    ends = jnp.maximum(high, -low)
    scale = _float16_range(exact.divide(high - low, fmt.max), ends)
    offset = _float16_range(low, ends)
    codes = blocks.apply(
        lambda x, s, o: _truncate(exact.rounded((x - o) * s) + 0.5, fmt),
        w,
        block,
        _reciprocal(scale),
        low,
    )
    return Rounded(codes, scale.astype(jnp.float16), offset=offset.astype(jnp.float16))


def _truncate(x: jax.Array, fmt: Format) -> jax.Array:
    """Unsigned codes of a positive x: its integer part, at most the largest of the format."""
    return jnp.minimum(x, fmt.max - fmt.min).astype(jnp.uint8)


SCALE_METHODS = {"absmax": absmax, "minmax": minmax, "mean": mean, "ggml": ggml}


def _ggml_k(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    """Super-blocks of 256: the groups' scales (and minima) have codes of their own."""
    axis = next(a for a, b in enumerate(block) if b > 1)
    group = block[axis]
    moved = jnp.moveaxis(w, axis, 0)
    shape = (w.shape[axis] // 256, 256 // group, group, moved.size // w.shape[axis])
    x = moved.reshape(shape).transpose(2, 0, 1, 3)

    def back(value: jax.Array) -> jax.Array:
        """[super-block, (group, (element,)) column] as an array like w."""
        return jnp.moveaxis(value.reshape(-1, *moved.shape[1:]), 0, axis)

    if fmt.name == "q6_k":
        found = kquants.symmetric(x)
        return Rounded(
            back(found.codes.transpose(1, 2, 0, 3)), Rounded(back(found.scales), back(found.d))
        )
    start, steps = {"q4_k": (-1.0, 20), "q5_k": (-0.5, 15)}[fmt.name]
    found = kquants.affine(x, int(fmt.max), start, steps)
    return Rounded(
        back(found.codes.transpose(1, 2, 0, 3)),
        Rounded(back(found.scales), back(found.d)),
        offset=Rounded(back(found.mins), back(-found.dmin)),
    )


GGML_METHODS = {
    "q8_0": _ggml_symmetric,
    "q4_0": _ggml_signed,
    "q5_0": _ggml_signed,
    "q4_1": _ggml_affine,
    "q5_1": _ggml_affine,
    "q4_k": _ggml_k,
    "q5_k": _ggml_k,
    "q6_k": _ggml_k,
}


def _round_scale(scale: jax.Array, block_value: jax.Array, dtype: str) -> jax.Array:
    """`scale` in `dtype`, saturated.

    Below the smallest normal float32 it is 0: the block decodes to zeros, or to its offset. Where
    `block_value`, taken from all of a block, is not finite, or the reciprocal of the scale is no
    normal float32, it is NaN, so that a bad weight can never look like a number.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    good = jnp.isfinite(block_value) & (scale <= 1 / tiny)
    scale = _saturate(jnp.where(scale < tiny, 0, scale), dtype)
    return jnp.where(good, scale, jnp.asarray(jnp.nan, dtype))


def _saturate(x: jax.Array, dtype: str) -> jax.Array:
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype)


def _float16_range(x: jax.Array, block_value: jax.Array) -> jax.Array:
    """Float32 `x`, saturated where float16 ends; NaN where `block_value` is not finite."""
    top = float(jnp.finfo(jnp.float16).max)
    return jnp.where(jnp.isfinite(block_value), jnp.clip(x, -top, top), jnp.nan)


def _reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, 0 where it is 0; the division comes last so that XLA does not redo what precedes
    it for every element of a block.
    """
    scale = scale.astype(jnp.float32)
    return 1 / jnp.where(scale == 0, jnp.inf, scale)
