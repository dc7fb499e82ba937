"""The Hopper kernel for m > 16: the weight is `wgmma`'s register operand, decoded beside it.

result^T [n, m] = w^T [n, k] x^T [k, m]. One warp issues TMA into a ring of stages and runs ahead
over the borders of tiles; warpgroups each take 64 channels of a tile: packed words from
shared memory to registers, bfloat16 and scale (`hopper_fragments`),
then `wgmma` with x from shared memory. While the tensor cores multiply one stage a warpgroup
decodes its next. Two teams of warpgroups may take stages in turns. Where a round of tiles, the only
one or the last, is too short for all multiprocessors, the blocks of a cluster can split k: teams
are added up first, then each block gets the sums of its share of the rows and writes them. Or
blocks share the tiles of x by multicast.
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
from pallas_kernels.quantized_matmul.hopper_finish import Blocks, Teams, finish
from pallas_kernels.quantized_matmul.hopper_fragments import fragments
from pallas_kernels.quantized_matmul.hopper_pairs import write_pairs
from pallas_kernels.quantized_matmul.hopper_sums import Exchange
from pallas_kernels.quantized_matmul.mosaic_gpu import PAIR_TABLE
from pallas_kernels.quantized_matmul.mosaic_wgmma import (
    STRIP,
    Config,
    block_words,
    part_names,
    part_words,
    rounds,
    strips_out,
    team_words,
    unfilled,
)
from pallas_kernels.quantized_matmul.mosaic_wgmma import fits as misfit
from pallas_kernels.quantized_matmul.mosaic_wgmma import turns as turns_of
from pallas_kernels.quantized_matmul.problem import Problem
from pallas_kernels.warpgroups import by_turns, write_strips

F32 = jnp.float32
REGISTERS = 65536  # of a block
LOADER = 32  # registers of a thread that loads


def kernel(
    problem: Problem, config: Config, channels: Sequence[int] | None = None, twin: Any = None
) -> Callable[..., jax.Array]:
    """`f(x [m, k], [arrays of each weight]) -> [m, n]` for one problem.

    Args:
      problem: that of all weights side by side.
      config: how the work is cut.
      channels: of each weight, multiples of those of a tile; None for one weight.
      twin: to interpret the kernel, which knows neither inline code nor `wgmma` on registers: a
        function in place of `fragments`; what it returns goes through shared memory.

    Raises:
      ValueError: if the config cannot run it.
    """
    reason = misfit(problem, config)
    if reason is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    c, weight, m = config, problem.weight, problem.m
    out, i32 = jnp.dtype(problem.out), jnp.int32
    members = c.channels // STRIP  # warpgroups of a team
    warpgroups = members * c.teams  # that multiply; the next one loads
    rows16 = c.channels // layout.ROWS
    names, wide = part_names(weight), c.strips * STRIP
    code_words = layout.code_words(weight) // 2 * c.strips
    words = [code_words, *(part_words(weight, n, c.strips) for n in names)]
    decode = twin or fragments(weight, c.strips)
    fill = write_pairs(weight.values, warpgroups) if weight.values and twin is None else None
    clustered = c.split * c.shared > 1
    # a turn: two stages of each team; what is beyond k reads as zeros
    per_turn, turns = 2 * c.teams, turns_of(weight.k, c)
    tiles = (-(-m // c.rows), -(-weight.n // (c.channels * c.shared)))
    cut, outs, strip = rounds(m, weight.n, c), *strips_out(c)
    teams, blocks = Teams(c.rows, c.teams, members), Blocks(c.rows, c.split, members)
    last, last_joint = (finish(problem, c.rows // split) for split in (1, c.split))
    exchange = Exchange(4 * block_words(c))
    sizes = channels or [weight.n]
    if unfilled(sizes, c):
        raise ValueError(
            f"{config} cannot run weights of {sizes} channels side by side: each must be a "
            f"multiple of {c.channels}, or the config have fewer channels"
        )
    begins = [0, *itertools.accumulate(-(-n // c.channels) for n in sizes)]
    ends = ["scale"] * layout.per_channel(weight) + ["bias"] * problem.bias

    def quantized_matmul(
        x_g,
        *refs,
        x_s,
        w_s,
        o_s,
        full,
        empty,
        left: Any = None,
        slots: Any = None,
        arrived: Any = None,
        pairs: Any = None,
        a_s: Any = None,
    ):
        weights = [refs[i * len(words) : (i + 1) * len(words)] for i in range(len(sizes))]
        *channel_refs, o_g = refs[len(sizes) * len(words) :]
        group = lax.axis_index("wg")
        rank = lax.axis_index("cluster") if clustered else i32(0)
        tables = [pairs] if fill is not None else []
        if cut.rest:
            exchange.open(arrived)  # all meet before the sums: no load waits for a neighbor

        def each_tile(take: Callable[..., None]) -> None:
            """`take(row, column of tiles, first stage, (begin, end) of its turns, its k is split)`
            of all tiles of this block.
            """

            def one(number, round_, parted):
                mi, ni = plgpu.planar_snake(number, tiles, 0, c.width)
                if c.shared > 1:
                    ni = ni * c.shared + rank
                share = i32(0), i32(turns)
                if parted:
                    share = rank * turns // c.split, (rank + 1) * turns // c.split
                take(mi, ni, round_ * (turns * per_turn), share, parted)

            if cut.whole:

                @plgpu.nd_loop((cut.whole // c.split,), collective_axes="sm")
                def _(info):
                    number = info.index[0] * c.split + (rank if c.split > 1 else 0)
                    one(number, info.local_index, False)

            if cut.rest:
                cluster, before = lax.axis_index("sm"), cut.whole // (cut.clusters * c.split)
                mine = functools.partial(one, cut.whole + cluster, i32(before), True)
                mine() if cut.rest == cut.clusters else pl.when(cluster < cut.rest)(mine)

        def load_tile(mi, ni, first, share, parted):
            begin, end = share

            @pl.loop(0, (end - begin) * per_turn)
            def _(i):
                s, at = lax.rem(first + i, i32(c.steps)), begin * per_turn + i
                plgpu.barrier_wait(empty.at[s])
                fetch = functools.partial(plgpu.copy_gmem_to_smem, barrier=full.at[s])
                block = x_g.at[pl.ds(mi * c.rows, c.rows), pl.ds(at * wide, wide)]
                fetch(block, x_s.at[s], collective_axes="cluster" if c.shared > 1 else None)
                deep, half = (at, 0) if c.strips == 2 else (at // 2, lax.rem(at, i32(2)))

                def take(held, begin):
                    row = pl.ds((ni - begin) * rows16, rows16)
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

        def load():
            each_tile(load_tile)
            for s in range(c.steps):  # a neighbor still arrives at barriers of this block
                plgpu.barrier_wait(empty.at[s])

        @pl.when(group == warpgroups)
        def _():
            plgpu.set_max_registers(LOADER, action="decrease")

            # its other three warps would take issue slots from those that decode
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(load))
            if cut.rest:
                exchange.meet()

        @pl.when(group < warpgroups)
        def _():
            plgpu.set_max_registers(registers(warpgroups), action="increase")
            team, member = lax.div(group, i32(members)), lax.rem(group, i32(members))
            for s in range(0, c.steps, c.teams):
                plgpu.barrier_arrive(empty.at[s + team])
            if fill is not None:
                fill(pairs)
                teams.meet()

            def multiply_tile(mi, ni, first, share, parted):
                place = lambda i: lax.rem(first + i * c.teams + team, i32(c.steps))
                begin, end = share

                def operand(i):
                    """Of the team's stage i, decoded."""
                    plgpu.barrier_wait(full.at[place(i)])
                    mine = pl.ds(member * (STRIP // layout.ROWS), STRIP // layout.ROWS)
                    return decode([*(held.at[place(i), mine] for held in w_s), *tables])

                def multiply(i, acc, held):
                    if twin is not None:
                        a_s[group] = held
                        plgpu.commit_smem()
                        held = a_s.at[group]
                    plgpu.wgmma(acc, held, x_s.at[place(i)].transpose((1, 0)))
                    if twin is not None:
                        plgpu.wgmma_wait(0)

                def finished(i):
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[place(i)])

                def product(acc):
                    by_turns(end - begin, operand, lambda i, a: multiply(i, acc, a), finished)
                    return acc[...]

                total = pl.run_scoped(product, plgpu.ACC((64, c.rows), F32))
                if c.teams > 1:
                    teams.meet()  # the first one has taken what was left for it before
                    pl.when(team > 0)(lambda: teams.leave(total, left))
                    teams.meet()
                if parted:
                    exchange.meet()

                @pl.when(team == 0)
                def _():
                    sums = teams.add(total, left) if c.teams > 1 else total
                    channel = jnp.broadcast_to(ni * c.channels + member * STRIP, (128,))
                    row, channels = mi * c.rows, pl.ds(ni * c.channels + member * STRIP, STRIP)
                    if parted:
                        blocks.send(sums, slots, arrived)
                        exchange.wait(arrived.at[0])
                        row += rank * (c.rows // c.split)
                        y = last_joint(blocks.add(sums, slots), channel_refs, channel)
                    else:
                        y = last(sums, channel_refs, channel)
                    write_strips(y, o_s, member, o_g, row, channels)

            each_tile(multiply_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128))
    emptied = plgpu.Barrier(num_arrivals=members, num_barriers=c.steps)
    if c.shared > 1:
        emptied = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=members, num_barriers=c.steps
        )
    scratch: dict[str, Any] = {
        "x_s": plgpu.SMEM((c.steps, c.rows, wide), jnp.bfloat16, transforms=tiled(2)),
        "w_s": [plgpu.SMEM((c.steps, rows16, size), jnp.int32) for size in words],
        "o_s": plgpu.SMEM((members, outs, strip, STRIP), out, transforms=tiled(out.itemsize)),
        "full": plgpu.Barrier(num_arrivals=1 + len(words), num_barriers=c.steps),
        "empty": emptied,
    }
    if c.teams > 1:
        scratch["left"] = plgpu.SMEM((team_words(c),), F32)
    if fill is not None:
        scratch["pairs"] = plgpu.SMEM(PAIR_TABLE, i32)
    if cut.rest:
        scratch["slots"] = plgpu.SMEM((block_words(c),), F32)
        scratch["arrived"] = plgpu.SMEM((1, 2), i32)
    if twin is not None:
        scratch["a_s"] = plgpu.SMEM((warpgroups, 64, wide), jnp.bfloat16, transforms=tiled(2))
    options: dict[str, Any] = {}
    if clustered:
        options = {"cluster": (c.split * c.shared,), "cluster_names": ("cluster",)}
    run = plgpu.kernel(
        quantized_matmul,
        out_type=jax.ShapeDtypeStruct((_up(m, 8), _wide(weight.n)), out),
        grid=(cut.clusters,),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )

    def call(x, arrays):
        held = [one[n] for one in arrays for n in ("codes", *names)]
        whole = jnp.pad(x, ((0, _up(m, 8) - m), (0, _wide(weight.k, wide) - weight.k)))
        unit = c.channels * c.shared
        of_each = [_of_channels([one[n] for one in arrays], sizes, unit) for n in ends]
        y = run(whole, *held, *of_each)
        return y[:m, : weight.n]

    return call


