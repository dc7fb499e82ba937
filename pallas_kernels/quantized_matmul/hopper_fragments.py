"""How tiles of a weight become the A operand of `wgmma`: bfloat16 in registers, scaled.

`wgmma` wants k in order, `hopper_layout` has eight neighbors of each 32 in a lane of the decoding
kernel: word p of lanes 4 r to 4 r + 3 is what lane 4 r + p of `wgmma` multiplies, and `ldmatrix`
brings it there.
Operands are `(code - zero) * scale + offset` rounded once to bfloat16, which is what the reference
multiplies with, over `unit`, a power of two that is left to the sums, as are scales per channel. A
codebook's values are rounded first, and times scales that are no bfloat16 one in a thousand is a
unit off.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_decode import (
    RAW,
    Raw,
    choose_bytes,
    decode_of,
    fma,
    halves,
    pair,
    times,
)
from pallas_kernels.quantized_matmul.hopper_pairs import looked_up
from pallas_kernels.quantized_matmul.mosaic_wgmma import part_names, part_words
from pallas_kernels.quantized_matmul.problem import Weight

ROWS = 64  # channels of a warpgroup
HALF = 64  # of k: four operands of 16
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
UNIT = 2.0**6  # 2 ** 127 is the largest power of two of a bfloat16, not 2 ** 133
# scales of integers stay finite up to 2 ** 34 and exact down to 2 ** -86; of fp8 to 2 ** -70
FOLDED = 2.0**40


def _raw(weight: Weight) -> Raw | None:
    """How codes are taken as bits; None of a codebook."""
    return RAW.get(decode_of(weight))


def _short(weight: Weight) -> bool:
    """Whether what a group has is bfloat16."""
    return all(getattr(weight, n) == "bfloat16" for n in part_names(weight) if n != "zero")


def _folds(weight: Weight) -> bool:
    """Whether one `fma` by the scale makes the operand of a code's bits."""
    return _raw(weight) is not None and part_names(weight) == ["scale"] and _short(weight)


def unit(weight: Weight) -> float:
    """By what the sums of products are too small."""
    if _raw(weight) is None:
        return 1.0
    return FOLDED if _folds(weight) else UNIT


