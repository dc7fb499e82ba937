"""llama.cpp's searches for k-quants (`ggml-quants.c`, no importances), to the byte.

A super-block is 256 neighbors of a row in groups of 32 (or 16), each with a scale (and a minimum)
of a few bits under one float16. Arrays here are `x: [element of the group, super-block, group,
column]`. All arithmetic is float32 with one rounding per operation and sums taken in order of the
elements, as the C code compiled without fused multiply-adds has it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    magnitude = jnp.sqrt(_sums(lambda x: (x * x,), x)[0] / x.shape[0])
    scale, low, codes = _fit_affine(x, magnitude[None] + jnp.abs(x), top, start, steps)
    scales, d = _six_bits(scale)
    mins, dmin = _six_bits(low)
    step, floor = (d[:, None] * scales)[None], (dmin[:, None] * mins)[None]
    again = jnp.clip(jnp.round((x + floor) / jnp.where(step == 0, 1, step)), 0, top)
    codes = jnp.where(step == 0, codes, again)
    good = _finite(x) & jnp.all(jnp.isfinite(scale), axis=1)
    d, dmin = (jnp.where(good, v, jnp.nan).astype(jnp.float16) for v in (d, dmin))
    codes, scales, mins = (v.astype(jnp.uint8) for v in (codes, scales, mins))
    return Affine(codes, scales, mins, d, dmin)


def symmetric(x: jax.Array) -> Symmetric:
    """Q6_K: a fit per group, scales rounded to int8 under the one of largest magnitude."""
    scale, codes = _fit_symmetric(x, 32)
    largest = _signed_extreme(scale, axis=1)
    empty = jnp.abs(largest) < EPSILON
    inverse = jnp.where(empty, 0, -128 / jnp.where(empty, 1, largest))
    d = _as_float16(jnp.where(empty, 0, 1 / jnp.where(empty, 1, inverse)))
    scales = jnp.minimum(jnp.round(inverse[:, None] * scale), 127)
    step = (d[:, None] * scales)[None]
    again = jnp.clip(jnp.round(x / jnp.where(step == 0, 1, step)), -32, 31) + 32
    codes = jnp.where(step == 0, codes, again)
    codes = jnp.where(empty[None, :, None], 0, codes)
    d = jnp.where(_finite(x), d, jnp.nan).astype(jnp.float16)
    return Symmetric(codes.astype(jnp.uint8), scales.astype(jnp.int8), d)


class _AffineFit(NamedTuple):
    """A candidate: its error, scale and minimum, and the range that its codes came from."""

    error: jax.Array
    scale: jax.Array
    low: jax.Array
    inverse: jax.Array
    start: jax.Array


class _SymmetricFit(NamedTuple):
    """A candidate: how much error it takes away, its scale, and what its codes came from."""

    gain: jax.Array
    scale: jax.Array
    inverse: jax.Array


def _fit_affine(
    x: jax.Array, weight: jax.Array, top: int, start: float, steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted least squares of x by code * scale - minimum: (scale, minimum, codes) per group.

    The codes come from a range that is widened step by step. An improvement also moves the
    minimum that the later candidates start from, as in the C code.
    """
    low, high = jnp.minimum(jnp.min(x, axis=0), 0), jnp.max(x, axis=0)
    flat = high == low
    weights, weighted = _sums(lambda x, w: (w, w * x), x, weight)

    def inverse_of(numerator: jax.Array, low: jax.Array) -> jax.Array:
        return numerator / jnp.where(flat, 1, high - low)

    def codes_of(x: jax.Array, inverse: jax.Array, low: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(inverse * (x - low)), 0, top)

    def error_of(inverse: jax.Array, start: jax.Array, scale: jax.Array, low: jax.Array):
        def term(x: jax.Array, w: jax.Array) -> tuple[jax.Array]:
            error = rounded(scale * codes_of(x, inverse, start)) + low - x
            return (w * (error * error),)

        return _sums(term, x, weight)[0]

    def moments(x: jax.Array, w: jax.Array, inverse: jax.Array, low: jax.Array):
        codes = codes_of(x, inverse, low)
        return w * codes, w * codes * codes, w * codes * x

    def candidate(best: _AffineFit, numerator: jax.Array) -> tuple[_AffineFit, None]:
        inverse = inverse_of(numerator, best.low)
        l1, l2, xl = _sums(lambda x, w: moments(x, w, inverse, best.low), x, weight)
        determinant = rounded(weights * l2) - rounded(l1 * l1)
        divisor = jnp.where(determinant > 0, determinant, 1)
        scale = (rounded(weights * xl) - rounded(weighted * l1)) / divisor
        low = (rounded(l2 * weighted) - rounded(l1 * xl)) / divisor
        above = low > 0
        scale = jnp.where(above, xl / jnp.where(l2 > 0, l2, 1), scale)
        low = jnp.where(above, 0, low)
        found = _AffineFit(error_of(inverse, best.low, scale, low), scale, low, inverse, best.low)
        return _where((determinant > 0) & (found.error < best.error), found, best), None

    inverse = inverse_of(jnp.float32(top), low)
    scale = 1 / inverse
    first = _AffineFit(error_of(inverse, low, scale, low), scale, low, inverse, low)
    numerators = np.float32(start) + np.float32(0.1) * np.arange(steps + 1, dtype=np.float32)
    best, _ = jax.lax.scan(candidate, first, jnp.asarray(numerators + np.float32(top)))
    codes = codes_of(x, best.inverse[None], best.start[None])
    return jnp.where(flat, 0, best.scale), -best.low, jnp.where(flat[None], 0, codes)


