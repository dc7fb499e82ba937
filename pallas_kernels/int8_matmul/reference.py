"""The definition: one dot in int32, one in float32, then the scales."""

import jax
import jax.numpy as jnp

from pallas_kernels.frame import Device
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul.layouts import LAYOUTS


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    x: jax.Array,
    x_scale: jax.Array,
    arrays: dict[str, jax.Array],
    *outliers: jax.Array,
    problem: Problem,
) -> jax.Array:
    """`(x_scale * (x @ w) + columns @ w[at]) * scale`."""
    order, weight = LAYOUTS[problem.layout], problem.weight
    codes = order.unpack_codes(arrays["codes"], weight)
    scale = order.unpack_scale(arrays["scale"], weight, "scale").astype(jnp.float32)
    y = jnp.dot(x, codes, preferred_element_type=jnp.int32).astype(jnp.float32) * x_scale[:, None]
    if outliers:
        columns, at = outliers
        rows = jnp.take(codes, at, axis=0, mode="clip").astype(jnp.float32)
        y = y + jnp.dot(columns.astype(jnp.float32), rows, precision=jax.lax.Precision.HIGHEST)
    return (y * scale).astype(problem.out)
