"""amax: the op as it is called, with its checks and its vmap."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.amax.problem import Problem
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped


def amax(
    x: jax.Array, *, implementation: str | None = None, device: Device | None = None
) -> tuple[jax.Array, jax.Array]:
    """`max |x|` of every row and of every column, from one read; NaN counts as Inf.

    XLA, asked for both, writes |x| in float32 between the two.

    Args:
      x: floating point `[r, c]`.
      implementation: a name in `IMPLEMENTATIONS["amax"]`, taken or refused; None for the best
        that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      float32 `[r]` and `[c]`.

    Raises:
      ValueError: if x is no such array, or the implementation cannot run this.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"amax: x must be floats [r, c], is {x.dtype}{list(x.shape)}")
    problem = Problem(x.shape[0], x.shape[1], x.dtype.name)
    name = choose("amax", problem, device, implementation)
    run = IMPLEMENTATIONS["amax"][name].run
    return looped(functools.partial(run, problem=problem))(x)
