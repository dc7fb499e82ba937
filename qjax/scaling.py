"""What choosing a scale has in common, whatever the rule: rounding it, and dividing by it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qjax.formats.floating import narrow


class Rounded(NamedTuple):
    """Joined codes and what undoes them.

    `scale`, `zero_point` and `offset` have one value per block. A scale or offset that is itself
    `Rounded` is held as `Spec.scale_spec` says. `inverse` is what the rule multiplied a block with
    before it took the nearest codes; None where it did something else.
    """

    codes: jax.Array
    scale: "jax.Array | Rounded"
    zero_point: jax.Array | None = None
    offset: "jax.Array | Rounded | None" = None
    inverse: jax.Array | None = None


def round_scale(scale: jax.Array, block_value: jax.Array, dtype: str) -> jax.Array:
    """`scale` in `dtype`, saturated.

    Below the smallest normal float32 it is 0: the block decodes to zeros, or to its offset. Where
    `block_value`, taken from all of a block, is not finite, or the reciprocal of the scale is no
    normal float32, it is NaN, so that a bad weight can never look like a number.
    """
    if dtype == "float8_e8m0fnu":
        raise ValueError(
            'scale_dtype "float8_e8m0fnu" holds powers of two: choose them by scale_method '
            '"mx_floor", "mx_even", "mx_ceil" or "mse"'
        )
    tiny = float(jnp.finfo(jnp.float32).tiny)
    good = jnp.isfinite(block_value) & (scale <= 1 / tiny)
    scale = saturate(jnp.where(scale < tiny, 0, scale), dtype)
    return jnp.where(good, scale, jnp.asarray(jnp.nan, dtype))


def saturate(x: jax.Array, dtype: str) -> jax.Array:
    """`x` in `dtype`, its largest finite value where x lies beyond."""
    top = float(jnp.finfo(dtype).max)
    return narrow(jnp.clip(x, -top, top), dtype)


def reciprocal(scale: jax.Array) -> jax.Array:
    """1 / scale, 0 where it is 0; the division comes last so that XLA does not redo what precedes
    it for every element of a block.
    """
    scale = scale.astype(jnp.float32)
    return 1 / jnp.where(scale == 0, jnp.inf, scale)
