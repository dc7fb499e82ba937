"""What follows the products of `hopper_wgmma`: the sums of a cluster, scales, bias, activation."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_fragments import unit
from pallas_kernels.quantized_matmul.hopper_sums import ACTIVATIONS
from pallas_kernels.quantized_matmul.problem import Problem

THREADS = 128


def _array(values: list[list[ir.Value]], columns: int) -> fa.FragmentedArray:
    """Pairs of float32 of a thread as `[64, columns]`."""
    two = ir.VectorType.get((2,), ir.F32Type.get())
    out = []
    for pair in values:
        vector: Any = llvm.mlir_undef(two)
        for i, value in enumerate(pair):
            vector = llvm.insertelement(vector, value, ptx.number(i))
        out.append(vector)
    shape = fa.WGMMA_LAYOUT.registers_shape((64, columns))
    return fa.FragmentedArray(
        _registers=np.array(out, dtype=object).reshape(shape),
        _layout=fa.WGMMA_LAYOUT,
        _is_signed=None,
    )


def _pairs(array: fa.FragmentedArray) -> list[list[ir.Value]]:
    """Its registers: two neighbors along m of channel r, then of r + 8, per 8 along m."""
    return [[llvm.extractelement(v, ptx.number(i)) for i in range(2)] for v in array.registers.flat]


def _quads(array: fa.FragmentedArray) -> list[list[ir.Value]]:
    """Its registers: those of a thread per 8 along m."""
    pairs = _pairs(array)
    return [[*a, *b] for a, b in zip(pairs[::2], pairs[1::2], strict=True)]


def _quad() -> ir.Value:
    """The warpgroup."""
    return arith.shrui(ptx.thread(), ptx.number(7))


def finish(problem: Problem, rows: int) -> Any:
    """`f(sums [64, rows], [scales of channels, bias], first channel) -> the result's dtype`; the
    sums are of operands over `hopper_fragments.unit`.
    """
    activate = ACTIVATIONS[problem.activation]
    scaled, biased = layout.per_channel(problem.weight), problem.bias
    out, grow = jnp.dtype(problem.out), unit(problem.weight)
    refs = [plgpu.RefType()] * (scaled + biased)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, refs, ptx.SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64, rows), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def each(ctx, sums, of_channels, first):
        f32 = ir.F32Type.get()
        warp, lane = ptx.lane()
        inner = arith.addi(
            arith.muli(arith.andi(warp, ptx.number(3)), ptx.number(16)),
            arith.shrui(lane, ptx.number(2)),
        )
        channel = arith.addi(first.registers.item(), inner)

        def held(ref):
            """What channels r and r + 8 of the warp have."""
            return [ptx.load(ref, ptx.add(channel, 8 * i), 1, f32)[0] for i in range(2)]

        values = iter(held(ref) for ref in of_channels)
        scale = next(values) if scaled else None
        bias = next(values) if biased else None
        if scale is not None:
            scale = [arith.mulf(v, ptx.real(grow)) for v in scale]
        elif grow != 1:
            scale = [ptx.real(grow)] * 2
        done = []
        for i, pair in enumerate(_pairs(sums)):
            moved = []
            for value in pair:
                if scale is not None:
                    value = arith.mulf(value, scale[i % 2])
                if bias is not None:
                    value = arith.addf(value, bias[i % 2])
                moved.append(activate(value))
            done.append(moved)
        return _array(done, rows)

    if not scaled and not biased and problem.activation is None:
        return lambda sums, refs, first: (sums * grow).astype(out)
    return lambda sums, refs, first: each(sums, refs, first).astype(out)


class Parts:
    """Sums of warpgroups that share k: their own in registers and `count` others in shared memory,
    as `[member, part, 8 rows, thread, 4]`. What a thread holds is added by the thread of its number
    in the first team of the block that owns the rows, a `split`-th of them, in that order.
    """

    def __init__(self, rows: int, split: int, count: int, members: int) -> None:
        eights = rows // 8 // split

        def place(part: ir.Value, eight: int) -> ir.Value:
            """The word of a thread's four sums."""
            member = arith.remui(_quad(), ptx.number(members))
            line = arith.addi(arith.muli(member, ptx.number(count)), part)
            line = ptx.add(arith.muli(line, ptx.number(eights)), eight)
            line = arith.muli(line, ptx.number(THREADS))
            inside = arith.andi(ptx.thread(), ptx.number(THREADS - 1))
            return arith.muli(arith.addi(line, inside), ptx.number(4))

        def own(sums: fa.FragmentedArray) -> list[list[ir.Value]]:
            """Those of the rows that this block adds up."""
            quads, rank = _quads(sums), ptx.rank(split > 1)
            mine: list[Any] = quads[:eights]
            for owner in range(1, split):
                here = arith.cmpi(arith.CmpIPredicate.eq, rank, ptx.number(owner))
                pairs = zip(quads[owner * eights :], mine, strict=False)
                mine = [[arith.select(here, *v) for v in zip(*pair, strict=True)] for pair in pairs]
            return mine

        result = plgpu.ShapeDtypeStruct((64, rows // split), jnp.float32, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
        def add(ctx, sums, slots):
            """The own sums and what others have for the same rows."""
            done = []
            for eight, total in enumerate(own(sums)):
                for number in range(count):
                    at = place(ptx.number(number), eight)
                    more = ptx.load(slots, at, 4, ir.F32Type.get())
                    total = [arith.addf(t, v) for t, v in zip(total, more, strict=True)]
                done += [total[:2], total[2:]]
            return _array(done, rows // split)

        self.place, self.eights, self.add = place, eights, add


class Blocks(Parts):
    """The sums of the first teams of `split` blocks: parts are of the next ones of the cluster."""

    def __init__(self, rows: int, split: int, members: int) -> None:
        super().__init__(rows, split, split - 1, members)
        place, eights = self.place, self.eights

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))
        def send(ctx, sums, slots, arrived):
            """To the blocks that own the rows."""
            quads, rank = _quads(sums), ptx.rank(True)
            for owner in range(split):
                number = arith.remui(ptx.add(rank, split - owner), ptx.number(split))
                barrier = ptx.far(ptx.near(arrived), ptx.number(owner))
                start = ptx.far(ptx.near(slots), ptx.number(owner))
                branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, number, ptx.number(0)))
                with ir.InsertionPoint(branch.then_block):
                    for eight in range(eights):
                        ptx.run(
                            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                            "[$0], {$2, $3, $4, $5}, [$1];",
                            "r,r,f,f,f,f",
                            ptx.add_bytes(start, place(ptx.add(number, -1), eight), 4),
                            barrier,
                            *quads[owner * eights + eight],
                        )
                    scf.yield_([])

        self.send = send


class Teams(Parts):
    """The sums of the `teams` of a block: parts are of those behind the first."""

    def __init__(self, rows: int, teams: int, members: int) -> None:
        super().__init__(rows, 1, teams - 1, members)
        place = self.place

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
        def leave(ctx, sums, slots):
            """For the first team."""
            f32 = ir.F32Type.get()
            before = ptx.add(arith.divui(_quad(), ptx.number(members)), -1)
            for eight, quad in enumerate(_quads(sums)):
                vector: Any = llvm.mlir_undef(ir.VectorType.get((4,), f32))
                for i, value in enumerate(quad):
                    vector = llvm.insertelement(vector, value, ptx.number(i))
                llvm.store(vector, ptx.at(slots, place(before, eight), f32), alignment=16)

        @plgpu.inline_mgpu(arg_types=())
        def meet(ctx):
            """All teams."""
            ptx.run(f"bar.sync 9, {THREADS * members * teams};", "~{memory}")

        self.leave, self.meet = leave, meet
