"""Hopper through Pallas Mosaic GPU: one block per row, which stays in registers."""

# jax 0.10, which is too old for the kernel, hides an argument of `load`.
# pyright: reportCallIssue=false

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.add_norm.problem import Problem
from pallas_kernels.frame import Device

UNIT, WIDTH = 128, 8192


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, a few rows of a multiple of 128, on one H100 or H200 with jax 0.11."""
    long = f"rows of {problem.width}: it takes up to {WIDTH}" if problem.width > WIDTH else None
    return hopper.missing_rows(device, problem.rows, problem.width, problem.x) or long


def run(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    """See `op.add_norm`."""
    from jax import lax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.chained import follow

    rows, width = problem.rows, problem.width
    vector = next(v for v in (8, 4, 2, 1) if width % (UNIT * v) == 0)
    load = functools.partial(
        plgpu.load, layout=plgpu.Layout.WG_STRIDED((width,), vec_size=vector), optimized=False
    )

    def add_norm(x, y, scale, total, normed):
        row = lax.axis_index("row")
        factor = load(scale.at[:]).astype(jnp.float32)  # a weight
        follow()
        wide = load(x.at[row]).astype(jnp.float32) + load(y.at[row]).astype(jnp.float32)
        narrow = wide.astype(jnp.bfloat16)
        total[row] = narrow
        wide = narrow.astype(jnp.float32)
        root = lax.rsqrt(jnp.sum(wide * wide) / width + problem.epsilon)
        normed[row] = (wide * root * factor).astype(jnp.bfloat16)

    result = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    kernel = plgpu.kernel(
        add_norm,
        out_type=[result, result],
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    total, normed = kernel(x, y, scale)
    return total, normed
