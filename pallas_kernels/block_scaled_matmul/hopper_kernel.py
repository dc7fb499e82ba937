"""The Hopper kernel: E4M3 blocks of 128 along k, multiplied on tensor cores, summed in float32.

Persistent and warp-specialized: a warpgroup issues TMA into a ring of stages and runs ahead over
the borders of tiles; three share a tile's rows. Per 128 of k the 64 rows of one are multiplied into
a fresh accumulator, and then total += product * scales: the tensor cores keep 14 bits of a sum, so
it must not grow longer. While one warpgroup adds, the others multiply, and what need not wait for a
product is done while it is under way: the next stage is waited for, and its scales are read.

Where columns have scales of their own (b_rows) the total of a column is kept in units of its last
scale. Then total *= scale before / scale needs no product and runs beside it, and total += product
* scale of the row is all that follows, as it is for tiles. Columns whose scales lie too far apart
for that in float32 multiply twice after the product.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
from collections.abc import Callable

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
ALONG = plgpu.Layout.WGMMA.reduce(0)  # of a vector along the columns of a product


def kernel(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """`(a, a_scale, b, b_scale) -> [m, n]`."""
    c, (m, n, k) = config, (problem.m, problem.n, problem.k)
    out = jnp.dtype(problem.out)
    strip = STRIP // out.itemsize  # columns written at once
    bm, depth = LINES * GROUPS, k // BLOCK
    lines = -(-m // bm)
    slots = 2 * c.steps  # of column scales, which outlive their stage: it is free after its product
    i32 = jnp.int32

    def body(a_g, sa_g, b_g, sb_g, *refs):
        near_g, refs = refs[: problem.b_rows], refs[problem.b_rows :]
        o_g, a_s, b_s, sa_s, o_s, full, empty, *sb_s = refs
        group, sm = lax.axis_index("wg"), lax.axis_index("sm")

        def sweep(work):
            """`work(bn, row, column, stage)`, the first of each, of all tiles."""
            done = i32(0)
            for phase in phases(problem, c):

                @plgpu.nd_loop((lines * phase.count,), collective_axes="sm")
                def _(info, phase=phase, done=done):
                    over = lines, phase.count
                    mi, ni = plgpu.planar_snake(info.index[0], over, c.minor, c.width)
                    column = phase.start + ni * phase.bn
                    work(phase.bn, mi * bm, column, (done + info.local_index) * depth)

                done += (lines * phase.count - sm + c.blocks - 1) // c.blocks

        @pl.when(group == GROUPS)
        def _():
            plgpu.set_max_registers(c.load_registers, action="decrease")

            def load(bn, row, column, first):
                rows, columns = pl.ds(row, bm), pl.ds(column, bn)
                of_columns = near_g[0][column // BLOCK] * (depth + 1) if problem.b_rows else 0

                @pl.loop(0, depth)
                def _(kk):
                    s = _in_ring(first + kk, c.steps)
                    along, held = pl.ds(kk * BLOCK, BLOCK), pl.ds(0, bn)
                    plgpu.barrier_wait(empty.at[s])
                    fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                    fetch(a_g.at[rows, along], a_s.at[s])
                    fetch(b_g.at[columns, along], b_s.at[s, held])
                    fetch(sa_g.at[kk, rows], sa_s.at[s])
                    if problem.b_rows:
                        slot = _in_ring(first + kk, slots)
                        fetch(sb_g.at[of_columns + kk, columns], sb_s[0].at[slot, held])

            sweep(load)
            for s in range(c.steps):
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(c.registers, action="increase")
            mine = pl.ds(group * LINES, LINES)
            for s in range(c.steps):
                plgpu.barrier_arrive(empty.at[s])

            def multiply(bn, row, column, first):
                block = column // BLOCK
                # read two steps ahead, since the load is slow and its consumer comes first
                tile_scale = lambda kk: sb_g[block, lax.min(i32(kk), i32(depth - 1))]
                if problem.b_rows:
                    tile_scale = lambda kk: jnp.float32(1)

                def of_rows(kk):
                    """Of a stage, once it is full."""
                    s = _in_ring(first + kk, c.steps)
                    pl.when(kk < depth)(lambda: plgpu.barrier_wait(full.at[s]))
                    return sa_s[s, mine]

                def step(kk, carry, near):
                    total, scale, after, rows = carry
                    s = _in_ring(first + kk, c.steps)
                    later = tile_scale(kk + 2)

                    def of_columns():
                        at = sb_s[0].at[_in_ring(first + kk, slots), pl.ds(0, bn)]
                        return _across(plgpu.load(at, layout=ALONG), bn)

                    def product(acc):
                        b = b_s.at[s, pl.ds(0, bn)]
                        plgpu.wgmma(acc, a_s.at[s, mine], b.transpose((1, 0)))
                        kept = total * of_columns() if near else total
                        return kept, of_rows(kk + 1), acc[...]

                    kept, soon, got = pl.run_scoped(product, plgpu.ACC((LINES, bn), F32))
                    plgpu.barrier_arrive(empty.at[s])
                    if not problem.b_rows:
                        rows *= scale
                    elif not near:
                        got *= of_columns()
                    return kept + got * _down(rows, bn), after, later, soon

                zero = plgpu.layout_cast(jnp.zeros((LINES, bn), F32), plgpu.Layout.WGMMA)
                carry = zero, tile_scale(0), tile_scale(1), of_rows(0)
                sums = lambda near: functools.partial(
                    lax.fori_loop, 0, depth, functools.partial(step, near=near)
                )
                if problem.b_rows:  # two loops in turn, one of no steps, were slower
                    near = near_g[0][block]
                    total, *_ = lax.cond(near == 1, sums(True), sums(False), carry)
                    last = sb_g.at[depth + near * (depth + 1), pl.ds(column, bn)]
                    total *= _across(plgpu.load(last, layout=ALONG, optimized=False), bn)
                else:
                    total, *_ = sums(False)(carry)
                for slot, q in enumerate(range(0, bn, strip)):
                    held = o_s.at[group, slot % c.outs]
                    plgpu.wait_smem_to_gmem(c.outs - 1, wait_read_only=True)
                    held[...] = total[:, q : q + strip].astype(out)
                    plgpu.commit_smem()
                    where = pl.ds(row + group * LINES, LINES), pl.ds(column + q, strip)
                    plgpu.copy_smem_to_gmem(held, o_g.at[where])

            sweep(multiply)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, STRIP // size)), plgpu.SwizzleTransform(STRIP))
    scratch = [
        plgpu.SMEM((c.steps, bm, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, c.bn, BLOCK), F8, transforms=tiled(1)),
        plgpu.SMEM((c.steps, bm), F32),
        plgpu.SMEM((GROUPS, c.outs, LINES, strip), out, transforms=tiled(out.itemsize)),
        plgpu.Barrier(num_arrivals=3 + problem.b_rows, num_barriers=c.steps),
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=c.steps),
    ]
    if problem.b_rows:
        scratch.append(plgpu.SMEM((slots, c.bn), F32))
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), out),
        grid=(c.blocks,),
        grid_names=("sm",),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    if not problem.b_rows:
        return run
    return lambda a, a_scale, b, b_scale: run(a, a_scale, b, *_columns(a_scale, b_scale))


NEAR = 2.0**40  # how far from 1, and from each other, scales of a column may be


def _columns(a_scale: jax.Array, b_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What columns are multiplied with, and which 128 of them may have totals in units.

    Scales [k / 128], 1, what takes a total from the units of one block to those of the next
    [k / 128], the last unit. A total in units is below NEAR^2 times the products of codes, 2^25 per
    block.
    """
    one = jnp.ones_like(b_scale[:1])
    rows = jnp.concatenate([b_scale, one, one, b_scale[:-1] / b_scale[1:], b_scale[-1:]])
    least, most = jnp.min(b_scale, 0), jnp.max(b_scale, 0)
    near = (least >= 1 / NEAR) & (most <= NEAR) & (most <= NEAR * least)
    near = jnp.all(near.reshape(-1, BLOCK), 1) & jnp.all(a_scale <= NEAR)
    return rows, near.astype(jnp.int32)


def _in_ring(count: jax.Array, size: int) -> jax.Array:
    """`count` mod `size`, unsigned: of powers of two that is one instruction."""
    return lax.rem(count.astype(jnp.uint32), jnp.uint32(size)).astype(jnp.int32)


def _down(v: jax.Array, bn: int) -> jax.Array:
    return lax.broadcast_in_dim(v, (LINES, bn), (0,))


def _across(v: jax.Array, bn: int) -> jax.Array:
    return lax.broadcast_in_dim(v, (LINES, bn), (1,))
