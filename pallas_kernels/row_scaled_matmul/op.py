"""row_scaled_matmul: the op as it is called, with its checks and its vmap."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped
from pallas_kernels.row_scaled_matmul.problem import Problem
from pallas_kernels.sharded import BLOCK, Cut, on_mesh

CODES = jnp.float8_e4m3fn


def row_scaled_matmul(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    *,
    out: Any = jnp.bfloat16,
    implementation: str | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`y[i, j] = a_scale[i] * b_scale[j] * sum over k of a[i, k] * b[j, k]`.

    For products that are only stored: cuBLASLt as XLA calls it takes one scale per operand, and
    scales of rows and columns cost it a pass over the result. Tensor cores sum all of k, as they do
    for cuBLASLt. Not differentiable; under `vmap` it is a loop on the device. Under Auto mesh axes
    m, n and k are sharded as the operands are.

    Args:
      a: E4M3 `[m, k]`.
      a_scale: float32 `[m]`.
      b: E4M3 `[n, k]`.
      b_scale: float32 `[n]`.
      out: dtype of the result.
      implementation: a name in `IMPLEMENTATIONS["row_scaled_matmul"]`, taken or refused; None for
        the best that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      `[m, n]`.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run this.
    """
    whole = _problem(a, a_scale, b, b_scale, jnp.dtype(out).name)

    def run(*operands: jax.Array, out: str = whole.out) -> jax.Array:
        k, (m, n) = operands[0].shape[1], (operands[i].shape[0] for i in (0, 2))
        problem = Problem(m, n, k, out)
        name = choose("row_scaled_matmul", problem, device, implementation)
        return IMPLEMENTATIONS["row_scaled_matmul"][name].run(*operands, problem)

    def part(cut: Cut, *operands: jax.Array) -> jax.Array:
        if "k" not in cut:
            return run(*operands)
        return lax.psum(run(*operands, out="float32"), cut["k"]).astype(whole.out)

    if any(size % BLOCK for size in (whole.m, whole.n, whole.k)):
        return looped(run)(a, a_scale, b, b_scale)
    placed = on_mesh(run, ("m k", "m", "n k", "n"), ("m n",), part, "k")
    return looped(placed)(a, a_scale, b, b_scale)


def _problem(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, out: str
) -> Problem:
    given = ", ".join(f"{v.dtype}{list(v.shape)}" for v in (a, a_scale, b, b_scale))
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]
    if not fits or a_scale.shape != a.shape[:1] or b_scale.shape != b.shape[:1]:
        raise ValueError(
            f"row_scaled_matmul: a [m, k] and b [n, k] share k, and scales are [m] and [n]; given "
            f"are {given}"
        )
    dtypes = [jnp.dtype(v) for v in (CODES, jnp.float32)] * 2
    if [v.dtype for v in (a, a_scale, b, b_scale)] != dtypes:
        raise ValueError(
            f"row_scaled_matmul: codes must be {CODES.__name__} and scales float32; given are "
            f"{given}"
        )
    return Problem(a.shape[0], b.shape[0], a.shape[1], out)
