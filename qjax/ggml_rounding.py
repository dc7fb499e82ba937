"""llama.cpp's own rules for its block types."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax import blocks, exact, kquants, microscaling
from qjax.formats import FORMATS, Format
from qjax.formats.floating import narrow
from qjax.scaling import Rounded, reciprocal
from qjax.spec import Spec


def ggml(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """llama.cpp's own rule for its block types, to the byte (`ggml-quants.c`, no importances).

    q8_0: scale = max|w| / 127. q4_0, q5_0: scale = the element of largest magnitude / smallest
    code, which it therefore hits. q4_1, q5_1: scale = (max - min) / (number of codes - 1), offset =
    min. Codes are w times the reciprocal of the float32 scale, half away from zero; only then is
    the scale rounded to float16. tq1_0, tq2_0: scale = max|w|. mxfp4:
    scale = 2^(floor(log2(max|w|)) - 2), halves towards zero. K-quants and IQ4: the searches of
    `kquants`.

    Raises:
      ValueError: if `spec.format` is no block type of llama.cpp.
    """
    if spec.format not in GGML_METHODS:
        known = ", ".join(GGML_METHODS)
        raise ValueError(f'scale_method "ggml" is for {known}; {spec.format} has no rule there')
    return GGML_METHODS[spec.format](w, FORMATS[spec.format], block)


def _ggml_symmetric(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    largest = blocks.largest(w, block)
    scale = _float16_range(exact.divide(largest, fmt.max), largest)
    codes = blocks.apply(
        lambda x, s: _half_away(x * s).clip(fmt.min, fmt.max).astype(jnp.int8),
        w,
        block,
        reciprocal(scale),
    )
    return Rounded(codes, narrow(scale, jnp.float16))


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
        reciprocal(scale),
    )
    signed = isinstance(fmt.storage, str)
    if signed:
        codes = codes.astype(jnp.int8) + jnp.int8(fmt.min)
    return Rounded(codes, narrow(scale, jnp.float16))


def _ggml_affine(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    low, high = blocks.extremes(w, block)
    ends = jnp.maximum(high, -low)
    scale = _float16_range(exact.divide(high - low, fmt.max), ends)
    offset = _float16_range(low, ends)
    codes = blocks.apply(
        lambda x, s, o: _truncate(exact.rounded((x - o) * s) + 0.5, fmt),
        w,
        block,
        reciprocal(scale),
        low,
    )
    return Rounded(codes, narrow(scale, jnp.float16), offset=narrow(offset, jnp.float16))


def _half_away(x: jax.Array) -> jax.Array:
    return jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO)


def _truncate(x: jax.Array, fmt: Format) -> jax.Array:
    """Unsigned codes of a positive x: its integer part, at most the largest of the format."""
    return jnp.minimum(x, fmt.max - fmt.min).astype(jnp.uint8)


def _float16_range(x: jax.Array, block_value: jax.Array) -> jax.Array:
    """Float32 `x`, saturated where float16 ends; NaN where `block_value` is not finite."""
    top = float(jnp.finfo(jnp.float16).max)
    return jnp.where(jnp.isfinite(block_value), jnp.clip(x, -top, top), jnp.nan)


def _ggml_ternary(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    largest = blocks.largest(w, block)
    scale = _float16_range(largest, largest)
    codes = blocks.apply(
        lambda x, s: (_half_away(x * s).clip(-1, 1) + 1).astype(jnp.uint8),
        w,
        block,
        reciprocal(scale),
    )
    return Rounded(codes, narrow(scale, jnp.float16))


def _ggml_mxfp4(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    """The exponent of OCP's rule. Halfway the smaller magnitude is taken, and +0 for -0."""
    largest = blocks.largest(w, block)
    scale = microscaling.power_of_two(largest, fmt)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    middles = (values[:-1] + values[1:]) / 2

    def encode(x: jax.Array, inverse: jax.Array) -> jax.Array:
        size = jnp.abs(x) * inverse
        nearest = sum((jnp.where(size > m, s, 0.0) for m, s in steps), jnp.zeros_like(x))
        return jnp.where((x < 0) & (nearest > 0), -nearest, nearest).astype(jnp.float4_e2m1fn)

    steps = list(zip(middles.tolist(), np.diff(values).tolist(), strict=True))
    return Rounded(blocks.apply(encode, w, block, microscaling.inverse(scale)), scale)


def _ggml_super(w: jax.Array, fmt: Format, block: blocks.Block) -> Rounded:
    """Super-blocks whose groups' scales (and minima) have codes of their own; and IQ4_NL."""
    axis = next(a for a, b in enumerate(block) if b > 1)
    group, size = block[axis], 32 if fmt.name == "iq4_nl" else 256
    moved = jnp.moveaxis(w, axis, 0)
    shape = (w.shape[axis] // size, size // group, group, moved.size // w.shape[axis])
    x = moved.reshape(shape).transpose(2, 0, 1, 3)

    def back(value: jax.Array) -> jax.Array:
        """[super-block, (group, (element,)) column] as an array like w."""
        return jnp.moveaxis(value.reshape(-1, *moved.shape[1:]), 0, axis)

    def codes_of(found: kquants.Affine | kquants.Symmetric) -> jax.Array:
        return back(found.codes.transpose(1, 2, 0, 3))

    if fmt.name in kquants.AFFINE_RULES:
        found = kquants.affine(x, kquants.AFFINE_RULES[fmt.name])
        scale = Rounded(back(found.scales), back(found.d))
        return Rounded(codes_of(found), scale, offset=Rounded(back(found.mins), back(-found.dmin)))
    found = kquants.SYMMETRIC[fmt.name](x)
    if found.scales is None:
        return Rounded(codes_of(found), back(found.d))
    return Rounded(codes_of(found), Rounded(back(found.scales), back(found.d)))


GGML_METHODS = {
    "q8_0": _ggml_symmetric,
    "q4_0": _ggml_signed,
    "q5_0": _ggml_signed,
    "q4_1": _ggml_affine,
    "q5_1": _ggml_affine,
    "q2_k": _ggml_super,
    "q3_k": _ggml_super,
    "q4_k": _ggml_super,
    "q5_k": _ggml_super,
    "q6_k": _ggml_super,
    "iq4_nl": _ggml_super,
    "iq4_xs": _ggml_super,
    "tq1_0": _ggml_ternary,
    "tq2_0": _ggml_ternary,
    "mxfp4": _ggml_mxfp4,
}
