"""llama.cpp's searches for k-quants (`ggml-quants.c`, no importances), to the byte.

A super-block is 256 neighbors of a row in groups of 32 (or 16), each with a scale (and a minimum)
of a few bits under one float16. Arrays here are `x: [element of the group, super-block, group,
column]`. All arithmetic is float32 with one rounding per operation and sums taken in order of the
elements, as the C code compiled without fused multiply-adds has it.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.exact import divide, rounded

EPSILON = 1e-15  # groups below it are zeros


class Affine(NamedTuple):
    """x = code * (d * scale) - dmin * minimum."""

    codes: jax.Array
    scales: jax.Array
    mins: jax.Array
    d: jax.Array
    dmin: jax.Array


class Symmetric(NamedTuple):
    """x = (code - 32) * (d * scale)."""

    codes: jax.Array
    scales: jax.Array
    d: jax.Array


def affine(x: jax.Array, top: int, start: float, steps: int) -> Affine:
    """Q4_K (top 15, start -1, 20 steps) and Q5_K (top 31, start -0.5, 15 steps).

    Every group is fitted on its own, the scales and minima are rounded to six bits under the
    largest of the super-block, and the codes chosen once more under what those stand for.
    """
    magnitude = jnp.sqrt(_sum(rounded(x * x)) / x.shape[0])
    scale, low, codes = _fit_affine(x, magnitude + jnp.abs(x), top, start, steps)
    scales, d = _six_bits(scale)
    mins, dmin = _six_bits(low)
    step, floor = d[:, None] * scales, dmin[:, None] * mins
    again = jnp.clip(jnp.round((x + floor) / jnp.where(step == 0, 1, step)), 0, top)
    codes = jnp.where(step == 0, codes, again)
    d, dmin = (jnp.where(_finite(x), v, jnp.nan).astype(jnp.float16) for v in (d, dmin))
    return Affine(*(v.astype(jnp.uint8) for v in (codes, scales, mins)), d, dmin)


def symmetric(x: jax.Array) -> Symmetric:
    """Q6_K: a fit per group, scales rounded to int8 under the one of largest magnitude."""
    scale, codes = _fit_symmetric(x, 32)
    largest = _signed_extreme(scale, axis=1)
    empty = jnp.abs(largest) < EPSILON
    inverse = jnp.where(empty, 0, -128 / jnp.where(empty, 1, largest))
    d = _as_float16(jnp.where(empty, 0, 1 / jnp.where(empty, 1, inverse)))
    scales = jnp.minimum(jnp.round(inverse[:, None] * scale), 127)
    step = d[:, None] * scales
    again = jnp.clip(jnp.round(x / jnp.where(step == 0, 1, step)), -32, 31) + 32
    codes = jnp.where(step == 0, codes, again)
    codes = jnp.where(empty[:, None], 0, codes)
    d = jnp.where(_finite(x), d, jnp.nan).astype(jnp.float16)
    return Symmetric(codes.astype(jnp.uint8), scales.astype(jnp.int8), d)


def _fit_affine(
    x: jax.Array, weight: jax.Array, top: int, start: float, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted least squares of x by code * scale - minimum: (scale, minimum, codes) per group.

    The codes come from a range that is widened step by step. An improvement also moves the
    minimum that the later candidates start from, as in the C code.
    """
    low, high = jnp.minimum(jnp.min(x, axis=0), 0), jnp.max(x, axis=0)
    flat = high == low
    weights, weighted = _sum(weight), _sum(rounded(weight * x))

    def codes_of(numerator: jax.Array, low: jax.Array) -> jax.Array:
        inverse = numerator / jnp.where(flat, 1, high - low)
        return jnp.clip(jnp.round(inverse * (x - low)), 0, top)

    def error_of(codes: jax.Array, scale: jax.Array, low: jax.Array) -> jax.Array:
        error = rounded(scale * codes) + low - x
        return _sum(rounded(weight * (error * error)))

    first = jnp.float32(top)
    scale = 1 / (first / jnp.where(flat, 1, high - low))
    codes = codes_of(first, low)
    best = (error_of(codes, scale, low), scale, low, codes)

    def candidate(best: tuple, numerator: jax.Array) -> tuple[tuple, None]:
        error, scale, low, codes = best
        new = codes_of(numerator, low)
        l_, l2 = _sum(rounded(weight * new)), _sum(rounded(weight * new * new))
        xl = _sum(rounded(weight * new * x))
        determinant = rounded(weights * l2) - rounded(l_ * l_)
        divisor = jnp.where(determinant > 0, determinant, 1)
        new_scale = (rounded(weights * xl) - rounded(weighted * l_)) / divisor
        new_low = (rounded(l2 * weighted) - rounded(l_ * xl)) / divisor
        above = new_low > 0
        new_scale = jnp.where(above, xl / jnp.where(l2 > 0, l2, 1), new_scale)
        new_low = jnp.where(above, 0, new_low)
        new_error = error_of(new, new_scale, new_low)
        better = (determinant > 0) & (new_error < error)
        found = (new_error, new_scale, new_low, new)
        return tuple(jnp.where(better, n, b) for n, b in zip(found, best, strict=True)), None

    numerators = np.float32(start) + np.float32(0.1) * np.arange(steps + 1, dtype=np.float32)
    best, _ = jax.lax.scan(candidate, best, numerators + np.float32(top))
    _, scale, low, codes = best
    return jnp.where(flat, 0, scale), -low, jnp.where(flat, 0, codes)


