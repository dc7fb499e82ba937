"""The Hopper kernel: int8 multiplied on tensor cores, the weight as the register operand.

result^T [n, m] = w^T [n, k] x^T [k, m]. Persistent and warp-specialized: one warp issues TMA into a
ring of stages and runs ahead over the borders of tiles; two warpgroups have 64 channels each. Codes
of `hopper8` lie in the order of a bfloat16 operand, two channels in turn: a byte permutation of two
words makes a register of `wgmma`'s int8 operand, where x has its k in the order `of_x`. Sums are
int32, then float32 times the scale of the row of x; onto those the tensor cores add the second
operand, bfloat16 columns of x by the rows of codes that they meet.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more, and
# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportOptionalSubscript=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.int8_matmul.mosaic_gpu import CHANNELS, COLUMNS, STRIP, Config
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_layout import DEPTH, ROWS
from pallas_kernels.warpgroups import by_turns, scales, write_strips

F32, BF16, I8, I32 = jnp.float32, jnp.bfloat16, jnp.int8, jnp.int32
GROUPS = 2  # warpgroups that multiply; the next one loads
LINES = 64  # channels of a warpgroup
WORDS = ROWS * DEPTH // 4  # of a tile's codes
BOX = 256  # words that TMA takes along an axis
LOADER, MULTIPLIER = 40, 232  # registers of a thread
HALVES = 0x6420, 0x7531  # bytes of two words that are channel r, and r + 8
FLIP = 0x80808080  # codes are held plus 128


def of_x(x: jax.Array) -> jax.Array:
    """Codes `[m, k]` with k in the order in which lanes hold the weight, and whole stages of it.

    Lane c has k = 8 c + 4 h + i of each 32 where `wgmma` reads 16 h + 4 c + i.
    """
    m, k = x.shape
    # two stages at least: along an axis of one its index is lost on the way to TMA
    whole = jnp.pad(x, ((0, 0), (0, max(_up(k, DEPTH), 2 * DEPTH) - k)))
    return whole.reshape(m, -1, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(m, -1)


def operand() -> Any:
    """`f(codes of a stage from a warpgroup's first tile on) -> int8 [64, 128]`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((LINES, DEPTH), I8, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def take(ctx, codes):
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        warp, lane = ptx.lane()
        tile = arith.muli(arith.andi(warp, ptx.number(3)), ptx.number(WORDS))
        r, c = arith.shrui(lane, ptx.number(2)), arith.andi(lane, ptx.number(3))
        start, out = arith.addi(tile, ptx.place(r, c)), []
        for quarter in range(4):
            words = ptx.load(codes, ptx.add(start, 128 * quarter), 4, i32)
            for pair in (words[:2], words[2:]):
                for half in HALVES:
                    code = f"prmt.b32 $0, $1, $2, {half:#x};"
                    held = ptx.asm(i32, code, "=r,r,r", *pair)
                    signed = arith.xori(held, ptx.number(FLIP))
                    out.append(utils.bitcast(signed, four))
        shape = fa.WGMMA_LAYOUT_8BIT.registers_shape((LINES, DEPTH))
        return fa.FragmentedArray(
            _registers=np.array(out, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT_8BIT,
            _is_signed=True,
        )

    return take


def kernel(problem: Problem, config: Config, twin: Any = None) -> Callable[..., jax.Array]:
    """`(x, x_scale, arrays[, columns, their rows of codes [n, columns]]) -> [m, n]`.

    Args:
      problem: what is multiplied.
      config: how the work is cut.
      twin: to interpret the kernel, which knows neither inline code nor `wgmma` on registers nor
        sums that begin at something: a function in place of `operand`; what it returns goes
        through shared memory.
    """
    c, weight, m = config, problem.weight, problem.m
    out, n = jnp.dtype(problem.out), weight.n
    turns = -(-weight.k // (2 * DEPTH))  # of two stages; what is beyond k reads as zeros
    second = -(-problem.outliers // COLUMNS)
    strip = min(STRIP, c.rows)
    outs = min(2, c.rows // strip)  # strips on their way out; they divide those of a tile
    tiles = -(-m // c.rows), -(-n // CHANNELS)
    count = tiles[0] * tiles[1]
    blocks = min(count, c.blocks)
    take = twin or operand()

    def int8_matmul(x_g, scale_x, w_g, scale_w, *refs, x_s, w_s, o_s, full, empty, **more):
        o_g, apart = refs[-1], refs[:-1]
        group = lax.axis_index("wg")

        def sweep(work):
            """`work(first row, tile of channels, how many came before)` of this block's tiles."""

            @plgpu.nd_loop((count,), collective_axes="sm")
            def _(info):
                mi, ni = plgpu.planar_snake(info.index[0], tiles, 0, c.width)
                work(mi * c.rows, ni, info.local_index)

        def load(row, ni, number):
            rows, channels = pl.ds(row, c.rows), pl.ds(ni * (CHANNELS // ROWS), CHANNELS // ROWS)

            @pl.loop(0, 2 * turns)
            def _(i):
                s = lax.rem(number * (2 * turns) + i, I32(c.steps))
                plgpu.barrier_wait(empty.at[s])
                fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                fetch(x_g.at[rows, pl.ds(i * DEPTH, DEPTH)], x_s.at[s])
                fetch(w_g.at[channels, pl.ds(i * 2, 2)], w_s.at[s])

            def load_second(i, _):
                plgpu.barrier_wait(more["spare"])
                along = pl.ds(i * COLUMNS, COLUMNS)
                fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=more["there"])
                fetch(apart[0].at[rows, along], more["columns_s"])
                fetch(apart[1].at[pl.ds(ni * CHANNELS, CHANNELS), along], more["codes_s"])

            if second:
                lax.fori_loop(0, second, load_second, None)

        @pl.when(group == GROUPS)
        def _():
            plgpu.set_max_registers(LOADER, action="decrease")

            def stages():
                sweep(load)
                for s in range(c.steps):  # none is left behind
                    plgpu.barrier_wait(empty.at[s])
                if second:
                    plgpu.barrier_wait(more["spare"])

            # its other three warps would take issue slots from those that multiply
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(stages))

        def multiply(row, ni, number):
            place = lambda i: lax.rem(number * (2 * turns) + i, I32(c.steps))

            def held(i):
                plgpu.barrier_wait(full.at[place(i)])
                mine = pl.ds(group * (LINES // ROWS), LINES // ROWS)
                return take(w_s.at[place(i), mine])

            def product(i, total, codes):
                if twin is not None:
                    more["a_s"][group] = codes
                    plgpu.commit_smem()
                    codes = more["a_s"].at[group]
                plgpu.wgmma(total, codes, x_s.at[place(i)].transpose((1, 0)))

            def finished(i):
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[place(i)])

            def integers(total):
                by_turns(turns, held, lambda i, codes: product(i, total, codes), finished)
                return total[...]

            sums = pl.run_scoped(integers, plgpu.ACC((LINES, c.rows), I32)).astype(F32)
            sums = sums * scales(scale_x.at[pl.ds(row, c.rows)], 1, (LINES, c.rows))

            def added(total):
                if twin is None:
                    total[...] = sums

                @pl.loop(0, second)
                def _(i):
                    plgpu.barrier_wait(more["there"])
                    rows = more["codes_s"].at[pl.ds(group * LINES, LINES)]
                    plgpu.wgmma(total, rows, more["columns_s"].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(more["spare"])

                return total[...] if twin is None else sums + total[...]

            if second:
                sums = pl.run_scoped(added, plgpu.ACC((LINES, c.rows), F32))
            channels = pl.ds(ni * CHANNELS + group * LINES, LINES)
            sums = sums * scales(scale_w.at[channels], 0, (LINES, c.rows))
            write_strips(sums, o_s, group, o_g, row, channels)

        @pl.when(group < GROUPS)
        def _():
            plgpu.set_max_registers(MULTIPLIER, action="increase")
            for s in range(c.steps):
                plgpu.barrier_arrive(empty.at[s])
            if second:
                plgpu.barrier_arrive(more["spare"])
            sweep(multiply)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128))
    scratch: dict[str, Any] = {
        "x_s": plgpu.SMEM((c.steps, c.rows, DEPTH), I8, transforms=tiled(1)),
        "w_s": plgpu.SMEM((c.steps, CHANNELS // ROWS, WORDS // BOX, BOX), I32),
        "o_s": plgpu.SMEM((GROUPS, outs, strip, LINES), out, transforms=tiled(out.itemsize)),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=c.steps),
        "empty": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=c.steps),
    }
    if second:
        scratch["columns_s"] = plgpu.SMEM((c.rows, COLUMNS), BF16, transforms=tiled(2))
        scratch["codes_s"] = plgpu.SMEM((CHANNELS, COLUMNS), BF16, transforms=tiled(2))
        scratch["there"] = plgpu.Barrier(num_arrivals=2)
        scratch["spare"] = plgpu.Barrier(num_arrivals=GROUPS)
    if twin is not None:
        scratch["a_s"] = plgpu.SMEM((GROUPS, LINES, DEPTH), I8, transforms=tiled(1))
    run = plgpu.kernel(
        int8_matmul,
        out_type=jax.ShapeDtypeStruct((_up(m, 8), max(_up(n, LINES), CHANNELS)), out),
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=GROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )

    def call(x, x_scale, arrays, *apart):
        codes = arrays["codes"].reshape(arrays["codes"].shape[0], -1, BOX)
        scale = lax.bitcast_convert_type(arrays["scale"], F32).reshape(-1)
        y = run(
            jnp.pad(of_x(x), ((0, _up(m, 8) - m), (0, 0))),
            jnp.pad(x_scale, (0, _up(m, c.rows) - m)),  # TMA clips, a plain load does not
            codes,
            jnp.pad(scale, (0, _up(n, CHANNELS) - scale.size)),
            *(jnp.pad(v, ((0, _up(v.shape[0], 8) - v.shape[0]), (0, 0))) for v in apart),
        )
        return y[:m, :n]

    return call


def _up(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit
