"""The definition, in jnp."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cast_fp8.problem import BLOCK, SMALLEST, Problem
from pallas_kernels.frame import Device


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(x: jax.Array, *inverses: jax.Array, problem: Problem) -> tuple[jax.Array, ...]:
    """Codes, transposed codes, and the scales that were found; see `op.cast_fp8`."""
    rows, columns = problem.rows, problem.columns
    x = x.astype(jnp.float32)
    if problem.scales == "given":
        codes = _codes(x * inverses[0][:, None], problem)
        return (codes, *(_codes(x * across[None, :], problem).T for across in inverses[1:]))
    if problem.scales == "row":
        scale, inverse = scales_of(largest(x, (1,)), problem.dtype)
        return _codes(x * inverse, problem), scale[:, 0]
    if problem.scales == "tile":
        view = x.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale, inverse = scales_of(largest(view, (1, 3)), problem.dtype)
        codes = _codes(view * inverse, problem).reshape(x.shape)
        return codes, codes.T, scale[:, 0, :, 0]
    along = x.reshape(rows, columns // BLOCK, BLOCK)
    scale, inverse = scales_of(largest(along, (2,)), problem.dtype)
    codes = _codes(along * inverse, problem).reshape(x.shape)
    if not problem.turned:
        return codes, scale[..., 0].T
    down = x.reshape(rows // BLOCK, BLOCK, columns)
    turned_scale, inverse = scales_of(largest(down, (1,)), problem.dtype)
    turned = _codes(down * inverse, problem).reshape(x.shape)
    return codes, turned.T, scale[..., 0].T, turned_scale[:, 0]


def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`max |x|` over axes, which are kept with length 1; NaN counts as Inf."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    return jnp.max(magnitude, axis=axes, keepdims=True)


def scales_of(top: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The scales of what has the largest magnitudes `top`, and their reciprocals."""
    limit = float(jnp.finfo(dtype).max)
    top = jnp.maximum(top, SMALLEST)
    return top / limit, limit / top


def _codes(x: jax.Array, problem: Problem) -> jax.Array:
    limit = float(jnp.finfo(problem.dtype).max)
    return jnp.clip(x, -limit, limit).astype(problem.dtype)
