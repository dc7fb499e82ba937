"""gated: the op as it is called, with its checks."""

import jax
import jax.numpy as jnp

from pallas_kernels.definition import instead
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.gated import reference
from pallas_kernels.gated.problem import Problem


def gated(
    gate: jax.Array,
    up: jax.Array,
    activation: str,
    *,
    implementation: str | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`activation(gate) * up`.

    Args:
      gate, up: floating point `[rows, width]` of one dtype.
      activation: a name in `reference.ACTIVATIONS`.
      implementation: a name in `IMPLEMENTATIONS["gated"]`, taken or refused; None for the best that
        supports the problem.
      device: where it will run; None for the default device.

    Returns:
      The product, in their dtype.

    Raises:
      ValueError: if shapes, dtypes or names do not fit, or the implementation cannot run this.
    """
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            "gated: gate and up must be [rows, width] of one dtype, are "
            f"{gate.dtype}{list(gate.shape)} and {up.dtype}{list(up.shape)}"
        )
    if activation not in reference.ACTIVATIONS or not jnp.issubdtype(gate.dtype, jnp.floating):
        raise ValueError(
            f"gated: takes floats and {', '.join(reference.ACTIVATIONS)}, not {gate.dtype} and "
            f"{activation!r}"
        )
    problem = Problem(gate.shape[0], gate.shape[1], activation, gate.dtype.name)
    name = choose("gated", problem, device, implementation)
    if name == "reference":
        return reference.run(gate, up, problem=problem)
    return instead(IMPLEMENTATIONS["gated"][name].run, reference.run, problem, (gate, up))
