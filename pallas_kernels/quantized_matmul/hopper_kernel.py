"""The Hopper kernel, m <= 16: x by 4- or 8-bit weights that are streamed once, in one launch.

x is stationary: every warp keeps the x of its own stretch of k in registers, in operand order, and
weights stream past it, 16 output channels at a time, through the warp's own ring in shared memory.
A warp decodes its tiles straight into the A operands of `mma.m16n8k16` (`hopper_decode`): bits of
codes in their places, for x times a power of two. What stands for 0 of integers comes off by way of
the sums of x, which the warp takes once: an accumulator starts at -center * sum(x). Pairs of a
codebook's values are looked up in a table, which a block writes first (`hopper_pairs`). The scale
of a group is applied to its accumulator in float32, that of a channel to the sums of a warp. The
warps' sums meet in shared memory; blocks of a cluster, which split k further, send theirs to the
block that owns the channels. All sums are taken in fixed order.

Several weights of one x are tiles of one sequence: a tile's row says which of them it is fetched
from, and which result its sums go to.

The rings begin to fill while the kernel before still runs (`chained`): weights are not its results.
x is asked for before they are full, or it would wait in line behind all of their bytes.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chained import follow
from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_norm import Norm
from pallas_kernels.quantized_matmul.hopper_pairs import write_pairs
from pallas_kernels.quantized_matmul.hopper_ring import Ring
from pallas_kernels.quantized_matmul.hopper_shape import shape_of
from pallas_kernels.quantized_matmul.hopper_step import step
from pallas_kernels.quantized_matmul.hopper_sums import Exchange, push, write
from pallas_kernels.quantized_matmul.hopper_x import grow_x, load_x, sum_x
from pallas_kernels.quantized_matmul.mosaic_gpu import PAIR_TABLE, Config, plan
from pallas_kernels.quantized_matmul.problem import Problem

LAG = 2  # turns after which a cluster's sums are collected
F32 = jnp.float32


def kernel(
    problem: Problem, config: Config, channels: Sequence[int] | None = None
) -> Callable[..., list[jax.Array]]:
    """`f(x [m, k], [arrays of each weight]) -> [[m, n] of each]` for one problem.

    With a norm in front x is the operands of `add_norm`, and their sum is the first result.

    Args:
      problem: that of all weights side by side; of a gate and what it multiplies: in turn, each to
        whole tiles.
      config: how the work is cut.
      channels: of each weight; None for one weight.

    Raises:
      ValueError: if the config cannot run it.
    """
    weight = problem.weight
    norm, gate = problem.norm is not None, problem.gate is not None
    sizes = plan(problem.m, weight, config, problem.bias, norm, gate)
    if isinstance(sizes, str):
        raise ValueError(f"{config} cannot run {problem}: {sizes}")
    shape = shape_of(problem, sizes)
    c, words = config, shape.words(config.depth)
    parts, buffers = c.cluster * c.warpgroups, min(2, sizes.turns)
    early = min(c.early, c.steps)
    owned = -(-sizes.turns // c.cluster)
    sums_shape = (c.rows * 2 * shape.columns, 64)
    warps = 4 * c.warpgroups
    widths = list(channels or [weight.n])
    ends = list(itertools.accumulate(-(-n // layout.ROWS) for n in widths))
    results = widths[:1] if gate else widths
    scratch = {
        "w_s": plgpu.SMEM((warps, c.steps, words), jnp.int32),
        "full": plgpu.SMEM((warps, c.steps, 2), jnp.int32),
        "sums": plgpu.SMEM((buffers, warps, *sums_shape), F32),
    }
    if c.cluster > 1:
        scratch["slots"] = plgpu.SMEM((owned, c.cluster, *sums_shape), F32)
        scratch["arrived"] = plgpu.SMEM((owned, 2), jnp.int32)
    if shape.values is not None:
        scratch["pairs"] = plgpu.SMEM(PAIR_TABLE, jnp.int32)
    if norm:
        scratch["squares"] = plgpu.SMEM((warps, 8 * shape.columns), F32)

    keep_x, meet = load_x(shape, config), ptx.meet()
    grow = grow_x(shape, config) if shape.values is None else lambda x: x
    add_up = sum_x(shape, config) if shape.start else None
    fill = write_pairs(shape.values, c.warpgroups) if shape.values is not None else None
    multiply = [step(shape, config, row) for row in range(c.rows)]
    ring = Ring(shape, config, ends)
    send, exchange = push(shape, config), Exchange(c.cluster * sums_shape[0] * 256)
    write_warps = write(shape, config, warps, results)
    write_blocks = write(shape, config, c.cluster, results)

    def quantized_matmul(
        *refs, w_s, full, sums, slots=None, arrived=None, squares=None, pairs=None
    ):
        refs, outs = refs[: -len(results)], list(refs[-len(results) :])
        if norm:
            x, y, factor, *refs, total = refs
            front = Norm(shape, config, factor.dtype)
        else:
            x, *refs = refs
        count, tables = len(shape.pieces), [pairs] if fill is not None else []
        weights = [list(refs[i * count : (i + 1) * count]) for i in range(len(ends))]
        block = lax.axis_index("n")
        rank = lax.axis_index("k") if c.cluster > 1 else np.int32(0)
        wg = lax.axis_index("wg") if c.warpgroups > 1 else np.int32(0)
        part = _quotient((rank * c.warpgroups + wg) * shape.tiles_k, parts)
        along = _thread_wide(lax.min(part, np.int32(shape.tiles_k - sizes.box)))
        turns = _quotient(shape.tiles_n // c.rows - block + sizes.grid - 1, sizes.grid)

        def channel(turn):
            rows = c.rows // 2 if gate else c.rows
            return _thread_wide((block + turn * sizes.grid) * rows * layout.ROWS)

        def fetch(tile):
            turn, row = _quotient(tile, c.rows), lax.rem(tile, np.int32(c.rows))
            row = (block + turn * sizes.grid) * c.rows + row
            ring.fetch(weights, w_s, full, _thread_wide(tile), _thread_wide(row), along)

        def collect(turn):
            """Adds the blocks' sums of a turn, in the block that owns it."""

            def add():
                own = _quotient(turn, c.cluster)
                exchange.wait(arrived.at[own])
                write_blocks(outs, slots.at[own], channel(turn), [])

            _when((turn >= 0) & (lax.rem(turn, np.int32(c.cluster)) == rank), add)

        def begin(tile, _):
            fetch(tile)
            return _

        ring.open(full)
        factor = front.weight(factor) if norm else None
        if shape.has("bias"):  # its words are made in the call, by the kernel before perhaps
            follow()
        lax.fori_loop(0, early, begin, np.int32(0))
        if c.cluster > 1:
            exchange.open(arrived)
        if fill is not None:
            fill(pairs)
        if not shape.has("bias"):
            follow()
        rest = functools.partial(lax.fori_loop, early, c.steps, begin, np.int32(0))
        if norm:
            own = front.run(x, y, factor, squares, total, _thread_wide(block), rest)
        else:
            own = keep_x(x)
            rest()
        kept = (grow(own),)
        if add_up is not None:
            kept += (add_up(kept[0]),)
        if c.cluster > 1:
            exchange.meet()
        if fill is not None:
            meet()

        def one_turn(turn, _):
            mine = sums.at[lax.rem(turn, np.int32(buffers))]
            for row in range(c.rows):
                tile = turn * c.rows + row
                at = lax.rem(tile, np.int32(c.steps))
                phase = lax.rem(_quotient(tile, c.steps), np.int32(2))
                ring.wait(full.at[:, at], _thread_wide(phase))
                multiply[row](w_s.at[:, at], mine, kept, tables)
                fetch(tile + c.steps)
            meet()  # also: whoever comes here has read the sums of the turn before
            if c.cluster == 1:
                write_warps(outs, mine, channel(turn), [squares] if norm else [])
                return _
            own = _quotient(turn, c.cluster)
            owner = _thread_wide(lax.rem(turn, np.int32(c.cluster)))
            send(slots.at[own, rank], arrived.at[own], mine, owner)
            collect(turn - LAG)
            return _

        lax.fori_loop(0, turns, one_turn, np.int32(0))
        if c.cluster > 1:
            for back in range(LAG, 0, -1):
                collect(turns - back)

    options: dict[str, Any] = {}
    if c.cluster > 1:
        options |= {"cluster": (c.cluster,), "cluster_names": ("k",)}
    if c.warpgroups > 1:
        options |= {"num_threads": c.warpgroups, "thread_name": "wg"}
    run = plgpu.kernel(
        quantized_matmul,
        out_type=[
            *([jax.ShapeDtypeStruct((shape.m, shape.k), jnp.bfloat16)] if norm else []),
            *(jax.ShapeDtypeStruct((shape.m, n), shape.out) for n in results),
        ],
        scratch_types=scratch,
        grid=(sizes.grid,),
        grid_names=("n",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **options,
    )

    def call(x, arrays):
        held = [{**one, "bias": _bias_words(one.get("bias"))} for one in arrays]
        return run(
            *(x if norm else [x]), *(one[piece.name] for one in held for piece in shape.pieces)
        )

    return call


def _bias_words(bias: jax.Array | None) -> jax.Array | None:
    """A bias `[n]` as the scales of channels lie."""
    if bias is None:
        return None
    rows = -(-bias.shape[0] // layout.ROWS)
    padded = jnp.pad(bias, (0, rows * layout.ROWS - bias.shape[0])).reshape(rows, 1, layout.ROWS)
    return lax.bitcast_convert_type(padded, jnp.int32)


def _when(condition: jax.Array, act: Callable[[], None]) -> None:
    """Acts where a condition holds. `pl.when` converts it to an integer, for which Mosaic GPU asks
    ptxas for its version each time.
    """
    lax.switch(lax.select(condition, np.int32(1), np.int32(0)), [lambda: None, act])


def _quotient(value: jax.Array, by: int) -> jax.Array:
    """`value // by` of what is not negative."""
    return lax.div(value, np.int32(by))


def _thread_wide(scalar: jax.Array) -> jax.Array:
    """A scalar as `SCALAR`, the one form in which inline code takes it."""
    return lax.broadcast(scalar, (128,))
