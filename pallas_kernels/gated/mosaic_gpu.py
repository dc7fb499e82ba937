"""Hopper through Pallas Mosaic GPU: a block per row and 1024 columns, or fewer."""

# jax 0.10, which is too old for the kernel, hides an argument of `load`.
# pyright: reportCallIssue=false

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.frame import Device
from pallas_kernels.gated.problem import Problem

SIZES = 1024, 512, 256, 128  # columns of a block
GELU = 0.7978845608028654  # sqrt(2 / pi)


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, a few rows of a multiple of 128, on one H100 or H200 with jax 0.11."""
    return hopper.missing_rows(device, problem.rows, problem.width, problem.x)


def run(gate: jax.Array, up: jax.Array, *, problem: Problem) -> jax.Array:
    """See `op.gated`."""
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.chained import follow

    rows, width = problem.rows, problem.width
    size = next(s for s in SIZES if width % s == 0)
    load = functools.partial(
        plgpu.load, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=size // 128), optimized=False
    )

    def gated(gate, up, out):
        at = lax.axis_index("row"), pl.ds(lax.axis_index("column") * size, size)
        follow()
        g, u = (load(ref.at[at]).astype(jnp.float32) for ref in (gate, up))
        inner = g if problem.activation == "silu" else 2 * GELU * (g + 0.044715 * g * g * g)
        active = (g / (1 + jnp.exp(-inner))).astype(jnp.bfloat16)
        out[at] = (active.astype(jnp.float32) * u).astype(jnp.bfloat16)

    return plgpu.kernel(
        gated,
        out_type=jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
        grid=(rows, width // size),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(gate, up)
