"""The definition, in jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.add_norm.problem import Problem
from pallas_kernels.frame import Device


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    """See `op.add_norm`."""
    total = x + y
    wide = total.astype(jnp.float32)
    root = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + problem.epsilon)
    return total, (wide * root * scale.astype(jnp.float32)[None]).astype(x.dtype)
