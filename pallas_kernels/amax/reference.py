"""The definition, in jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.amax.problem import Problem
from pallas_kernels.frame import Device


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(x: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Of rows and of columns; see `op.amax`."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)
    return jnp.max(magnitude, axis=1, initial=0), jnp.max(magnitude, axis=0, initial=0)