def _fit_symmetric(x: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Least squares of x, weighted by x^2, by (code - top) * scale: (scale, codes) per group.

    The codes come from scales that put the extreme element from top - 0.9 to top + 0.9 below zero.
    """
    extreme = _signed_extreme(x, axis=0)
    empty = jnp.abs(extreme) < EPSILON
    divisor = jnp.where(empty, 1, extreme)
    weight = x * x

    def fit(numerator: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes = jnp.clip(jnp.round(numerator / divisor * x), -top, top - 1)
        return codes, _sum(rounded(weight * x * codes)), _sum(rounded(weight * codes * codes))

    codes, xl, l2 = fit(jnp.float32(-top))
    scale = jnp.where(l2 == 0, 0, xl / jnp.where(l2 == 0, 1, l2))
    best = (scale, scale * xl, codes)

    def candidate(best: tuple, numerator: jax.Array) -> tuple[tuple, None]:
        codes, xl, l2 = fit(numerator)
        better = (l2 > 0) & (xl * xl > best[1] * l2)
        scale = xl / jnp.where(l2 > 0, l2, 1)
        found = (scale, scale * xl, codes)
        return tuple(jnp.where(better, n, b) for n, b in zip(found, best, strict=True)), None

    steps = np.array([s for s in range(-9, 10) if s != 0], np.float32)
    numerators = -(np.float32(top) + np.float32(0.1) * steps)
    (scale, _, codes), _ = jax.lax.scan(candidate, best, numerators)
    return jnp.where(empty, 0, scale), jnp.where(empty, 0, codes + top)


def _six_bits(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Groups' values as codes 0 to 63 under d, a float16 per super-block, both in float32."""
    largest = jnp.maximum(jnp.max(value, axis=1), 0)
    inverse = jnp.where(largest > 0, 63 / jnp.where(largest > 0, largest, 1), 0)
    codes = jnp.clip(jnp.round(inverse[:, None] * value), 0, 63)
    return codes, _as_float16(divide(largest, 63.0))


def _as_float16(d: jax.Array) -> jax.Array:
    """Float32 `d`, saturated and rounded to what float16 holds."""
    top = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(d, -top, top).astype(jnp.float16).astype(jnp.float32)


def _finite(x: jax.Array) -> jax.Array:
    """Whether all elements of a super-block are."""
    return jnp.all(jnp.isfinite(x), axis=(0, 2))


def _signed_extreme(x: jax.Array, axis: int) -> jax.Array:
    """The first element of largest magnitude along an axis, with its sign."""
    first = jnp.argmax(jnp.abs(x), axis=axis, keepdims=True)
    return jnp.squeeze(jnp.take_along_axis(x, first, axis=axis), axis)


def _sum(x: jax.Array) -> jax.Array:
    """The sum along the first axis, in order."""
    return functools.reduce(operator.add, [x[i] for i in range(x.shape[0])])