def fragments(weight: Weight, deep: int) -> Any:
    """`f([codes, scale, zero or offset of a stage, table]) -> bfloat16 [64, 64 deep]`; the warps
    of a warpgroup take a tile of 16 channels each, from the one on at which the refs begin. The
    table is that of a codebook, `hopper_pairs`; others have none.

    Args:
      weight: what the stage holds.
      deep: halves of a tile in a stage.
    """
    names = part_names(weight)
    words = layout.code_words(weight) // 2 * deep
    tables = int(weight.values is not None)
    blocks = 1 if "8" in weight.code else 2  # of 32 along k, in a line of units
    raw = _raw(weight)

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * (1 + len(names) + tables),),
        return_type=plgpu.ShapeDtypeStruct(
            (ROWS, HALF * deep), jnp.bfloat16, layout=plgpu.Layout.WGMMA
        ),
    )
    def decode(ctx, refs):
        two = ir.VectorType.get((2,), ir.BF16Type.get())
        warp, lane = ptx.lane()
        warp = arith.andi(warp, ptx.number(3))
        r = arith.shrui(lane, ptx.number(2))
        unit = ptx.place(arith.andi(lane, ptx.number(7)), arith.shrui(lane, ptx.number(3)))
        own = arith.addi(arith.muli(warp, ptx.number(words)), unit)
        start = ptx.add_bytes(ptx.near(refs[0]), own, 4)
        pairs = looked_up(refs[-1], lane) if raw is None else raw.bits
        factors: dict[int, Callable[[ir.Value, int], ir.Value]] = {}

        def scaled(group: int) -> Callable[[ir.Value, int], ir.Value]:
            if group not in factors:
                factors[group] = _scaling(weight, names, refs[1:], warp, r, group, deep)
            return factors[group]

        # all are asked for first
        lines = [ptx.load_lines(ptx.add(start, 4 * word)) for word in range(0, words, 128)]
        out: list[ir.Value] = []
        for i, held in enumerate(lines):
            for block in range(blocks):
                group = 32 * (i * blocks + block) // weight.group if names else 0
                values = [v for word in held for v in pairs(word, block)]
                out += [utils.bitcast(scaled(group)(v, j % 2), two) for j, v in enumerate(values)]
        shape = fa.WGMMA_LAYOUT.registers_shape((ROWS, HALF * deep))
        return fa.FragmentedArray(
            _registers=np.array(out, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT,
            _is_signed=None,
        )

    return decode


def _split(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A float32 as two bfloat16 whose sum is it but for 2 ** -17, each in both halves of a word.
    The first is finite where it is.
    """
    i32, code = ir.IntegerType.get_signless(32), "cvt.rn.bf16x2.f32 $0, $1, $1;"
    inside = arith.maximumf(arith.minimumf(value, ptx.real(LARGEST)), ptx.real(-LARGEST))
    first = ptx.asm(i32, code, "=r,f", inside)
    rest = arith.subf(value, halves(first, "bfloat16")[0])
    return first, ptx.asm(i32, code, "=r,f", rest)


def _scaling(
    weight: Weight,
    names: Sequence[str],
    refs: Sequence[Any],
    warp: ir.Value,
    r: ir.Value,
    group: int,
    deep: int,
) -> Callable[[ir.Value, int], ir.Value]:
    """`(a pair of bits or values, 0 for channel r and 1 for r + 8) -> its bfloat16`."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    raw, short = _raw(weight), _short(weight)

    def held(name: str) -> list[ir.Value]:
        """Of channels r and r + 8: words of two bfloat16 where all is short, or float32."""
        ref = refs[names.index(name)]
        stride = part_words(weight, name, deep)
        size = layout.group_words(weight, name) // (layout.DEPTH // weight.group)
        place = arith.addi(arith.muli(warp, ptx.number(stride)), ptx.add(r, group * size))
        if size == layout.ROWS:
            return [ptx.load(ref, ptx.add(place, 8 * i), 1, f32)[0] for i in range(2)]
        (word,) = ptx.load(ref, place, 1, i32)
        if name == "zero" or short:
            return [choose_bytes(word, word, ptx.number(s)) for s in (0x1010, 0x3232)]
        return halves(word, getattr(weight, name))

    scale = held("scale") if names else None
    if scale is not None and raw is not None and _folds(weight):  # raw: for the type checker
        low = pair(layout.lowest(weight) / FOLDED)
        grown = [times(s, pair(2.0**p / FOLDED)) for s, p in zip(scale, raw.powers, strict=True)]
        starts = [times(s, low) for s in scale]
        return lambda value, row: fma(value, grown[row], starts[row])
    zero = [pair(layout.lowest(weight) / UNIT)] * 2
    if "zero" in names:  # z is held as 128 + z
        zero = [fma(v, pair(-1 / UNIT), pair(128 / UNIT)) for v in held("zero")]
    # of 4-bit integers times float16 the part of the rest is exact
    exact = "8" not in weight.code and weight.scale == "float16" and weight.offset is None
    rest = None
    if scale is not None and not short and (exact or weight.values is not None):
        scale, rest = zip(*(_split(v) for v in scale), strict=True)
    offset = held("offset") if "offset" in names else None
    if offset is not None and short:
        offset = [times(v, pair(1 / unit(weight))) for v in offset]
    elif offset is not None:
        offset = [arith.mulf(v, ptx.real(1 / unit(weight))) for v in offset]

    def scaled(value: ir.Value, row: int) -> ir.Value:
        if raw is not None:  # exact
            value = fma(value, pair(2.0 ** raw.powers[row] / UNIT), zero[row])
        if scale is None:
            return value
        if short and offset is None:
            return times(value, scale[row])
        if short:
            return fma(value, scale[row], offset[row])
        if rest is not None:
            return fma(value, scale[row], times(value, rest[row]))
        wide = [arith.mulf(v, scale[row]) for v in halves(value, "bfloat16")]
        if offset is not None:
            wide = [arith.addf(v, offset[row]) for v in wide]
        return ptx.asm(i32, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", *wide)

    return scaled
