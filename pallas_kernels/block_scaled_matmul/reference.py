"""The definition: dequantize in float32, one dot in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem
from pallas_kernels.frame import Device


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, problem: Problem
) -> jax.Array:
    """`dequantize(a) @ dequantize(b)^T`."""
    rows = lambda scale: jnp.repeat(scale.T, BLOCK, axis=1)
    tiles = lambda scale: jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)[: problem.n]
    wide = a.astype(jnp.float32) * rows(a_scale)
    other = b.astype(jnp.float32) * (rows if problem.b_rows else tiles)(b_scale)
    contract = (((1,), (1,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(wide, other, contract, precision=highest).astype(problem.out)
