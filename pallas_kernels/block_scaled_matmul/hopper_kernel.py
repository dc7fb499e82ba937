"""The Hopper kernel: E4M3 blocks of 128 along k, multiplied on tensor cores, summed in float32.

Persistent and warp-specialized: a warpgroup issues TMA into a ring of stages and runs ahead over
the borders of tiles; the others share a tile's rows. Per 128 of k a part of the tile, 64 x `part`,
is multiplied into a fresh accumulator, and then total += part * scales: the tensor cores keep 14
bits of a sum, so it must not grow longer. While one warpgroup adds, others multiply.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_scaled_matmul.mosaic_gpu import Config
from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem

F8, F32 = jnp.float8_e4m3fn, jnp.float32
STRIP = 128  # bytes of a row that is written at once


def kernel(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """`(a, a_scale, b, b_scale) -> [m, n]`."""
    c, (m, n, k) = config, (problem.m, problem.n, problem.k)
    out = jnp.dtype(problem.out)
    strip = STRIP // out.itemsize  # columns written at once
    # columns of a total: those of one tile's scale
    per = c.part if problem.b_rows else math.gcd(c.part, c.bn, BLOCK)
    share = c.bm // c.groups  # rows of a warpgroup
    clusters = (-(-m // c.bm), -(-n // (c.bn * c.cluster)))
    tiles, grid = clusters[0] * clusters[1], c.blocks // c.cluster
    depth = k // BLOCK
    i32 = jnp.int32

    def body(a_g, sa_g, b_g, sb_g, o_g, a_s, b_s, sa_s, o_s, full, empty, *sb_s):
        group = lax.axis_index("wg")

        def release_stage(count):
            plgpu.barrier_arrive(empty.at[lax.rem(count + i32(c.steps), i32(c.steps))])

        def tile(info):
            mi, ni = plgpu.planar_snake(info.index[0], clusters, c.minor, c.width)
            if c.cluster > 1:
                ni = ni * c.cluster + lax.axis_index("cluster")
            return mi, ni, info.local_index * depth

        @pl.when(group == c.groups)
        def _():
            plgpu.set_max_registers(c.load_registers, action="decrease")

            @plgpu.nd_loop((tiles,), collective_axes="sm")
            def _(info):
                mi, ni, first = tile(info)
                rows, columns = pl.ds(mi * c.bm, c.bm), pl.ds(ni * c.bn, c.bn)

                @pl.loop(0, depth)
                def _(kk):
                    s = lax.rem(first + kk, i32(c.steps))
                    along = pl.ds(kk * BLOCK, BLOCK)
                    plgpu.barrier_wait(empty.at[s])
                    fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                    shared = "cluster" if c.cluster > 1 else None
                    fetch(a_g.at[rows, along], a_s.at[s], collective_axes=shared)
                    fetch(b_g.at[columns, along], b_s.at[s])
                    fetch(sa_g.at[kk, rows], sa_s.at[s])
                    if problem.b_rows:
                        fetch(sb_g.at[kk, columns], sb_s[0].at[s])

            for s in range(c.steps):  # the neighbor still arrives at barriers of this block
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group < c.groups)
        def _():
            plgpu.set_max_registers(c.registers, action="increase")
            # where the rows of b have scales, a stage is released in the step after it
            for s in range(c.steps - problem.b_rows):
                plgpu.barrier_arrive(empty.at[s])

            @plgpu.nd_loop((tiles,), collective_axes="sm")
            def _(info):
                mi, ni, first = tile(info)
                parts = [(i, j) for j in range(c.bn // c.part) for i in range(share // 64)]
                rows = [pl.ds(group * share + 64 * i, 64) for i in range(share // 64)]
                blocks = [
                    lax.min((ni * c.bn + q * per) // BLOCK, i32(n // BLOCK - 1))
                    for q in range(0 if problem.b_rows else c.bn // per)
                ]
                # read two steps ahead, since the load is slow and its consumer comes first
                tile_scales = lambda kk: tuple(
                    sb_g[b, lax.min(i32(kk), i32(depth - 1))] for b in blocks
                )

                release = lambda kk: release_stage(first + kk)

                def step(kk, carry):
                    totals, scales, after = carry
                    s = lax.rem(first + kk, i32(c.steps))
                    plgpu.barrier_wait(full.at[s])
                    later = tile_scales(kk + 2)
                    done = []
                    for i, j in parts:
                        columns = pl.ds(j * c.part, c.part)
                        of_rows = sa_s[s, rows[i]]
                        operands = a_s.at[s, rows[i]], b_s.at[s, columns]
                        product = functools.partial(_product, *operands)
                        got = pl.run_scoped(product, plgpu.ACC((64, c.part), F32))
                        if problem.b_rows:
                            # One thread releases a stage. Now all have read the scales of the one
                            # before: their products came before this one, which all began.
                            if (i, j) == parts[0]:
                                release(kk - 1)
                            layout = plgpu.Layout.WGMMA.reduce(0)
                            of_columns = plgpu.load(sb_s[0].at[s, columns], layout=layout)
                            got = got * lax.broadcast_in_dim(of_columns, (64, c.part), (1,))
                        elif (i, j) == parts[-1]:
                            release(kk)
                        for q in range(0, c.part, per):
                            factor = of_rows
                            if not problem.b_rows:
                                factor = of_rows * scales[(j * c.part + q) // per]
                            piece = got if per == c.part else got[:, q : q + per]
                            wide = lax.broadcast_in_dim(factor, (64, per), (0,))
                            done.append(totals[len(done)] + piece * wide)
                    return tuple(done), after, later

                zero = plgpu.layout_cast(jnp.zeros((64, per), F32), plgpu.Layout.WGMMA)
                start = (zero,) * (len(parts) * c.part // per)
                totals, *_ = lax.fori_loop(0, depth, step, (start, tile_scales(0), tile_scales(1)))
                strips = []
                for index, total in enumerate(totals):
                    i, j = parts[index // (c.part // per)]
                    column = j * c.part + index % (c.part // per) * per
                    strips += [
                        (i, column + q, total[:, q : q + strip]) for q in range(0, per, strip)
                    ]
                at_once = max(1, c.outs // 2)
                for start in range(0, len(strips), at_once):
                    batch = list(enumerate(strips[start : start + at_once], start))
                    plgpu.wait_smem_to_gmem(c.outs - at_once, wait_read_only=True)
                    for slot, (_, _, value) in batch:
                        o_s[group, slot % c.outs] = value.astype(out)
                    plgpu.commit_smem()
                    for slot, (i, column, _) in batch:
                        where = (
                            pl.ds(mi * c.bm + group * share + 64 * i, 64),
                            pl.ds(ni * c.bn + column, strip),
                        )
                        plgpu.copy_smem_to_gmem(o_s.at[group, slot % c.outs], o_g.at[where])

            if problem.b_rows:  # the last stage of all
                mine = (tiles - lax.axis_index("sm") + grid - 1) // grid
                release_stage(mine * depth - 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, STRIP // size)), plgpu.SwizzleTransform(STRIP))
    emptied = plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.steps)
    if c.cluster > 1:
        emptied = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=c.groups, num_barriers=c.steps
        )
    scratch = [
        plgpu.SMEM((c.steps, c.bm, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, c.bn, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, c.bm), F32),
        plgpu.SMEM((c.groups, c.outs, 64, strip), out, transforms=tiled(out.itemsize)),
        plgpu.Barrier(num_arrivals=3 + problem.b_rows, num_barriers=c.steps),
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
        num_threads=c.groups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )


def _product(a: Any, b: Any, acc: Any) -> jax.Array:
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    return acc[...]
