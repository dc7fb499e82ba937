"""llama.cpp's searches for k-quants and IQ4 (`ggml-quants.c`, no importances), to the byte.

A super-block is 256 neighbors of a row in groups of 32 (or 16), each with a scale (and a minimum)
of a few bits under one float16. Arrays here are `x: [element of the group, super-block, group,
column]`. All arithmetic is float32 with one rounding per operation and sums taken in order of the
elements, as the C code compiled without fused multiply-adds has it.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.exact import divide, rounded
from qjax.formats.codebook import IQ4_VALUES
from qjax.formats.floating import nearest

EPSILON = 1e-15  # groups below it are zeros


class Affine(NamedTuple):
    """x = code * (d * scale) - dmin * minimum."""

    codes: jax.Array
    scales: jax.Array
    mins: jax.Array
    d: jax.Array
    dmin: jax.Array


class Symmetric(NamedTuple):
    """x = value of the code * (d * scale)."""

    codes: jax.Array
    scales: jax.Array | None
    d: jax.Array


class AffineRule(NamedTuple):
    """How a type with scales and minima is searched.

    Codes are 0 to `top`, those of scales and minima 0 to `sub_top`. The range that codes come from
    is widened in `steps` steps of 0.1 from `start` on. `absolute`: errors are magnitudes weighted
    by |x|, otherwise squares weighted by |x| plus the root mean square of the group.
    """

    top: int
    sub_top: int
    start: float
    steps: int
    absolute: bool


AFFINE_RULES = {
    "q2_k": AffineRule(3, 15, -0.5, 15, True),
    "q4_k": AffineRule(15, 63, -1.0, 20, False),
    "q5_k": AffineRule(31, 63, -0.5, 15, False),
}


def affine(x: jax.Array, rule: AffineRule) -> Affine:
    """Q2_K, Q4_K and Q5_K.

    Every group is fitted on its own, the scales and minima are rounded to a few bits under the
    largest of the super-block, and the codes chosen once more under what those stand for.
    """
    weight = jnp.abs(x)
    if not rule.absolute:
        weight += jnp.sqrt(_sums(lambda x: (x * x,), x)[0] / x.shape[0])[None]
    scale, low, codes = _fit_affine(x, weight, rule)
    scales, d = _under_largest(scale, rule.sub_top)
    mins, dmin = _under_largest(low, rule.sub_top)
    step, floor = (d[:, None] * scales)[None], (dmin[:, None] * mins)[None]
    again = divide(x + floor, jnp.where(step == 0, 1, step))
    again = jnp.clip(jnp.round(again), 0, rule.top)
    codes = jnp.where(step == 0, codes, again)
    good = _finite(x) & jnp.all(jnp.isfinite(scale), axis=1)
    d, dmin = (jnp.where(good, v, jnp.nan).astype(jnp.float16) for v in (d, dmin))
    codes, scales, mins = (v.astype(jnp.uint8) for v in (codes, scales, mins))
    return Affine(codes, scales, mins, d, dmin)


def q6_k(x: jax.Array) -> Symmetric:
    """A fit per group, scales rounded to int8 under the one of largest magnitude."""
    scale, codes = _fit_symmetric(x, 32)
    largest = _signed_extreme(scale, axis=1)
    empty = jnp.abs(largest) < EPSILON
    inverse, d = _under_extreme(largest, empty, 128)
    scales = jnp.minimum(jnp.round(inverse[:, None] * scale), 127)
    codes = _again(x, d[:, None] * scales, codes - 32, 32) + 32
    codes = jnp.where(empty[None, :, None], 0, codes)
    d = jnp.where(_finite(x), d, jnp.nan).astype(jnp.float16)
    return Symmetric(codes.astype(jnp.uint8), scales.astype(jnp.int8), d)


def q3_k(x: jax.Array) -> Symmetric:
    """A fit per group, one code after the other; scales of six bits, held with a bias of 32."""
    scale, codes = _fit_by_element(x, 4)
    largest = _signed_extreme(scale, axis=1)
    empty = largest == 0
    inverse, d = _under_extreme(largest, empty, 32)
    scales = jnp.clip(jnp.round(inverse[:, None] * scale), -32, 31)
    scales = jnp.where(empty[:, None], -32, scales)
    codes = _again(x, d[:, None] * scales, codes, 4) + 4
    d = jnp.where(_finite(x), d, jnp.nan).astype(jnp.float16)
    return Symmetric(codes.astype(jnp.uint8), (scales + 32).astype(jnp.uint8), d)


def iq4_xs(x: jax.Array) -> Symmetric:
    """A fit of the table per group; scales of six bits, held with a bias of 32."""
    scale = _fit_table(x)
    d = -_signed_extreme(scale, axis=1) / 32
    inverse = _inverse(d)
    scales = jnp.clip(jnp.round(inverse[:, None] * scale), -32, 31)
    codes = _nearest_entry(_inverse(d[:, None] * scales)[None] * x)
    d = jnp.where(_finite(x), _as_float16(d), jnp.nan).astype(jnp.float16)
    return Symmetric(codes, (scales + 32).astype(jnp.uint8), d)


def iq4_nl(x: jax.Array) -> Symmetric:
    """A fit of the table for the one group of a block; its scale is `d`."""
    scale = _fit_table(x)
    codes = _nearest_entry(_inverse(scale)[None] * x)
    d = jnp.where(_finite(x), _as_float16(scale[:, 0]), jnp.nan).astype(jnp.float16)
    return Symmetric(codes, None, d)


SYMMETRIC = {"q3_k": q3_k, "q6_k": q6_k, "iq4_nl": iq4_nl, "iq4_xs": iq4_xs}


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
    x: jax.Array, weight: jax.Array, rule: AffineRule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted least squares of x by code * scale - minimum: (scale, minimum, codes) per group.

    The codes come from a range that is widened step by step. An improvement also moves the
    minimum that the later candidates start from, as in the C code.
    """
    top = rule.top
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
            return (w * (jnp.abs(error) if rule.absolute else error * error),)

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
    scale = 1 / rounded(inverse)
    first = _AffineFit(error_of(inverse, low, scale, low), scale, low, inverse, low)
    widened = np.float32(0.1) * np.arange(rule.steps + 1, dtype=np.float32)
    numerators = np.float32(rule.start) + widened
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


