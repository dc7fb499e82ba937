"""cast_fp8: the op as it is called, with its checks and its vmap."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cast_fp8.problem import BLOCK, Problem
from pallas_kernels.cast_fp8.reference import largest, scales_of
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.mapping import looped
from pallas_kernels.sharded import Cut, on_mesh

# scales -> the logical axes of those that are found, with and without transposed codes
TURNED_RESULTS = {"block": ("c/ r", "r/ c"), "tile": ("r/ c/",), "given": ()}
RESULTS = {"block": ("c/ r",), "row": ("r",), "given": ()}
DTYPES = ("float8_e4m3fn", "float8_e5m2")


def cast_fp8(
    x: jax.Array,
    scales: str,
    *inverses: jax.Array,
    dtype: Any = jnp.float8_e4m3fn,
    turned: bool = True,
    implementation: str | None = None,
    device: Device | None = None,
) -> tuple[jax.Array, ...]:
    """`codes = round(x / scale)`, saturated, as they lie and transposed, from one read of x.

    `scale = amax / largest code` of what shares a scale; an amax below 2^-110 counts as that, NaN
    as Inf, so a block that holds either decodes to NaN. FP8 tensor cores contract the last axis of
    both operands: the codes serve a contraction of columns, the transposed ones one of rows.

    Args:
      x: floating point `[r, c]`.
      scales: "block", "tile" or "given", or, for codes as they lie alone, "block", "row" or
        "given"; see `Problem`.
      *inverses: for "given" only: float32 `[r]` and, for the transposed codes, `[c]`, what rows and
        columns are multiplied with.
      dtype: of the codes, float8_e4m3fn or float8_e5m2.
      turned: whether transposed codes are wanted.
      implementation: a name in `IMPLEMENTATIONS["cast_fp8"]`, taken or refused; None for the best
        that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      codes `[r, c]`, transposed codes `[c, r]`, and float32 scales: of blocks, `[c / 128, r]` and
      for the transposed codes `[r / 128, c]`; of tiles, `[r / 128, c / 128]`; of rows, `[r]`; none
      where they are given.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run this.
    """
    kind = scales

    def run(x: jax.Array, *inverses: jax.Array, kind: str = kind) -> tuple[jax.Array, ...]:
        problem = _problem(x, kind, inverses, jnp.dtype(dtype).name, turned)
        name = choose("cast_fp8", problem, device, implementation)
        return IMPLEMENTATIONS["cast_fp8"][name].run(x, *inverses, problem=problem)

    def part(cut: Cut, x: jax.Array, *inverses: jax.Array) -> tuple[jax.Array, ...]:
        if kind != "row" or "c" not in cut:
            return run(x, *inverses)
        scale, inverse = scales_of(lax.pmax(largest(x, (1,))[:, 0], cut["c"]), dtype)
        return *run(x, inverse, kind="given"), scale

    _problem(x, kind, inverses, jnp.dtype(dtype).name, turned)
    if x.shape[0] % BLOCK or x.shape[1] % BLOCK:
        return looped(run)(x, *inverses)
    results = ("r c", *RESULTS[kind]) if not turned else ("r c", "c r", *TURNED_RESULTS[kind])
    return looped(on_mesh(run, ("r c", "r", "c")[: 1 + len(inverses)], results, part))(x, *inverses)


def _problem(
    x: jax.Array, scales: str, inverses: tuple[jax.Array, ...], dtype: str, turned: bool
) -> Problem:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"cast_fp8: x must be floats [r, c], is {x.dtype}{list(x.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"cast_fp8: codes of {dtype} are none of {', '.join(DTYPES)}")
    known = TURNED_RESULTS if turned else RESULTS
    of = [(n,) for n in (x.shape if turned else x.shape[:1])]
    got = [v.shape for v in inverses]
    if scales not in known or got != (of if scales == "given" else []):
        raise ValueError(
            f"cast_fp8: scales {'with' if turned else 'without'} transposed codes are "
            f"{', '.join(map(repr, known))}, 'given' with reciprocals of shapes {of}; given are "
            f"{scales!r} and {got}"
        )
    blocked = {"block": (x.shape if turned else x.shape[1:]), "tile": x.shape}.get(scales, ())
    if any(n % BLOCK for n in blocked):
        raise ValueError(
            f"cast_fp8: {scales} scales need multiples of {BLOCK}, x is {list(x.shape)}; pad it"
        )
    return Problem(x.shape[0], x.shape[1], scales, dtype, x.dtype.name, turned)
