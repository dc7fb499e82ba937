"""HQQ: half-quadratic quantization, from the weight alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax import blocks, quantizing
from qjax.algorithms.base import Algorithm, Notes, Stats
from qjax.algorithms.grid import AXIS, nearest
from qjax.formats import FORMATS, split_planes
from qjax.qtensor import QTensor
from qjax.scaling import reciprocal, saturate
from qjax.spec import Spec


def hqq(p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20) -> Algorithm:
    """HQQ: moves the zero point of each block to where it leaves the least sum |w - w_q|^p.

    With the scale s of min-max kept, and in turn (Badri and Shaji, "Half-Quadratic Quantization of
    Large Machine Learning Models", 2023, equations 5 to 8)

        w_q = (round(w / s + z) - z) * s
        e = sign(w - w_q) * max(|w - w_q| - |w - w_q|^(p - 1) / beta, 0)
        z = mean over the block of round(w / s + z) - (w - e) / s
        beta = beta * kappa

    p < 1 lets a few elements be far off, as outliers are, for the sake of the others. Each block
    keeps the zero point of its best iterate, the start included, after it was rounded to the dtype
    of the scale.

    Args:
      p: the power of the error.
      beta: how close e stays to the error, at first.
      kappa: its growth per iteration.
      iterations: how many.

    Returns:
      An Algorithm that needs no statistics, and of the Spec an asymmetric integer ("uint4_g64").
      The QTensor has float zero points. Its notes: "start_error" and "error", the mean of
      |w - w_q|^p at first and at last.

    Deviations: the best iterate is chosen block by block; the authors' code stops all blocks as
    soon as the mean error grows. The first zero point is not rounded.

    Example:
      >>> w = jax.random.t(jax.random.key(0), 3.0, (128, 16))
      >>> q, notes = qjax.hqq().quantize(w, qjax.Spec.parse("uint4_g64"), qjax.Stats())
      >>> q.zero_point.dtype.name, bool(notes["error"] < notes["start_error"])
      ('float16', True)
    """
    if not 0 < p <= 1:
        raise ValueError(f"hqq: p must be above 0 and at most 1, got {p}; the paper's is 0.7")

    def quantize(w: jax.Array, spec: Spec, stats: Stats) -> tuple[QTensor, Notes]:
        if spec.symmetric or not FORMATS[spec.format].integer or spec.scale_spec is not None:
            raise ValueError(
                f"hqq moves zero points, and {spec} has none; give an asymmetric integer such as "
                "uint4_g64 or int8_g64_asym"
            )
        return _quantize(w, spec._replace(zero_dtype=None), p, beta, kappa, iterations)

    options = f"{p}, {beta}, {kappa}, {iterations}"
    return Algorithm("hqq", frozenset(), False, quantize, options=options)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantize(
    w: jax.Array, spec: Spec, p: float, beta: float, kappa: float, iterations: int
) -> tuple[QTensor, Notes]:
    fmt = FORMATS[spec.format]
    block = quantizing.block_of(spec, w.shape, (AXIS,))
    q, _, _ = nearest(w, spec)
    exact = w.astype(jnp.float32)
    assert isinstance(q.scale, jax.Array)
    scale, inverse = q.scale.astype(jnp.float32), reciprocal(q.scale)
    low, _ = blocks.extremes(exact, block)
    counts = blocks.totals(jnp.ones_like(exact), block)

    def held(zero: jax.Array) -> jax.Array:
        return saturate(zero, spec.scale_dtype).astype(jnp.float32)

    def codes(zero: jax.Array) -> jax.Array:
        nearest = lambda x, s, z: jnp.clip(jnp.round(x * s + z), fmt.min, fmt.max)
        return blocks.apply(nearest, exact, block, inverse, zero)

    def errors(codes: jax.Array, zero: jax.Array) -> jax.Array:
        values = blocks.apply(lambda c, s, z: (c - z) * s, codes, block, scale, zero)
        return exact - values

    def objective(zero: jax.Array) -> jax.Array:
        return blocks.totals(_power(errors(codes(zero), zero), p), block)

    def step(i: int, state: tuple) -> tuple:
        zero, beta, best, least = state
        chosen = codes(zero)
        e = errors(chosen, zero)
        size = jnp.abs(e)
        shrunk = jnp.sign(e) * jnp.maximum(size - _power(size, p - 1) / beta, 0)
        ideal = blocks.apply(jnp.multiply, exact - shrunk, block, inverse)
        zero = held(blocks.totals(chosen - ideal, block) / counts)
        found = objective(zero)
        best = jnp.where(found < least, zero, best)
        return zero, beta * kappa, best, jnp.minimum(found, least)

    start = held(fmt.min - low * inverse)
    first = objective(start)
    state = (start, jnp.float32(beta), start, first)
    _, _, zero, least = lax.fori_loop(0, iterations, step, state)
    stored = split_planes(fmt, fmt.encode(codes(zero)))
    zero = zero.astype(spec.scale_dtype)
    q = dataclasses.replace(q, qvalue=stored, zero_point=zero, offset=None)
    return q, {"start_error": jnp.sum(first) / w.size, "error": jnp.sum(least) / w.size}


def _power(x: jax.Array, p: float) -> jax.Array:
    """|x|^p, of 0 the smallest number's: its negative powers are large, not infinite."""
    return jnp.maximum(jnp.abs(x), 1e-30) ** p
