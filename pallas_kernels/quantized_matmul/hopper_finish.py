"""What follows the products of `hopper_wgmma`: the sums of a cluster, scales, bias, activation."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
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


def finish(problem: Problem, rows: int) -> Any:
    """`f(sums [64, rows], [scales of channels, bias], first channel) -> the result's dtype`."""
    activate = ACTIVATIONS[problem.activation]
    scaled, biased = layout.per_channel(problem.weight), problem.bias
    out = jnp.dtype(problem.out)
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
            return [
                llvm.load(f32, ptx.at(ref, ptx.add(channel, 8 * i), f32), alignment=4)
                for i in range(2)
            ]

        values = iter(held(ref) for ref in of_channels)
        scale = next(values) if scaled else None
        bias = next(values) if biased else None
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
        return lambda sums, refs, first: sums.astype(out)
    return lambda sums, refs, first: each(sums, refs, first).astype(out)


class Parts:
    """The sums of a cluster's blocks: block d adds up those of its share of `rows`.

    In its shared memory they lie as `[warpgroup, block, 8 rows, thread, 4]`: what a thread holds is
    added by the same thread, in the order of the blocks.
    """

    def __init__(self, rows: int, split: int) -> None:
        eights = rows // 8 // split

        def place(block: ir.Value, eight: int) -> ir.Value:
            """The word of a thread's four sums."""
            quad = arith.shrui(ptx.thread(), ptx.number(7))
            line = arith.addi(arith.muli(quad, ptx.number(split)), block)
            line = ptx.add(arith.muli(line, ptx.number(eights)), eight)
            line = arith.muli(line, ptx.number(THREADS))
            inside = arith.andi(ptx.thread(), ptx.number(THREADS - 1))
            return arith.muli(arith.addi(line, inside), ptx.number(4))

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))
        def send(ctx, sums, slots, arrived):
            pairs = _pairs(sums)
            mine = ptx.rank(True)
            for owner in range(split):
                barrier = ptx.far(ptx.near(arrived), ptx.number(owner))
                start = ptx.far(ptx.near(slots), ptx.number(owner))
                for eight in range(eights):
                    at = 2 * (owner * eights + eight)
                    ptx.run(
                        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                        "[$0], {$2, $3, $4, $5}, [$1];",
                        "r,r,f,f,f,f",
                        ptx.add_bytes(start, place(mine, eight), 4),
                        barrier,
                        *pairs[at],
                        *pairs[at + 1],
                    )

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=plgpu.ShapeDtypeStruct(
                (64, rows // split), jnp.float32, layout=plgpu.Layout.WGMMA
            ),
        )
        def add(ctx, slots):
            f32, done = ir.F32Type.get(), []
            for eight in range(eights):
                total = ptx.load(slots, place(ptx.number(0), eight), 4, f32)
                for block in range(1, split):
                    part = ptx.load(slots, place(ptx.number(block), eight), 4, f32)
                    total = [arith.addf(t, v) for t, v in zip(total, part, strict=True)]
                done += [total[:2], total[2:]]
            return _array(done, rows // split)

        self.send, self.add = send, add
