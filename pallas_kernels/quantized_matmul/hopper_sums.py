"""How the sums of warps and blocks meet, and how they are written."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.mosaic_gpu import Config


def _sigmoid(y: ir.Value, z: ir.Value) -> ir.Value:
    """`y / (1 + exp(-z))`."""
    f32 = ir.F32Type.get()
    power = arith.mulf(z, ptx.real(-1.4426950408889634))  # log2(e)
    grown = ptx.asm(f32, "ex2.approx.ftz.f32 $0, $1;", "=f,f", power)
    return ptx.asm(
        f32, "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", y, arith.addf(grown, ptx.real(1.0))
    )


def _gelu_tanh(y: ir.Value) -> ir.Value:
    """`y sigmoid(2 sqrt(2 / pi) (y + 0.044715 y^3))`, which is the definition by tanh."""
    inner = arith.addf(arith.mulf(arith.mulf(y, y), ptx.real(0.044715)), ptx.real(1.0))
    return _sigmoid(y, arith.mulf(arith.mulf(y, inner), ptx.real(1.5957691216057308)))


# as in epilogue.ACTIVATIONS; a NaN of the sums must stay one
ACTIVATIONS: Mapping[str | None, Callable[[ir.Value], ir.Value]] = {
    None: lambda y: y,
    "relu": lambda y: ptx.asm(ir.F32Type.get(), "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", y),
    "silu": lambda y: _sigmoid(y, y),
    "gelu_tanh": _gelu_tanh,
}


def _each_line(lines: int, config: Config, use: Callable[..., None]) -> None:
    """Warps take turns at the lines: `use` is given the line and the lane.

    Where there are fewer lines than warps, they go to warps of different warpgroups and schedulers.
    """
    warps = 4 * config.warpgroups
    warp, lane = ptx.lane()
    quad, place = arith.shrui(warp, ptx.number(2)), arith.andi(warp, ptx.number(3))
    turned = arith.andi(arith.subi(place, quad), ptx.number(3))
    warp = arith.addi(arith.muli(turned, ptx.number(config.warpgroups)), quad)
    for i in range(-(-lines // warps)):
        line = ptx.add(warp, i * warps)
        live = arith.cmpi(arith.CmpIPredicate.ult, line, ptx.number(lines))
        branch = scf.IfOp(live)
        with ir.InsertionPoint(branch.then_block):
            use(line, lane)
            scf.yield_([])


def _total(
    sums: ir.Value, place: ir.Value, count: int, stride: int, start: int = 0
) -> list[ir.Value]:
    """The pair at word `place + start` of each `stride` words, `count` times, added in order."""
    got = [
        ptx.load(sums, ptx.add(place, start + part * stride), 2, ir.F32Type.get())
        for part in range(count)
    ]
    total: Any = got[0]
    for part in got[1:]:
        total = [arith.addf(t, v) for t, v in zip(total, part, strict=True)]
    return total


def _pair(line: ir.Value, lane: ir.Value) -> ir.Value:
    """The word of a lane's pair in sums `[line, 64]`."""
    return arith.addi(arith.muli(line, ptx.number(64)), arith.muli(lane, ptx.number(2)))