def _fit_by_element(x: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Least squares of x, weighted by x^2, by code * scale: (scale, codes) per group.

    From codes that take the extreme element to -top, five passes change one code after the other
    where that takes more error away. All of it on x times a power of two, so that the eighth powers
    that are compared do not underflow.
    """
    extreme = _signed_extreme(x, axis=0)
    empty = jnp.abs(extreme) < EPSILON
    biased = (jax.lax.bitcast_convert_type(extreme, jnp.int32) >> 23) & 255
    exponent = jnp.where(empty, 0, jnp.clip(biased - 127, -126, 126))
    power = lambda e: jax.lax.bitcast_convert_type((127 + e) << 23, jnp.float32)
    x, extreme = x * power(-exponent)[None], extreme * power(-exponent)
    inverse = -top / jnp.where(empty, 1, extreme)
    codes = jnp.clip(jnp.round(inverse[None] * x), -top, top - 1)
    sums = _sums(lambda x, code: (x * x * x * code, x * x * code * code), x, codes)

    def improve(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        codes, xl, l2 = state
        i = i % x.shape[0]
        value, old = x[i], codes[i]
        w = value * value
        rest_xl, rest_l2 = xl - rounded(w * value * old), l2 - rounded(w * old * old)
        new = value * rest_l2 / jnp.where(rest_xl > 0, rest_xl, 1)
        new = jnp.clip(jnp.round(new), -top, top - 1)
        new_xl = rest_xl + rounded(w * value * new)
        new_l2 = rest_l2 + rounded(w * new * new)
        better = (rest_xl > 0) & (new != old) & (new_l2 > 0)
        better &= new_xl * new_xl * l2 > xl * xl * new_l2
        codes = codes.at[i].set(jnp.where(better, new, old))
        return codes, jnp.where(better, new_xl, xl), jnp.where(better, new_l2, l2)

    codes, xl, l2 = jax.lax.fori_loop(0, 5 * x.shape[0], improve, (codes, *sums))
    scale = jnp.where(l2 > 0, xl / jnp.where(l2 > 0, l2, 1), 0) * power(exponent)
    return jnp.where(empty, 0, scale), jnp.where(empty[None], -top, codes)


_TABLE = np.array(IQ4_VALUES, np.float32)


def _fit_table(x: jax.Array) -> jax.Array:
    """Least squares of x, weighted by x^2, by table entries * scale: the scale per group.

    The entries come from scales that put the extreme element at the largest entry, and from 7 below
    to 7 above the smallest.
    """
    extreme = _signed_extreme(x, axis=0)
    empty = jnp.abs(extreme) < EPSILON
    divisor = jnp.where(empty, 1, extreme)

    def moments(x: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, w = jnp.asarray(_TABLE)[_nearest_entry(inverse * x)], x * x
        return w * q * x, w * q * q

    def candidate(best: tuple[jax.Array, ...], numerator: jax.Array):
        inverse = numerator / divisor
        qx, q2 = _sums(lambda x: moments(x, inverse), x)
        scale = qx / jnp.where(q2 > 0, q2, 1)
        better = (q2 > 0) & (qx * qx > best[0] * q2)
        return tuple(
            jnp.where(better, n, o) for n, o in zip((scale * qx, scale), best, strict=True)
        ), None

    inverse = 1 / rounded(divide(divisor, -float(_TABLE[0])))
    qx, q2 = _sums(lambda x: moments(x, inverse), x)
    scale = qx / q2
    numerators = np.arange(-7, 8, dtype=np.float32) + _TABLE[0]
    (_, scale), _ = jax.lax.scan(candidate, (scale * qx, scale), jnp.asarray(numerators))
    return jnp.where(empty, 0, scale)


def _nearest_entry(x: jax.Array) -> jax.Array:
    """Indices of the nearest entries of IQ4's table; halfway, the upper one."""
    pairs = itertools.pairwise(_TABLE)
    return sum(
        ((x - low >= high - x).astype(jnp.uint8) for low, high in pairs),
        jnp.zeros(x.shape, jnp.uint8),
    )


def _under_largest(value: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Groups' values as codes 0 to top under d, a float16 per super-block, both in float32."""
    largest = jnp.maximum(jnp.max(value, axis=1), 0)
    inverse = jnp.where(largest > 0, top / jnp.where(largest > 0, largest, 1), 0)
    codes = jnp.clip(jnp.round(inverse[:, None] * value), 0, top)
    return codes, _as_float16(divide(largest, float(top)))


def _under_extreme(largest: jax.Array, empty: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """What takes `largest` to -top, and its inverse as a float16 holds it."""
    inverse = jnp.where(empty, 0, -top / jnp.where(empty, 1, largest))
    return inverse, _as_float16(jnp.where(empty, 0, 1 / jnp.where(empty, 1, inverse)))


def _again(x: jax.Array, step: jax.Array, codes: jax.Array, top: int) -> jax.Array:
    """Codes -top to top - 1 under the steps that are held; where a step is 0, `codes`."""
    new = jnp.round(divide(x, jnp.where(step == 0, 1, step)[None]))
    new = jnp.clip(new, -top, top - 1)
    return jnp.where(step[None] == 0, codes, new)


def _inverse(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def _as_float16(d: jax.Array) -> jax.Array:
    """Float32 `d`, saturated and rounded to what float16 holds."""
    top = float(jnp.finfo(jnp.float16).max)
    return nearest(jnp.clip(d, -top, top), jnp.float16)


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
