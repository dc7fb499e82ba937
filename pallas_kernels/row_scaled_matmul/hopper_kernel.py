"""The Hopper kernel: E4M3 codes multiplied on tensor cores, scaled as the results leave.

Persistent and warp-specialized: a warpgroup issues TMA into a ring of stages and runs ahead over
the borders of tiles; two multiply 128 rows each, summing all of k in the tensor cores' registers.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.row_scaled_matmul.mosaic_gpu import COLUMNS, ROWS, Config
from pallas_kernels.row_scaled_matmul.problem import Problem
from pallas_kernels.warpgroups import scales

F8, F32 = jnp.float8_e4m3fn, jnp.float32
GROUPS = 2  # warpgroups that multiply; the next one loads
LINES = 64  # rows of one tensor core instruction
DEEP = 128  # of k in a stage
STRIP = 128  # bytes of a row that is written at once


def kernel(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """`(a, a_scale, b, b_scale) -> [m, n]`."""
    c, (m, n, k) = config, (problem.m, problem.n, problem.k)
    out = jnp.dtype(problem.out)
    strip = STRIP // out.itemsize  # columns written at once
    share, depth = ROWS // GROUPS, k // DEEP
    parts = range(0, share, LINES)
    tiles = -(-m // ROWS), n // COLUMNS
    i32 = jnp.int32

    def body(a_g, sa_g, b_g, sb_g, o_g, a_s, b_s, o_s, full, empty):
        group = lax.axis_index("wg")

        def sweep(work):
            """`work(row, column, stage)`, the first of each, of all tiles."""

            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
            def _(info):
                mi, ni = plgpu.planar_snake(info.index[0], tiles, c.minor, c.width)
                work(mi * ROWS, ni * COLUMNS, info.local_index * depth)

        def release(stage):
            plgpu.barrier_arrive(empty.at[lax.rem(stage + c.steps, i32(c.steps))])

        @pl.when(group == GROUPS)
        def _():
            plgpu.set_max_registers(c.load_registers, action="decrease")

            def load(row, column, first):
                @pl.loop(0, depth)
                def _(kk):
                    s, along = lax.rem(first + kk, i32(c.steps)), pl.ds(kk * DEEP, DEEP)
                    plgpu.barrier_wait(empty.at[s])
                    for source, at, target in (
                        (a_g, pl.ds(row, ROWS), a_s),
                        (b_g, pl.ds(column, COLUMNS), b_s),
                    ):
                        plgpu.copy_gmem_to_smem(source.at[at, along], target.at[s], full.at[s])

            sweep(load)
            for s in range(c.steps):
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(c.registers, action="increase")
            for s in range(c.steps - 1):  # a stage is released in the step after it
                plgpu.barrier_arrive(empty.at[s])

            def multiply(row, column, first):
                def sums(*totals):
                    @pl.loop(0, depth)
                    def _(kk):
                        s = lax.rem(first + kk, i32(c.steps))
                        plgpu.barrier_wait(full.at[s])
                        for total, line in zip(totals, parts, strict=True):
                            a = a_s.at[s, pl.ds(group * share + line, LINES)]
                            plgpu.wgmma(total, a, b_s.at[s].transpose((1, 0)))
                        plgpu.wgmma_wait(len(parts))
                        release(first + kk - 1)

                    return tuple(total[...] for total in totals)

                scratch = [plgpu.ACC((LINES, COLUMNS), F32) for _ in parts]
                for line, total in zip(parts, pl.run_scoped(sums, *scratch), strict=True):
                    at = pl.ds(row + group * share + line, LINES)
                    of_rows = scales(sa_g.at[at], 0, (LINES, strip))
                    for slot, q in enumerate(range(0, COLUMNS, strip)):
                        columns = pl.ds(column + q, strip)
                        held = o_s.at[group, slot % c.outs]
                        plgpu.wait_smem_to_gmem(c.outs - 1, wait_read_only=True)
                        scale = scales(sb_g.at[columns], 1, (LINES, strip))
                        held[...] = (total[:, q : q + strip] * of_rows * scale).astype(out)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(held, o_g.at[at, columns])

            sweep(multiply)
            mine = (tiles[0] * tiles[1] - lax.axis_index("sm") + c.blocks - 1) // c.blocks
            release(mine * depth - 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, STRIP // size)), plgpu.SwizzleTransform(STRIP))
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), out),
        grid=(c.blocks,),
        grid_names=("sm",),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((c.steps, ROWS, DEEP), F8, transforms=tiled(1)),
            plgpu.SMEM((c.steps, COLUMNS, DEEP), F8, transforms=tiled(1)),
            plgpu.SMEM((GROUPS, c.outs, LINES, strip), out, transforms=tiled(out.itemsize)),
            plgpu.Barrier(num_arrivals=2, num_barriers=c.steps),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=c.steps),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # TMA clips what lies beyond m, a plain load of scales does not
    padded = lambda a_scale: jnp.pad(a_scale, (0, -m % ROWS))
    return lambda a, a_scale, b, b_scale: run(a, padded(a_scale), b, b_scale)