def write(shape: Shape, config: Config, count: int, widths: Sequence[int]) -> Any:
    """Adds `count` sums and writes them from the channel `first` on: the results `[m, width]` of
    the weights lie side by side in channels.

    With a gate there is one result, of tiles of the two weights in turn. With a norm in front
    `squares [warp, 8 columns]` are what `hopper_norm` leaves.
    """
    half_word = shape.out == jnp.dtype(jnp.bfloat16)
    begins = [0, *itertools.accumulate(widths)]
    lines, per_row = config.rows * 2 * shape.columns, 2 * shape.columns
    known_channels = shape.n if shape.gate is None else widths[0]
    of_norm = [] if shape.norm is None else [plgpu.RefType()]

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(widths), plgpu.RefType(), ptx.SCALAR, of_norm)
    )
    def add_and_write(ctx, outs, sums, first, squares):
        i64 = ir.IntegerType.get_signless(64)
        kind = ir.BF16Type.get() if half_word else ir.F32Type.get()
        sums, squares = ptx.begin(sums), [ptx.begin(v) for v in squares]

        def ends(place, m):
            """The values that are written, of the totals at a place."""
            totals = [_total(sums, place, count, lines * 64)]
            if shape.gate is not None:
                totals.append(_total(sums, place, count, lines * 64, per_row * 64))
            for of_warp in squares:
                roots = root(of_warp, m)
                totals = [[arith.mulf(*v) for v in zip(t, roots, strict=True)] for t in totals]
            gates = [ACTIVATIONS[shape.gate or shape.activation](v) for v in totals[0]]
            if shape.gate is None:
                return gates
            return [arith.mulf(*v) for v in zip(gates, totals[1], strict=True)]

        def root(squares, m):
            """1 / sqrt(mean of squares + epsilon) of row m and the next."""
            f32, total = ir.F32Type.get(), _total(squares, m, count, 8 * shape.columns)
            mean = [arith.mulf(v, ptx.real(1 / shape.k)) for v in total]
            above = [arith.addf(v, ptx.real(shape.norm)) for v in mean]
            return [ptx.asm(f32, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", v) for v in above]

        def put(line, lane):
            rest = arith.shrui(line, ptx.number(1))
            column, row = (f(rest, ptx.number(shape.columns)) for f in (arith.remui, arith.divui))
            half = arith.muli(arith.andi(line, ptx.number(1)), ptx.number(8))
            inner = arith.addi(half, arith.shrui(lane, ptx.number(2)))
            tile = arith.addi(first.registers.item(), arith.muli(row, ptx.number(layout.ROWS)))
            known = arith.cmpi(
                arith.CmpIPredicate.ult, arith.addi(tile, inner), ptx.number(known_channels)
            )
            out, width, begin = utils.memref_ptr(outs[0]), ptx.number(widths[0]), ptx.number(0)
            for ref, n, start in zip(outs[1:], widths[1:], begins[1:], strict=False):
                here = arith.cmpi(arith.CmpIPredicate.uge, tile, ptx.number(start))
                out = arith.select(here, utils.memref_ptr(ref), out)
                width = arith.select(here, ptx.number(n), width)
                begin = arith.select(here, ptx.number(start), begin)
            channel = arith.addi(arith.subi(tile, begin), inner)
            pair = arith.muli(arith.andi(lane, ptx.number(3)), ptx.number(2))
            m = arith.addi(arith.muli(column, ptx.number(8)), pair)
            if shape.gate is not None:  # the line of the first of the two rows
                line = arith.addi(line, arith.muli(row, ptx.number(per_row)))
            for i, value in enumerate(ends(_pair(line, lane), m)):
                there = ptx.add(m, i)
                offset = arith.addi(arith.muli(there, width), channel)
                live = arith.andi(
                    known, arith.cmpi(arith.CmpIPredicate.ult, there, ptx.number(shape.m))
                )
                code = "@p st.global.f32 [$0], $1;"
                if half_word:
                    code = "cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h;"
                ptx.run(
                    "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; " + code + " }",
                    "l,f,r",
                    ptx.past(out, arith.extui(i64, offset), kind),
                    value,
                    ptx.flag(live),
                )

        _each_line(lines if shape.gate is None else lines // 2, config, put)

    return add_and_write


def push(shape: Shape, config: Config) -> Any:
    """Adds the warps' sums and sends them to a slot of the block that owns them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), ptx.SCALAR))
    def add_and_send(ctx, slot, arrived, sums, owner):
        rank = owner.registers.item()
        barrier, start = ptx.far(ptx.near(arrived), rank), ptx.far(ptx.near(slot), rank)

        lines, sums = config.rows * 2 * shape.columns, ptx.begin(sums)

        def send(line, lane):
            total = _total(sums, _pair(line, lane), 4 * config.warpgroups, lines * 64)
            byte = arith.addi(arith.muli(line, ptx.number(256)), arith.muli(lane, ptx.number(8)))
            ptx.run(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
                "[$0], {$2, $3}, [$1];",
                "r,r,f,f",
                arith.addi(start, byte),
                barrier,
                *total,
            )

        _each_line(lines, config, send)

    return add_and_send


class Exchange:
    """Barriers on which the blocks of a cluster leave `size` bytes for each other, once."""

    def __init__(self, size: int) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def open_(ctx, barriers):
            live = arith.cmpi(arith.CmpIPredicate.eq, ptx.thread(), ptx.number(0))
            for i in range(ir.MemRefType(barriers.type).shape[0]):
                ptx.run(
                    "{ .reg .pred p; setp.ne.b32 p, $1, 0; "
                    "@p mbarrier.init.shared::cta.b64 [$0], 1; "
                    f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size}; }}",
                    "r,r",
                    ptx.near(barriers, 8 * i),
                    ptx.flag(live),
                )
            # not .release: that waits for all that the thread has under way, the rings' copies too
            ptx.run(
                "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.relaxed.aligned;",
                "~{memory}",
            )

        @plgpu.inline_mgpu(arg_types=())
        def meet(ctx):
            ptx.run("barrier.cluster.wait.acquire.aligned;", "~{memory}")

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(ctx, barrier):
            ptx.run(
                "{ .reg .pred p; AGAIN_${:uid}: "
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], 0; "
                "@!p bra AGAIN_${:uid}; }",
                "r,~{memory}",
                ptx.near(barrier),
            )

        self.open, self.meet, self.wait = open_, meet, wait
