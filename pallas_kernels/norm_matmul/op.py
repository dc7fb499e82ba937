"""norm_matmul: the op as it is called, with its checks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.definition import instead
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.gated.reference import ACTIVATIONS
from pallas_kernels.norm_matmul import reference
from pallas_kernels.norm_matmul.problem import Problem
from pallas_kernels.quantized_matmul.op import Arrays, check
from pallas_kernels.quantized_matmul.problem import Weight

SCALES = ("bfloat16", "float16", "float32")  # dtypes of a norm's scale


def norm_matmul(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    epsilon: float,
    arrays: Sequence[Arrays],
    weights: Sequence[Weight],
    layout: str,
    *,
    gate: str | None = None,
    out: Any = None,
    implementation: str | None = None,
    device: Device | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """`s = x + y`, and `[h @ w for w in weights]` of its RMSNorm h.

    `h = s / sqrt(mean(s ** 2) + epsilon) * scale`. With a gate the result is
    `activation(h @ first) * (h @ second)`. A kernel may multiply `s * scale`, rounded, and divide
    the sums by the root; it rounds nothing before the result.

    Derivatives are those of the definition, in x, y and scale; under `vmap` it is a loop on the
    device. It knows no mesh.

    Args:
      x, y: floating point `[m, k]` of one dtype.
      scale: `[k]` of one of SCALES.
      epsilon: as above.
      arrays, weights, layout: as for `joined_matmul`; weights have no bias.
      gate: a name in `gated.reference.ACTIVATIONS`, for two weights of equal n; None for neither.
      out: dtype of the results; that of x if None.
      implementation: a name in `IMPLEMENTATIONS["norm_matmul"]`, taken or refused; None for the
        best that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      s in the dtype of x, and `[m, n]` of each weight, or one of both.

    Raises:
      ValueError: if shapes, dtypes or names do not fit, or the implementation cannot run this.
    """
    fits = x.ndim == 2 and x.shape == y.shape and scale.shape == x.shape[1:]
    known = jnp.issubdtype(x.dtype, jnp.floating) and scale.dtype.name in SCALES
    if not fits or x.dtype != y.dtype or not known:
        raise ValueError(
            "norm_matmul: x and y must be floats [m, k] of one dtype and scale [k] of "
            f"{', '.join(SCALES)}, are "
            f"{x.dtype}{list(x.shape)}, {y.dtype}{list(y.shape)} and "
            f"{scale.dtype}{list(scale.shape)}"
        )
    if gate is not None and gate not in ACTIVATIONS:
        raise ValueError(f"norm_matmul: gate {gate!r} is none of {', '.join(ACTIVATIONS)}")
    if not weights or (gate is not None and [w.n for w in weights] != [weights[0].n] * 2):
        needed = "one weight or more" if gate is None else "two weights of equal n for a gate"
        raise ValueError(f"norm_matmul: takes {needed}, not n of {[w.n for w in weights]}")
    for held, weight in zip(arrays, weights, strict=True):
        check(x, held, weight, layout, "norm_matmul")
        if "bias" in held:
            raise ValueError("norm_matmul: takes no bias, add it to the result")
    out = x.dtype if out is None else jnp.dtype(out)
    problem = Problem(x.shape[0], epsilon, tuple(weights), layout, x.dtype.name, out.name, gate)
    name = choose("norm_matmul", problem, device, implementation)
    operands = (x, y, scale, *problem.leaves(arrays))
    if name == "reference":
        return reference.run(*operands, problem=problem)
    return instead(IMPLEMENTATIONS["norm_matmul"][name].run, reference.run, problem, operands)
