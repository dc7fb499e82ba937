"""block_scaled_matmul: the op as it is called, with its checks and its vmap."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped
from pallas_kernels.sharded import Cut, on_mesh

CODES = jnp.float8_e4m3fn


def block_scaled_matmul(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    *,
    out: Any = jnp.bfloat16,
    implementation: str | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`y[i, j] = sum over blocks q of a_scale[q, i] * b_scale[..] * sum over k in q of a b`.

    The matmul of DeepSeek-V3 (arXiv:2412.19437, section 3.3): blocks of 128 along k, each summed
    on tensor cores and added to the total in float32. Not differentiable; under `vmap` it is a loop
    on the device. Under Auto mesh axes m, n and k are sharded as the operands are.

    Args:
      a: E4M3 `[m, k]`.
      a_scale: float32 `[k / 128, m]`: of 128 neighbors along k.
      b: E4M3 `[n, k]`.
      b_scale: float32 `[k / 128, n]`, or `[ceil(n / 128), k / 128]`: of tiles of 128 x 128.
      out: dtype of the result.
      implementation: a name in `IMPLEMENTATIONS["block_scaled_matmul"]`, taken or refused; None for
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
        problem = Problem(m, n, k, whole.b_rows, out)
        name = choose("block_scaled_matmul", problem, device, implementation)
        return IMPLEMENTATIONS["block_scaled_matmul"][name].run(*operands, problem)

    def part(cut: Cut, *operands: jax.Array) -> jax.Array:
        if "k" not in cut:
            return run(*operands)
        return lax.psum(run(*operands, out="float32"), cut["k"]).astype(whole.out)

    if whole.m % BLOCK or whole.n % BLOCK:
        return looped(run)(a, a_scale, b, b_scale)
    of_b = "k/ n" if whole.b_rows else "n/ k/"
    placed = on_mesh(run, ("m k", "k/ m", "n k", of_b), ("m n",), part, "k")
    return looped(placed)(a, a_scale, b, b_scale)


def _problem(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, out: str
) -> Problem:
    given = ", ".join(f"{v.dtype}{list(v.shape)}" for v in (a, a_scale, b, b_scale))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] % BLOCK:
        raise ValueError(
            f"block_scaled_matmul: a [m, k] and b [n, k] must share a k that is a multiple of "
            f"{BLOCK}; given are {given}"
        )
    (m, k), n = a.shape, b.shape[0]
    rows, tiles = (k // BLOCK, n), (-(-n // BLOCK), k // BLOCK)
    if a_scale.shape != (k // BLOCK, m) or b_scale.shape not in (rows, tiles):
        raise ValueError(
            f"block_scaled_matmul: a_scale must be [{k // BLOCK}, {m}], b_scale {list(rows)} or "
            f"{list(tiles)}; given are {given}"
        )
    if {a.dtype, b.dtype} != {jnp.dtype(CODES)} or {a_scale.dtype, b_scale.dtype} != {
        jnp.dtype(jnp.float32)
    }:
        raise ValueError(
            f"block_scaled_matmul: codes must be {CODES.__name__} and scales float32; given are "
            f"{given}"
        )
    return Problem(m, n, k, b_scale.shape == rows, out)
