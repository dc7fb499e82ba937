"""The definition: one dot in float32, then the scales."""

import jax
import jax.numpy as jnp

from pallas_kernels.frame import Device
from pallas_kernels.row_scaled_matmul.problem import Problem


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, problem: Problem
) -> jax.Array:
    """`(a @ b^T) * a_scale * b_scale`."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(a, b, contract, precision=jax.lax.Precision.HIGHEST)
    return (y * a_scale[:, None] * b_scale[None, :]).astype(problem.out)
