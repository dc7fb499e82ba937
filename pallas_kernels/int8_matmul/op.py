"""int8_matmul: the op as it is called, with its checks and its vmap."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.mapping import looped
from pallas_kernels.quantized_matmul.op import check
from pallas_kernels.quantized_matmul.problem import Weight


def int8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    arrays: dict[str, jax.Array],
    weight: Weight,
    layout: str,
    *,
    outliers: tuple[jax.Array, jax.Array] | None = None,
    out: Any = jnp.bfloat16,
    implementation: str | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`y = (x_scale * (x @ w) + columns @ w[at]) * scale`, in int32, then in float32.

    w are the codes of the weight, scale its scales, one per channel; x_scale is one per row. The
    first sum is exact; the second one is that of LLM.int8() (Dettmers et al., arXiv:2208.07339,
    section 3.2): features of x that are outliers come as columns of their own, and x is zero there.
    Not differentiable; under `vmap` it is a loop on the device. Kernels run on one device.

    Args:
      x: int8 `[m, k]`.
      x_scale: float32 `[m]`.
      arrays: "codes" and "scale" of the weight, in the order of `layout`.
      weight, layout: what they hold, int8 with one scale per channel, and a name in `LAYOUTS`.
      outliers: columns, floats `[m, c]` that are multiplied in bfloat16 on a GPU, and the int32
        `[c]` rows of the weight that they meet; a row beyond k belongs to a column of zeros.
      out: dtype of the result.
      implementation: a name in `IMPLEMENTATIONS["int8_matmul"]`, taken or refused; None for the
        best that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      `[m, n]`.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot run this.
    """
    check(x, arrays, weight, layout, "int8_matmul")
    if weight.code != "int8" or weight.groups > 1 or weight.zero or weight.offset:
        raise ValueError(
            f"int8_matmul: {weight} must be int8 codes with one scale per channel and no zero "
            "points; quantized_matmul takes others, with x in floats"
        )
    m = x.shape[0]
    given = f"{x.dtype}{list(x.shape)} and {x_scale.dtype}{list(x_scale.shape)}"
    if x.dtype != jnp.int8 or x_scale.dtype != jnp.float32 or x_scale.shape != (m,):
        raise ValueError(
            f"int8_matmul: x must be int8 [m, k] and x_scale float32 [m]; given are {given}"
        )
    if outliers is not None:
        columns, at = outliers
        fits = at.ndim == 1 and columns.shape == (m, at.size) and at.dtype == jnp.int32
        if not fits or not jnp.issubdtype(columns.dtype, jnp.floating):
            raise ValueError(
                f"int8_matmul: outliers must be floats [{m}, c] and int32 [c]; given are "
                f"{columns.dtype}{list(columns.shape)} and {at.dtype}{list(at.shape)}"
            )
    if not jnp.issubdtype(out, jnp.floating):
        raise ValueError(f"int8_matmul: the result has scales, out must be floats, is {out}")
    count = 0 if outliers is None else outliers[1].size
    problem = Problem(m, weight, layout, count, jnp.dtype(out).name)
    name = choose("int8_matmul", problem, device, implementation)
    row = IMPLEMENTATIONS["int8_matmul"][name]

    def run(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, *second: Any):
        return row.run(x, x_scale, {"codes": codes, "scale": scale}, *second, problem=problem)

    second = () if count == 0 else outliers
    return looped(run)(x, x_scale, arrays["codes"], arrays["scale"], *(second or ()))
