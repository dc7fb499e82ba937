"""The Hopper kernel: E4M3 blocks of 128 along k, multiplied on tensor cores, summed in float32.

Persistent and warp-specialized: a warpgroup issues TMA into a ring of stages and runs ahead over
the borders of tiles; three share a tile's rows. Per 128 of k the 64 rows of one are multiplied into
a fresh accumulator, and then total += product * scales: the tensor cores keep 14 bits of a sum, so
it must not grow longer. While one warpgroup adds, the others multiply.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_matmul.mosaic_gpu import GROUPS, Config, phases
from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem

F8, F32 = jnp.float8_e4m3fn, jnp.float32
LINES = 64  # rows of a warpgroup
STRIP = 128  # bytes of a row that is written at once


def kernel(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """`(a, a_scale, b, b_scale) -> [m, n]`."""
    c, (m, n, k) = config, (problem.m, problem.n, problem.k)
    out = jnp.dtype(problem.out)
    strip = STRIP // out.itemsize  # columns written at once
    bm, depth = LINES * GROUPS, k // BLOCK
    grid, lines = c.blocks // c.cluster, -(-m // bm)
    behind = int(problem.b_rows)  # steps after which a stage is released
    i32 = jnp.int32

    def body(a_g, sa_g, b_g, sb_g, o_g, a_s, b_s, sa_s, o_s, full, empty, *sb_s):
        group, sm = lax.axis_index("wg"), lax.axis_index("sm")

        def release(stage):
            plgpu.barrier_arrive(empty.at[lax.rem(stage + c.steps, i32(c.steps))])

        def sweep(work):
            """`work(bn, row, column, stage)`, the first of each, of all tiles; their number."""
            done = i32(0)
            for phase in phases(problem, c):

                @plgpu.nd_loop((lines * phase.count,), collective_axes="sm")
                def _(info, phase=phase, done=done):
                    over = lines, phase.count
                    mi, ni = plgpu.planar_snake(info.index[0], over, c.minor, c.width)
                    if c.cluster > 1:
                        ni = ni * c.cluster + lax.axis_index("cluster")
                    column = phase.start + ni * phase.bn
                    work(phase.bn, mi * bm, column, (done + info.local_index) * depth)

                done += (lines * phase.count - sm + grid - 1) // grid
            return done

        @pl.when(group == GROUPS)
        def _():
            plgpu.set_max_registers(c.load_registers, action="decrease")

            def load(bn, row, column, first):
                rows, columns = pl.ds(row, bm), pl.ds(column, bn)

                @pl.loop(0, depth)
                def _(kk):
                    s = lax.rem(first + kk, i32(c.steps))
                    along, held = pl.ds(kk * BLOCK, BLOCK), pl.ds(0, bn)
                    plgpu.barrier_wait(empty.at[s])
                    fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                    shared = "cluster" if c.cluster > 1 else None
                    fetch(a_g.at[rows, along], a_s.at[s], collective_axes=shared)
                    fetch(b_g.at[columns, along], b_s.at[s, held])
                    fetch(sa_g.at[kk, rows], sa_s.at[s])
                    if problem.b_rows:
                        fetch(sb_g.at[kk, columns], sb_s[0].at[s, held])

            sweep(load)
            for s in range(c.steps):  # the neighbor still arrives at barriers of this block
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(c.registers, action="increase")
            mine = pl.ds(group * LINES, LINES)
            for s in range(c.steps - behind):
                plgpu.barrier_arrive(empty.at[s])

            def multiply(bn, row, column, first):
                block = lax.min(column // BLOCK, i32(n // BLOCK - 1))
                # read two steps ahead, since the load is slow and its consumer comes first
                tile_scale = lambda kk: sb_g[block, lax.min(i32(kk), i32(depth - 1))]
                if problem.b_rows:
                    tile_scale = lambda kk: jnp.float32(1)

                def step(kk, carry):
                    total, scale, after = carry
                    s = lax.rem(first + kk, i32(c.steps))
                    plgpu.barrier_wait(full.at[s])
                    later = tile_scale(kk + 2)
                    of_rows = sa_s[s, mine]
                    product = functools.partial(_product, a_s.at[s, mine], b_s.at[s, pl.ds(0, bn)])
                    got = pl.run_scoped(product, plgpu.ACC((LINES, bn), F32))
                    # One thread releases a stage. Now all have read the column scales of the one
                    # before: they did so before this product, which all began.
                    release(first + kk - behind)
                    if problem.b_rows:
                        layout = plgpu.Layout.WGMMA.reduce(0)
                        of_columns = plgpu.load(sb_s[0].at[s, pl.ds(0, bn)], layout=layout)
                        got *= lax.broadcast_in_dim(of_columns, (LINES, bn), (1,))
                    else:
                        of_rows *= scale
                    total += got * lax.broadcast_in_dim(of_rows, (LINES, bn), (0,))
                    return total, after, later

                zero = plgpu.layout_cast(jnp.zeros((LINES, bn), F32), plgpu.Layout.WGMMA)
                total, *_ = lax.fori_loop(0, depth, step, (zero, tile_scale(0), tile_scale(1)))
                for slot, q in enumerate(range(0, bn, strip)):
                    held = o_s.at[group, slot % c.outs]
                    plgpu.wait_smem_to_gmem(c.outs - 1, wait_read_only=True)
                    held[...] = total[:, q : q + strip].astype(out)
                    plgpu.commit_smem()
                    where = pl.ds(row + group * LINES, LINES), pl.ds(column + q, strip)
                    plgpu.copy_smem_to_gmem(held, o_g.at[where])

            done = sweep(multiply)
            if behind:
                release(done * depth - 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, STRIP // size)), plgpu.SwizzleTransform(STRIP))
    emptied = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=c.steps)
    if c.cluster > 1:
        emptied = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=GROUPS, num_barriers=c.steps
        )
    scratch = [
        plgpu.SMEM((c.steps, bm, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, c.bn, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, bm), F32),
        plgpu.SMEM((GROUPS, c.outs, LINES, strip), out, transforms=tiled(out.itemsize)),
        plgpu.Barrier(num_arrivals=3 + behind, num_barriers=c.steps),
        emptied,
    ]
    if problem.b_rows:
        scratch.append(plgpu.SMEM((c.steps, c.bn), F32))
    options: dict[str, Any] = {}
    if c.cluster > 1:
        options = {"cluster": (c.cluster,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), out),
        grid=(grid,),
        grid_names=("sm",),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )


def _product(a: Any, b: Any, acc: Any) -> jax.Array:
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    return acc[...]
