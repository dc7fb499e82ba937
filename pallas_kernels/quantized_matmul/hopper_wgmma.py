"""The Hopper kernel for m > 16: the weight is `wgmma`'s register operand, decoded beside it.

result^T [n, m] = w^T [n, k] x^T [k, m]. One warpgroup issues TMA into a ring of stages and runs
ahead over the borders of tiles; two each take 64 channels of a tile: packed words from shared
memory to registers, the exchange between lanes, bfloat16 and scale (`hopper_fragments`), then
`wgmma` with x from shared memory. While the tensor cores multiply one stage a warpgroup decodes
the next. Where there are fewer tiles than multiprocessors the blocks of a cluster split k, and each
adds up and writes its share of the rows; else they can share the tiles of x by multicast.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more, and
# jax 0.10, which is too old for the kernel, hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportOptionalSubscript=false
# pyright: reportOptionalMemberAccess=false

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_finish import Parts, finish
from pallas_kernels.quantized_matmul.hopper_fragments import fragments
from pallas_kernels.quantized_matmul.hopper_sums import Exchange
from pallas_kernels.quantized_matmul.mosaic_wgmma import (
    CHANNELS,
    MULTIPROCESSORS,
    STRIP,
    Config,
    part_names,
    part_words,
)
from pallas_kernels.quantized_matmul.mosaic_wgmma import fits as misfit
from pallas_kernels.quantized_matmul.problem import Problem

F32 = jnp.float32
WARPGROUPS = 2  # that multiply; the next one loads
TILES = CHANNELS // layout.ROWS


def kernel(
    problem: Problem, config: Config, channels: Sequence[int] | None = None, twin: Any = None
) -> Callable[..., jax.Array]:
    """`f(x [m, k], [arrays of each weight]) -> [m, n]` for one problem.

    Args:
      problem: that of all weights side by side.
      config: how the work is cut.
      channels: of each weight, multiples of 128; None for one weight.
      twin: to interpret the kernel, which knows neither inline code nor `wgmma` on registers: a
        list of functions in place of `fragments`; what they return goes through shared memory.

    Raises:
      ValueError: if the config cannot run it.
    """
    reason = misfit(problem, config)
    if reason is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    c, weight, m = config, problem.weight, problem.m
    out, i32 = jnp.dtype(problem.out), jnp.int32
    names, wide = part_names(weight), c.strips * STRIP
    code_words = layout.code_words(weight) // 2 * c.strips
    words = [code_words, *(part_words(weight, n, c.strips) for n in names)]
    decode = twin or [fragments(weight, c.strips, half) for half in range(c.strips)]
    clustered = c.split * c.shared > 1
    depth, per_tile = -(-weight.k // layout.DEPTH), 2 // c.strips  # tiles along k, their stages
    n_tiles = -(-weight.n // (CHANNELS * c.shared))
    tiles = (-(-m // c.rows), n_tiles)
    count = tiles[0] * tiles[1]
    own_rows = c.rows // c.split
    blocks = count if c.split > 1 else min(count, MULTIPROCESSORS // c.shared)
    last = finish(problem, own_rows)
    parts = Parts(c.rows, c.split)
    exchange = Exchange(CHANNELS * c.rows * 4)
    sizes = channels or [weight.n]
    begins = [0, *itertools.accumulate(-(-n // CHANNELS) for n in sizes)]
    ends = ["scale"] * layout.per_channel(weight) + ["bias"] * problem.bias

    def quantized_matmul(
        x_g,
        *refs,
        x_s,
        w_s,
        o_s,
        full,
        empty,
        slots: Any = None,
        arrived: Any = None,
        a_s: Any = None,
    ):
        weights = [refs[i * len(words) : (i + 1) * len(words)] for i in range(len(sizes))]
        *channel_refs, o_g = refs[len(sizes) * len(words) :]
        group = lax.axis_index("wg")
        rank = lax.axis_index("cluster") if clustered else i32(0)
        if c.split > 1:
            exchange.open(arrived)
            exchange.meet()
            begin, end = rank * depth // c.split, (rank + 1) * depth // c.split
        else:
            begin, end = i32(0), i32(depth)

        def tile(info):
            mi, ni = plgpu.planar_snake(info.index[0], tiles, 0, c.width)
            if c.shared > 1:
                ni = ni * c.shared + rank
            return mi, ni, info.local_index * (depth * per_tile)

        @pl.when(group == WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.nd_loop((count,), collective_axes="sm")
            def _(info):
                mi, ni, first = tile(info)

                @pl.loop(0, (end - begin) * per_tile)
                def _(i):
                    s, at = lax.rem(first + i, i32(c.steps)), begin * per_tile + i
                    plgpu.barrier_wait(empty.at[s])
                    fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                    block = x_g.at[pl.ds(mi * c.rows, c.rows), pl.ds(at * wide, wide)]
                    fetch(block, x_s.at[s], collective_axes="cluster" if c.shared > 1 else None)
                    deep, half = (at, 0) if c.strips == 2 else (at // 2, lax.rem(at, i32(2)))

                    def take(held, begin):
                        row = pl.ds((ni - begin) * TILES, TILES)
                        for array, stage, size in zip(held, w_s, words, strict=True):
                            along = [] if array.shape[-1] == size else [pl.ds(half * size, size)]
                            fetch(array.at[(row, deep, *along)], stage.at[s])

                    if len(sizes) == 1:
                        take(weights[0], 0)
                        return
                    for j, held in enumerate(weights):  # what is beyond the last reads as zeros
                        here = ni >= begins[j]
                        if j + 1 < len(weights):
                            here = here & (ni < begins[j + 1])
                        pl.when(here)(functools.partial(take, held, begins[j]))

            for s in range(c.steps):  # a neighbor still arrives at barriers of this block
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            for s in range(c.steps):
                plgpu.barrier_arrive(empty.at[s])

            @plgpu.nd_loop((count,), collective_axes="sm")
            def _(info):
                mi, ni, first = tile(info)

                def stage(tile, half):
                    """Where the strip `half` of a tile along k lies."""
                    at = first + (tile if c.strips == 2 else 2 * tile + half)
                    return lax.rem(at, i32(c.steps))

                def operand(tile, half):
                    s = stage(tile, half)
                    if c.strips == 1 or half == 0:
                        plgpu.barrier_wait(full.at[s])
                    mine = pl.ds(group * (TILES // 2), TILES // 2)
                    return decode[half % c.strips]([held.at[s, mine] for held in w_s])

                def multiply(tile, half, acc, held):
                    at = pl.ds(half * STRIP if c.strips == 2 else 0, STRIP)
                    if twin is not None:
                        a_s[group] = held
                        plgpu.commit_smem()
                        held = a_s.at[group]
                    plgpu.wgmma(acc, held, x_s.at[stage(tile, half), :, at].transpose((1, 0)))

                def finished(tile, half):
                    plgpu.wgmma_wait(0)
                    if c.strips == 1 or half == 1:
                        plgpu.barrier_arrive(empty.at[stage(tile, half)])

                # Two strips a turn, so that the operands of two products have their own registers:
                # with one set the compiler does not let products and decoding overlap.
                def product(acc):
                    def turn(tile, first_half, last):
                        multiply(tile, 0, acc, first_half)
                        second_half = operand(tile, 1)
                        finished(tile, 0)
                        multiply(tile, 1, acc, second_half)
                        later = first_half if last else operand(tile + 1, 0)
                        finished(tile, 1)
                        return later

                    more = functools.partial(turn, last=False)
                    held = lax.fori_loop(0, end - begin - 1, more, operand(i32(0), 0))
                    turn(end - begin - 1, held, last=True)
                    return acc[...]

                total = pl.run_scoped(product, plgpu.ACC((64, c.rows), F32))
                if c.split > 1:
                    parts.send(total, slots, arrived)
                    exchange.wait(arrived.at[0])
                    total = parts.add(slots)
                channel = jnp.broadcast_to(ni * CHANNELS + group * 64, (128,))
                y = last(total, channel_refs, channel)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if out.itemsize == 4:  # what is narrower is transposed as it is stored
                    y = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                o_s.at[group].transpose((1, 0))[...] = y
                plgpu.commit_smem()
                where = (
                    pl.ds(mi * c.rows + (rank * own_rows if c.split > 1 else 0), own_rows),
                    pl.ds(ni * CHANNELS + group * 64, 64),
                )
                plgpu.copy_smem_to_gmem(o_s.at[group], o_g.at[where])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128))
    emptied = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=c.steps)
    if c.shared > 1:
        emptied = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=WARPGROUPS, num_barriers=c.steps
        )
    scratch: dict[str, Any] = {
        "x_s": plgpu.SMEM((c.steps, c.rows, wide), jnp.bfloat16, transforms=tiled(2)),
        "w_s": [plgpu.SMEM((c.steps, TILES, size), jnp.int32) for size in words],
        "o_s": plgpu.SMEM((WARPGROUPS, own_rows, 64), out, transforms=tiled(out.itemsize)),
        "full": plgpu.Barrier(num_arrivals=1 + len(words), num_barriers=c.steps),
        "empty": emptied,
    }
    if c.split > 1:
        scratch["slots"] = plgpu.SMEM((WARPGROUPS * c.rows // 8 * 128 * 4,), F32)
        scratch["arrived"] = plgpu.SMEM((1, 2), i32)
    if twin is not None:
        scratch["a_s"] = plgpu.SMEM((WARPGROUPS, 64, STRIP), jnp.bfloat16, transforms=tiled(2))
    options: dict[str, Any] = {}
    if clustered:
        options = {"cluster": (c.split * c.shared,), "cluster_names": ("cluster",)}
    run = plgpu.kernel(
        quantized_matmul,
        out_type=jax.ShapeDtypeStruct((_up(m, 8), _wide(weight.n)), out),
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )

    def call(x, arrays):
        held = [one[n] for one in arrays for n in ("codes", *names)]
        whole = jnp.pad(x, ((0, _up(m, 8) - m), (0, _wide(weight.k) - weight.k)))
        y = run(whole, *held, *(_of_channels([one[n] for one in arrays], sizes) for n in ends))
        return y[:m, : weight.n]

    return call


def _up(size: int, unit: int) -> int:
    """The next multiple: what TMA cuts x and the result into must divide them."""
    return -(-size // unit) * unit


def _wide(size: int) -> int:
    """As `_up` to 64, and at least two of them: a tile of 64 along an axis of 64 loses its index on
    the way to TMA, so that the second would lie on the first.
    """
    return max(_up(size, STRIP), 2 * STRIP)


def _of_channels(held: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """A number for each channel of all weights, float32, of whole tiles."""

    def of_one(values, n):
        if values.dtype == jnp.int32:  # scales, as they lie
            values = lax.bitcast_convert_type(values, F32).reshape(-1)
        return values[:n]

    values = jnp.concatenate([of_one(*pair) for pair in zip(held, sizes, strict=True)])
    return jnp.pad(values, (0, _up(sum(sizes), 2 * CHANNELS) - sum(sizes)))
