"""The definition, in jnp."""

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
        down, across = inverses
        codes = _codes(x * down[:, None], problem), _codes(x * across[None, :], problem)
        return codes[0], codes[1].T
    if problem.scales == "tile":
        view = x.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale, inverse = _scales(_largest(view, (1, 3)), problem)
        codes = _codes(view * inverse, problem).reshape(x.shape)
        return codes, codes.T, scale[:, 0, :, 0]
    along = x.reshape(rows, columns // BLOCK, BLOCK)
    scale, inverse = _scales(_largest(along, (2,)), problem)
    codes = _codes(along * inverse, problem).reshape(x.shape)
    down = x.reshape(rows // BLOCK, BLOCK, columns)
    turned_scale, inverse = _scales(_largest(down, (1,)), problem)
    turned = _codes(down * inverse, problem).reshape(x.shape)
    return codes, turned.T, scale[..., 0].T, turned_scale[:, 0]


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    magnitude = jnp.abs(x)
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    return jnp.max(magnitude, axis=axes, keepdims=True)


def _scales(top: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    largest = float(jnp.finfo(problem.dtype).max)
    top = jnp.maximum(top, SMALLEST)
    return top / largest, largest / top


def _codes(x: jax.Array, problem: Problem) -> jax.Array:
    largest = float(jnp.finfo(problem.dtype).max)
    return jnp.clip(x, -largest, largest).astype(problem.dtype)
