"""load_x: each warp keeps the x of its own stretch of k in registers, in operand order."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_decode import GROWN, RAW, pair, times
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.mosaic_gpu import Config


def load_x(shape: Shape, config: Config) -> Any:
    """The x of each warp's k: int32 `[registers, thread]`, register
    `((4 j + b) columns + col) 4 + q` of a lane: bfloat16 pair q of the eight at
    k = 128 j + 32 b + 8 c of row 8 col + r.

    Beyond the rows of x, and where the tiles belong to another warpgroup, it is 0.
    """
    count, held = layouts(shape, config)[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((count, 128), jnp.int32, layout=held),
    )
    def keep(ctx, x):
        x, bf16 = ptx.begin(x), ir.BF16Type.get()
        out = [v for offset, live in eights(shape, config) for v in take(x, offset, bf16, live)]
        return ptx.registers(out, ir.IntegerType.get_signless(32))

    return keep


def along_k(shape: Shape, config: Config) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Of each eight numbers along k that a lane keeps, in order: where they begin, and whether they
    are the warp's and not beyond the end.
    """
    box, parts = 4 * config.depth, config.cluster * config.warpgroups
    warp, lane = ptx.lane()
    rank = ptx.rank(config.cluster > 1)
    part = arith.addi(
        arith.muli(rank, ptx.number(config.warpgroups)), arith.shrui(warp, ptx.number(2))
    )
    begin, end = (
        arith.divui(arith.muli(ptx.add(part, i), ptx.number(shape.tiles_k)), ptx.number(parts))
        for i in (0, 1)
    )
    first = arith.minui(begin, ptx.number(shape.tiles_k - box))
    tile = arith.addi(first, arith.muli(arith.andi(warp, ptx.number(3)), ptx.number(config.depth)))
    c = arith.andi(lane, ptx.number(3))
    for j in range(config.depth):
        own = ptx.add(tile, j)
        mine = arith.andi(
            arith.cmpi(arith.CmpIPredicate.uge, own, begin),
            arith.cmpi(arith.CmpIPredicate.ult, own, end),
        )
        start = arith.addi(arith.muli(own, ptx.number(layout.DEPTH)), arith.muli(c, ptx.number(8)))
        for b in range(4):
            k = ptx.add(start, 32 * b)
            inside = arith.cmpi(arith.CmpIPredicate.ult, k, ptx.number(shape.k))
            yield k, arith.andi(mine, inside)


def eights(shape: Shape, config: Config) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Of each four registers that a lane keeps, in order: where they lie in x `[m, k]`, and 1 if
    they are there, else 0.
    """
    _, lane = ptx.lane()
    r = arith.shrui(lane, ptx.number(2))
    for k, live in along_k(shape, config):
        for column in range(shape.columns):
            row = ptx.add(r, 8 * column)
            there = arith.cmpi(arith.CmpIPredicate.ult, row, ptx.number(shape.m))
            offset = arith.addi(arith.muli(row, ptx.number(shape.k)), k)
            yield offset, ptx.flag(arith.andi(live, there))


def take(start: ir.Value, offset: ir.Value, unit: ir.Type, live: ir.Value) -> list[ir.Value]:
    """Four words of memory, `offset` units behind `start`; 0 where they are not there."""
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    got = ptx.asm(
        llvm.StructType.get_literal([i32] * 4),
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
        "mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
        "=&r,=&r,=&r,=&r,l,r,~{memory}",
        ptx.at(start, arith.extui(i64, offset), unit),
        live,
        effects=True,
    )
    return [llvm.extractvalue(i32, got, [q]) for q in range(4)]


def grow_x(shape: Shape, config: Config) -> Any:
    """What `load_x` gives, times GROWN: for operands that are bits of codes."""
    count, held = layouts(shape, config)[0]

    @plgpu.inline_mgpu(
        arg_types=(held,),
        return_type=plgpu.ShapeDtypeStruct((count, 128), jnp.int32, layout=held),
    )
    def grow(ctx, x):
        grown = [times(v, pair(GROWN)) for v in ptx.words(x)]
        return ptx.registers(grown, ir.IntegerType.get_signless(32))

    return grow


def sum_x(shape: Shape, config: Config) -> Any:
    """What `grow_x` gives -> float32 `[2 groups columns, thread]`: -start times the sum of x over
    each group, of rows 8 col + 2 c and the next, over the unit of the sums of products.
    """
    (_, of_x), (count, held) = layouts(shape, config)

    @plgpu.inline_mgpu(
        arg_types=(of_x,),
        return_type=plgpu.ShapeDtypeStruct((count, 128), jnp.float32, layout=held),
    )
    def add_up(ctx, x):
        words = [llvm.extractelement(v, ptx.number(0)) for v in x.registers.flat]
        minus = [pair(-shape.start * 2.0 ** -RAW[shape.decode].powers[0])] * 4
        sums, per_group = [], shape.group // 16
        for group in range(config.depth * shape.groups):
            for column in range(shape.columns):
                total = [ptx.zero()] * 4
                for i in range(group * per_group, (group + 1) * per_group):
                    at = (i // 2 * shape.columns + column) * 4 + 2 * (i % 2)
                    total = ptx.mma(minus, words[at : at + 2], total)
                sums += total[:2]
        return ptx.registers(sums, ir.F32Type.get())

    return add_up


def layouts(shape: Shape, config: Config) -> list[tuple[int, Any]]:
    """(values of a thread, their layout) of x and of its sums."""
    counts = [config.depth * 16 * shape.columns]
    if shape.start:
        counts.append(config.depth * shape.groups * shape.columns * 2)
    return [(n, plgpu.Layout.WG_STRIDED((n, 128), vec_size=1)) for n in counts]
