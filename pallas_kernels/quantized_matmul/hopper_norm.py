"""Norm: the RMSNorm of a sum in front of a product, in the registers where `load_x` keeps x.

With s = x + y the product is (s * scale) @ w, and each row of it is multiplied by
root = 1 / sqrt(mean(s ** 2) + epsilon) where it is written: no block has to wait for a whole row.
A warp squares its own k on the tensor cores: with its s as both operands of `mma.m16n8k16` the
diagonal is the sums of squares. The blocks' first one that has a warp's k writes s.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_decode import halves, times
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.hopper_x import along_k, eights, layouts, take
from pallas_kernels.quantized_matmul.mosaic_gpu import Config

REGISTERS = 65536  # of a multiprocessor; a thread has at most 255
SPARE = 32  # of a thread: what is not x, y or the scale of a norm


class Norm:
    """What a product whose x is a norm does before its first tile.

    `weight(scale)` gets the norm's scale, which no kernel before makes. `run` gives what `load_x`
    does, of s * scale, rounded, and leaves `squares [warp, 8 columns]` and s `[m, k]`; x and y are
    on their way while it does what is to be done `meanwhile`, where registers allow.

    Args:
      shape, config: of the kernel, whose blocks have all of k.
      dtype: of the scale `[k]`, bfloat16, float16 or float32.
    """

    def __init__(self, shape: Shape, config: Config, dtype: Any) -> None:
        ref, dtype = plgpu.RefType(), jnp.dtype(dtype)
        wide = dtype.itemsize == 4
        count, _ = layouts(shape, config)[0]
        factors = 16 * config.depth * (2 if wide else 1)  # words of a lane
        free = min(255, REGISTERS // (128 * config.warpgroups)) - SPARE
        apart = 2 * count <= free
        early = 2 * count + factors <= free
        each = factors // (4 * config.depth)

        def factor(scale, k, live):
            """The words of eight factors from k on."""
            kind = ir.F32Type.get() if wide else ir.BF16Type.get()  # only its size counts
            places = [k, ptx.add(k, 4)] if wide else [k]
            return [v for at in places for v in take(scale, at, kind, ptx.flag(live))]

        @plgpu.inline_mgpu(arg_types=(ref,), return_type=ptx.held(factors))
        def weight(ctx, scale):
            scale = ptx.begin(scale)
            out = [v for at in along_k(shape, config) for v in factor(scale, *at)]
            return ptx.registers(out, ir.IntegerType.get_signless(32))

        @plgpu.inline_mgpu(arg_types=(ref, ref), return_type=ptx.held(2 * count))
        def load(ctx, x, y):
            return ptx.registers(both(x, y), ir.IntegerType.get_signless(32))

        def both(x, y):
            """Four words of x, four of y, and so on."""
            refs, kind, out = [ptx.begin(x), ptx.begin(y)], ir.BF16Type.get(), []
            for offset, live in eights(shape, config):
                out += [v for ref in refs for v in take(ref, offset, kind, live)]
            return out

        @plgpu.inline_mgpu(
            arg_types=(
                ptx.held(2 * count).layout if apart else [ref, ref],
                ptx.held(factors).layout if early else ref,
                *(ref, ref, ptx.SCALAR),
            ),
            return_type=ptx.held(count),
        )
        def finish(ctx, terms, scale, squares, total, block):
            words = ptx.words(terms) if apart else both(*terms)
            s = [_added(words[i : i + 4], words[i + 4 : i + 8]) for i in range(0, 2 * count, 8)]
            first = arith.cmpi(arith.CmpIPredicate.eq, block.registers.item(), ptx.number(0))
            branch = scf.IfOp(first)
            with ir.InsertionPoint(branch.then_block):
                store(s, ptx.begin(total))
                scf.yield_([])
            square(s, squares)
            held, out = ptx.words(scale) if early else [], []
            start = None if early else ptx.begin(scale)
            for i, at in enumerate(along_k(shape, config)):
                by = held[each * i : each * (i + 1)] if early else factor(start, *at)
                for four in s[i * shape.columns : (i + 1) * shape.columns]:
                    out += _scaled(four, by, dtype.name)
            return ptx.registers(out, ir.IntegerType.get_signless(32))

        def store(s, total):
            i64 = ir.IntegerType.get_signless(64)
            for (offset, live), four in zip(eights(shape, config), s, strict=True):
                ptx.run(
                    "{ .reg .pred p; setp.ne.b32 p, $1, 0; "
                    "@p st.global.v4.b32 [$0], {$2, $3, $4, $5}; }",
                    "l,r,r,r,r,r,~{memory}",
                    ptx.at(total, arith.extui(i64, offset), ir.BF16Type.get()),
                    live,
                    *four,
                )

        def square(s, squares):
            """Row r's sum is element (r, r), which lane 4 r + r // 2 has as its value r mod 2."""
            zero = ptx.number(0)
            warp, lane = ptx.lane()
            r, c = arith.shrui(lane, ptx.number(2)), arith.andi(lane, ptx.number(3))
            odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(r, ptx.number(1)), zero)
            here = arith.cmpi(arith.CmpIPredicate.eq, c, arith.shrui(r, ptx.number(1)))
            chains = 2 * config.depth  # of four products each, which wait for each other
            for column in range(shape.columns):
                sums = [[ptx.zero()] * 4 for _ in range(chains)]
                pairs = [four[q : q + 2] for four in s[column :: shape.columns] for q in (0, 2)]
                for i, (low, high) in enumerate(pairs):
                    a = [low, zero, high, zero]
                    sums[i % chains] = ptx.mma(a, [low, high], sums[i % chains])
                total = sums[0][:2]
                for more in sums[1:]:
                    total = [arith.addf(*v) for v in zip(total, more[:2], strict=True)]
                row = arith.addi(
                    arith.muli(warp, ptx.number(8 * shape.columns)), ptx.add(r, 8 * column)
                )
                ptx.run(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.f32 [$0], $1; }",
                    "r,f,r,~{memory}",
                    ptx.add_bytes(ptx.near(squares), row, 4),
                    arith.select(odd, total[1], total[0]),
                    ptx.flag(here),
                )

        def run(x, y, scale, squares, total, block, meanwhile):
            if apart:
                terms = load(x, y)
                meanwhile()
                return finish(terms, scale, squares, total, block)
            out = finish([x, y], scale, squares, total, block)
            meanwhile()
            return out

        self.weight = weight if early else lambda scale: scale
        self.run = run


def _added(first: list[ir.Value], second: list[ir.Value]) -> list[ir.Value]:
    """Sums of pairs of bfloat16, each rounded once."""
    i32 = ir.IntegerType.get_signless(32)
    add = lambda *v: ptx.asm(i32, "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", *v)
    return [add(*v) for v in zip(first, second, strict=True)]


def _scaled(four: list[ir.Value], by: list[ir.Value], dtype: str) -> list[ir.Value]:
    """Eight bfloat16 times eight factors, rounded to bfloat16."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    if dtype == "bfloat16":
        return [times(*v) for v in zip(four, by, strict=True)]
    if dtype == "float16":
        factors = [v for word in by for v in halves(word, dtype)]
    else:
        factors = [arith.bitcast(f32, v) for v in by]
    out = []
    for i, word in enumerate(four):
        pair = zip(halves(word, "bfloat16"), factors[2 * i : 2 * i + 2], strict=True)
        low, high = (arith.mulf(*v) for v in pair)
        out.append(ptx.asm(i32, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", high, low))
    return out
