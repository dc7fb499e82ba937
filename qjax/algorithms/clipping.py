"""The range of each block that leaves the least weighted error, by search."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.algorithms.grid import nearest
from qjax.qtensor import dequantize
from qjax.spec import Spec

_SHRINKS = np.linspace(0.96, 0.32, 17, dtype=np.float32)
_ENDS = np.linspace(0.04, 0.4, 10, dtype=np.float32)


def plain(spec: Spec) -> Spec:
    """`spec` with scales straight from a block's range, in place of a search of its own."""
    if spec.scale_method != "mse":
        return spec
    return spec._replace(scale_method="absmax" if spec.symmetric else "minmax")


def clipped(x: jax.Array, weight: jax.Array, spec: Spec) -> jax.Array:
    """One block per output, x `[block, out]`, clipped so that rounding it loses least.

    The error of an output is sum_k weight_k (x_k - q_k)^2, with the scale that `plain(spec)` makes
    of the clipped block. Both ends move inwards together, 1, 0.96 ... 0.32 of the way; of an
    asymmetric format then each end alone.

    Args:
      x: float32 `[block, out]`.
      weight: `[block]`, not negative.
      spec: one whose block along `in` is at least that of x.
    """
    spec = plain(spec)
    low, high = jnp.min(x, 0, keepdims=True), jnp.max(x, 0, keepdims=True)
    if spec.symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    width = high - low

    def error(low: jax.Array, high: jax.Array) -> jax.Array:
        q = nearest(x, spec, jnp.clip(x, low, high))[0]
        return jnp.sum(weight[:, None] * jnp.square(x - dequantize(q)), 0, keepdims=True)

    def search(
        start: tuple[jax.Array, ...],
        move: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        factors: np.ndarray,
    ) -> tuple[jax.Array, ...]:
        def step(best: tuple[jax.Array, ...], factor: jax.Array) -> tuple[Any, None]:
            ends = move(start[1], start[2], factor)
            found = (error(*ends), *ends)
            better = found[0] < best[0]
            return tuple(jnp.where(better, n, o) for n, o in zip(found, best, strict=True)), None

        return lax.scan(step, start, jnp.asarray(factors))[0]

    middle = (low + high) / 2
    best = (error(low, high), low, high)
    shrunk = lambda low, high, f: (middle - width / 2 * f, middle + width / 2 * f)
    best = search(best, shrunk, _SHRINKS)
    if not spec.symmetric:
        best = search(best, lambda low, high, f: (low + width * f, high), _ENDS)
        best = search(best, lambda low, high, f: (low, high - width * f), _ENDS)
    return jnp.clip(x, best[1], best[2])
