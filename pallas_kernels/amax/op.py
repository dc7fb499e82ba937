"""amax: the op as it is called, with its checks and its vmap."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.amax.problem import BLOCK, Problem
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped
from pallas_kernels.sharded import Cut, on_mesh


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

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        problem = Problem(x.shape[0], x.shape[1], x.dtype.name)
        name = choose("amax", problem, device, implementation)
        return IMPLEMENTATIONS["amax"][name].run(x, problem=problem)

    def part(cut: Cut, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        over = lambda top, axis: lax.pmax(top, cut[axis]) if axis in cut else top
        of_rows, of_columns = run(x)
        return over(of_rows, "c"), over(of_columns, "r")

    if x.shape[0] % BLOCK or x.shape[1] % BLOCK:
        return looped(run)(x)
    return looped(on_mesh(run, ("r c",), ("r", "c"), part))(x)
