"""The definition, in jnp."""

from collections.abc import Callable, Mapping

import jax

from pallas_kernels.frame import Device
from pallas_kernels.gated.problem import Problem

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(gate: jax.Array, up: jax.Array, *, problem: Problem) -> jax.Array:
    """See `op.gated`."""
    return ACTIVATIONS[problem.activation](gate) * up