def _fit_symmetric(x: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Least squares of x, weighted by x^2, by (code - top) * scale: (scale, codes) per group.

    The codes come from scales that put the extreme element from top - 0.9 to top + 0.9 below zero.
    """
    extreme = _signed_extreme(x, axis=0)
    empty = jnp.abs(extreme) < EPSILON
    divisor = jnp.where(empty, 1, extreme)

    def codes_of(x: jax.Array, inverse: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(inverse * x), -top, top - 1)

    def moments(x: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = codes_of(x, inverse)
        return x * x * x * codes, x * x * codes * codes

    def candidate(best: _SymmetricFit, numerator: jax.Array) -> tuple[_SymmetricFit, None]:
        inverse = numerator / divisor
        xl, l2 = _sums(lambda x: moments(x, inverse), x)
        scale = xl / jnp.where(l2 > 0, l2, 1)
        better = (l2 > 0) & (xl * xl > best.gain * l2)
        return _where(better, _SymmetricFit(scale * xl, scale, inverse), best), None

    inverse = jnp.float32(-top) / divisor
    xl, l2 = _sums(lambda x: moments(x, inverse), x)
    scale = jnp.where(l2 == 0, 0, xl / jnp.where(l2 == 0, 1, l2))
    steps = np.array([s for s in range(-9, 10) if s != 0], np.float32)
    numerators = -(np.float32(top) + np.float32(0.1) * steps)
    best, _ = jax.lax.scan(
        candidate, _SymmetricFit(scale * xl, scale, inverse), jnp.asarray(numerators)
    )
    codes = codes_of(x, best.inverse[None]) + top
    return jnp.where(empty, 0, best.scale), jnp.where(empty[None], 0, codes)


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


def _sums(terms: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of products along the first axis, in order; `terms` gives those of one element."""

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        new = terms(*(a[i] for a in arrays))
        return tuple(s + rounded(t) for s, t in zip(sums, new, strict=True))

    zeros = jnp.zeros_like(arrays[0][0])
    count = len(jax.eval_shape(terms, *(a[0] for a in arrays)))
    return jax.lax.fori_loop(0, arrays[0].shape[0], add, (zeros,) * count)


def _where(condition: jax.Array, new: tuple, old: tuple) -> Any:
    return type(old)(*(jnp.where(condition, n, o) for n, o in zip(new, old, strict=True)))