def _up(size: int, unit: int) -> int:
    """The next multiple: what TMA cuts x and the result into must divide them."""
    return -(-size // unit) * unit


def _wide(size: int, box: int = STRIP) -> int:
    """As `_up` to 64, and at least two boxes: along an axis of one its index is lost on the way to
    TMA, so that the second would lie on the first.
    """
    return max(_up(size, STRIP), 2 * box)


def registers(warpgroups: int) -> int:
    """Of a thread that multiplies: its share of those that the block was launched with."""
    threads = 128 * (warpgroups + 1)
    held = REGISTERS // threads // 8 * 8 * (warpgroups + 1)
    return min(232, (held - LOADER) // warpgroups // 8 * 8)


def _of_channels(held: Sequence[jax.Array], sizes: Sequence[int], unit: int) -> jax.Array:
    """A number for each channel of all weights, float32, to whole tiles of `unit` channels: lanes
    read those of all channels of a tile.
    """

    def of_one(values, n):
        if values.dtype == jnp.int32:  # scales, as they lie
            values = lax.bitcast_convert_type(values, F32).reshape(-1)
        return values[:n]

    values = jnp.concatenate([of_one(*pair) for pair in zip(held, sizes, strict=True)])
    return jnp.pad(values, (0, _up(sum(sizes), unit) - sum(sizes)))
