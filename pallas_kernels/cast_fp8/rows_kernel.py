"""The Hopper kernel for scales of rows: each is read once, and seen twice in shared memory."""

# pyright: reportCallIssue=false

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cast_fp8.hopper_kernel import scales_of
from pallas_kernels.cast_fp8.mosaic_gpu import LINE
from pallas_kernels.cast_fp8.problem import Problem

F32 = jnp.float32
HELD = 16  # lines that a warpgroup holds at a time


def kernel(problem: Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`x [rows, columns] -> (codes [rows, columns], scales [rows])`; a block takes one row."""
    rows, dtype = problem.rows, jnp.dtype(problem.dtype)
    lines = problem.columns // LINE
    deep = next(n for n in range(min(HELD, lines), 0, -1) if lines % n == 0)
    chunks = [pl.ds(i * deep, deep) for i in range(lines // deep)]
    largest = float(jnp.finfo(dtype).max)

    def body(x_g, code_g, scale_g, x_s, code_s, full):
        row = lax.axis_index("i")
        plgpu.copy_gmem_to_smem(x_g.at[row], x_s, full)
        plgpu.barrier_wait(full)
        tops = [jnp.abs(x_s[at].astype(F32)) for at in chunks]
        scale, inverse = scales_of(jnp.max(functools.reduce(jnp.maximum, tops)), largest)
        for at in chunks:
            code_s[at] = (x_s[at].astype(F32) * inverse).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(code_s, code_g.at[row])
        scale_g[row] = scale
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((rows, lines, LINE), dtype),
            jax.ShapeDtypeStruct((rows,), F32),
        ],
        grid=(rows,),
        grid_names=("i",),
        scratch_types=[
            plgpu.SMEM((lines, LINE), problem.x),
            plgpu.SMEM((lines, LINE), dtype),
            plgpu.Barrier(num_arrivals=1),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )

    def cast_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scales = run(x.reshape(rows, lines, LINE))
        return codes.reshape(x.shape), scales

    return cast_rows
