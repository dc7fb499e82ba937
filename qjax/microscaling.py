"""How the scales of block-scaled floats are chosen: powers of two (MX), and NVFP4's two levels."""

import jax
import jax.numpy as jnp
from jax import lax

from qjax import blocks, exact
from qjax.formats import FORMATS, Format
from qjax.scaling import Rounded, round_scale
from qjax.spec import Spec


def _never(fmt: Format) -> float:
    return 2.0


def _rounds_up(fmt: Format) -> float:
    """Halfway between the largest mantissa and 2; compressed-tensors takes 1.75 for E4M3."""
    return 1.75 if fmt.max == 448 else (_top(fmt)[1] + 2) / 2


def _saturates(fmt: Format) -> float:
    """The next mantissa of a float32 after the largest one."""
    return _top(fmt)[1] + 2.0**-23


# How large the mantissa of a block's maximum must be to take its exponent one up.
MX_RULES = {"mx_floor": _never, "mx_even": _rounds_up, "mx_ceil": _saturates}


def mx(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """OCP's MX: scale = 2^(floor(log2(max|w|)) - exponent of the largest code).

    "mx_floor" is that rule (OCP Microscaling Formats v1.0, section 6.3; llama.cpp): what lies
    beyond the largest code saturates. "mx_even" doubles the scale where the maximum, rounded as the
    elements are, would be the next power of two (compressed-tensors). "mx_ceil" doubles it where
    the maximum would saturate (ModelOpt, torchao's RCEIL). Codes are the nearest ones, half to
    even.
    """
    return mx_for(w, spec, block, blocks.largest(w, block), spec.scale_method)


def mx_for(w: jax.Array, spec: Spec, block: blocks.Block, largest: jax.Array, rule: str) -> Rounded:
    """As `mx`, for blocks whose maximum is taken to be `largest`."""
    fmt = FORMATS[spec.format]
    scale = power_of_two(largest, fmt, MX_RULES[rule](fmt))
    return Rounded(
        blocks.apply(lambda x, s: fmt.encode(x * s), w, block, inverse(scale)),
        scale.astype(spec.scale_dtype),
    )


def power_of_two(largest: jax.Array, fmt: Format, threshold: float = 2.0) -> jax.Array:
    """The E8M0 scale that takes the exponent of `largest` to that of the largest code.

    One more where the mantissa of `largest` is at least `threshold`; NaN where it is not finite.
    """
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    up = (bits & 0x7FFFFF) >= round((threshold - 1) * 2**23)
    exponent = _top(fmt)[0]
    biased = jnp.clip((bits >> 23) + up.astype(jnp.int32) - exponent, 0, 254 - exponent)
    biased = jnp.where(jnp.isfinite(largest), biased, 255).astype(jnp.uint8)
    return lax.bitcast_convert_type(biased, jnp.float8_e8m0fnu)


def inverse(scale: jax.Array) -> jax.Array:
    """1 / scale of E8M0, in float32; 0 for NaN.

    The division comes last so that XLA does not redo what precedes it for every element of a block.
    """
    biased = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32)
    normal = lax.bitcast_convert_type(jnp.maximum(biased, 1) << 23, jnp.float32)
    return jnp.where(biased == 0, 2.0, 1.0) / normal


def _top(fmt: Format) -> tuple[int, float]:
    """The exponent of the largest value, and its mantissa in [1, 2)."""
    exponent = 0
    while fmt.max >= 2.0 ** (exponent + 1):
        exponent += 1
    return exponent, fmt.max / 2.0**exponent


def nvfp4(w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block) -> Rounded:
    """NVFP4: E4M3 scales of blocks under a float32 of the whole weight.

    outer = max|w| / (6 * 448); scale = e4m3(max|block| / (6 * outer)), at least 2^-9, and 1 where a
    block is zero; codes = nearest of w / (scale * outer), half to even. To the bit what ModelOpt
    makes.
    """
    return nvfp4_for(w, spec, block, whole, blocks.largest(w, block))[0]


def nvfp4_for(
    w: jax.Array, spec: Spec, block: blocks.Block, whole: blocks.Block, largest: jax.Array
) -> tuple[Rounded, jax.Array]:
    """As `nvfp4`, for blocks whose maximum is taken to be `largest`; and the scales' values."""
    assert spec.scale_spec is not None
    fmt, inner = FORMATS[spec.format], FORMATS[spec.scale_spec.format]
    top = blocks.largest(w, whole)
    outer = round_scale(exact.divide(top, fmt.max * inner.max), top, "float32")
    smallest = 2.0**-9  # of E4M3

    def inner_scale(largest: jax.Array, outer: jax.Array) -> jax.Array:
        wanted = exact.divide(largest, jnp.where(outer == 0, 1, fmt.max * outer))
        wanted = jnp.clip(wanted, smallest, inner.max)
        return jnp.where(largest == 0, 1.0, wanted)

    def product(codes: jax.Array, outer: jax.Array) -> jax.Array:
        return inner.decode(codes, jnp.dtype(jnp.float32)) * outer

    per_scale = tuple(-(-n // b) for n, b in zip(whole, block, strict=True))
    scales = inner.encode(blocks.apply(inner_scale, largest, per_scale, outer))
    scale = blocks.apply(product, scales, per_scale, outer)
    codes = blocks.apply(
        lambda x, s: fmt.encode(exact.divide(x, jnp.where(s == 0, 1, s))), w, block, scale
    )
    return Rounded(codes, Rounded(scales, outer)), scale
