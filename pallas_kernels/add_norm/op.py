"""add_norm: the op as it is called, with its checks."""

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import reference
from pallas_kernels.add_norm.problem import Problem
from pallas_kernels.definition import instead
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device


def add_norm(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    epsilon: float,
    *,
    implementation: str | None = None,
    device: Device | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`s = x + y` in their dtype, and `s / sqrt(mean(s ** 2) + epsilon) * scale`, in float32.

    Args:
      x, y: floating point `[rows, width]` of one dtype.
      scale: floats `[width]`.
      epsilon: as above.
      implementation: a name in `IMPLEMENTATIONS["add_norm"]`, taken or refused; None for the best
        that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      Both, in the dtype of x.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run this.
    """
    fits = x.ndim == 2 and x.shape == y.shape and scale.shape == x.shape[1:]
    if not fits or x.dtype != y.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "add_norm: x and y must be floats [rows, width] of one dtype and scale [width], are "
            f"{x.dtype}{list(x.shape)}, {y.dtype}{list(y.shape)} and {list(scale.shape)}"
        )
    problem = Problem(x.shape[0], x.shape[1], epsilon, x.dtype.name)
    name = choose("add_norm", problem, device, implementation)
    if name == "reference":
        return reference.run(x, y, scale, problem=problem)
    return instead(IMPLEMENTATIONS["add_norm"][name].run, reference.run, problem, (x, y, scale))
