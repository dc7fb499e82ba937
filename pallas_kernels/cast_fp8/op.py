"""cast_fp8: the op as it is called, with its checks and its vmap."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cast_fp8.problem import BLOCK, Problem
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped
from pallas_kernels.sharded import on_mesh

DTYPES = ("float8_e4m3fn", "float8_e5m2")


def cast_fp8(
    x: jax.Array,
    scales: str,
    *inverses: jax.Array,
    dtype: Any = jnp.float8_e4m3fn,
    implementation: str | None = None,
    device: Device | None = None,
) -> tuple[jax.Array, ...]:
    """`codes = round(x / scale)`, saturated, as they lie and transposed, from one read of x.

    `scale = amax / largest code` of what shares a scale; an amax below 2^-110 counts as that, NaN
    as Inf, so a block that holds either decodes to NaN. FP8 tensor cores contract the last axis of
    both operands: the codes serve a contraction of columns, the transposed ones one of rows.

    Args:
      x: floating point `[r, c]`.
      scales: "block", "tile" or "given", see `Problem`.
      *inverses: for "given" only: float32 `[r]` and `[c]`, what rows are multiplied with for the
        codes and columns for the transposed codes.
      dtype: of the codes, float8_e4m3fn or float8_e5m2.
      implementation: a name in `IMPLEMENTATIONS["cast_fp8"]`, taken or refused; None for the best
        that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      codes `[r, c]`, transposed codes `[c, r]`, and float32 scales: of blocks, `[c / 128, r]` and
      for the transposed codes `[r / 128, c]`; of tiles, `[r / 128, c / 128]`; none where they are
      given.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run this.
    """

    def run(x: jax.Array, *inverses: jax.Array) -> tuple[jax.Array, ...]:
        problem = _problem(x, scales, inverses, jnp.dtype(dtype).name)
        name = choose("cast_fp8", problem, device, implementation)
        return IMPLEMENTATIONS["cast_fp8"][name].run(x, *inverses, problem=problem)

    _problem(x, scales, inverses, jnp.dtype(dtype).name)
    if x.shape[0] % BLOCK or x.shape[1] % BLOCK:
        return looped(run)(x, *inverses)
    results = "r c", "c r", *{"block": ("c/ r", "r/ c"), "tile": ("r/ c/",), "given": ()}[scales]
    return looped(on_mesh(run, ("r c", "r", "c")[: 1 + len(inverses)], results))(x, *inverses)


def _problem(x: jax.Array, scales: str, inverses: tuple[jax.Array, ...], dtype: str) -> Problem:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"cast_fp8: x must be floats [r, c], is {x.dtype}{list(x.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"cast_fp8: codes of {dtype} are none of {', '.join(DTYPES)}")
    wanted = [(n,) for n in x.shape] if scales == "given" else []
    got = [v.shape for v in inverses]
    if scales not in ("block", "tile", "given") or got != wanted:
        raise ValueError(
            f"cast_fp8: scales are 'block', 'tile' or 'given', the last with reciprocals of shapes "
            f"{[(n,) for n in x.shape]}; given are {scales!r} and {got}"
        )
    if scales != "given" and (x.shape[0] % BLOCK or x.shape[1] % BLOCK):
        raise ValueError(
            f"cast_fp8: {scales} scales need multiples of {BLOCK}, x is {list(x.shape)}; pad it"
        )
    return Problem(x.shape[0], x.shape[1], scales, dtype, x.dtype.name)
