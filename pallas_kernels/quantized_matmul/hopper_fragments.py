"""How tiles of a weight become the A operand of `wgmma`: bfloat16 in registers, scaled.

`hopper_layout` gives lane = 4 r + c eight neighbors along k (of each 32) of channels r and r + 8,
for the sake of decoding; `wgmma` takes of every 8 neighbors two. So the four lanes of a row
exchange what they hold, still packed: per 16 codes of a lane two shuffles at 4 bits, four at 8.
Operands are `(code - zero) * scale + offset` rounded once to bfloat16, which is what the reference
multiplies with; scales per channel are left to the sums.
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
from pallas_kernels.quantized_matmul.hopper_decode import OPERANDS, Operand, halves
from pallas_kernels.quantized_matmul.hopper_pairs import looked_up
from pallas_kernels.quantized_matmul.mosaic_wgmma import part_names, part_words
from pallas_kernels.quantized_matmul.problem import Weight

ROWS = 64  # channels of a warpgroup
HALF = 64  # of k: four operands of 16
PAIRS = 0x0001_0001
# pairs of bytes are (0, 2) and (1, 3) of a word of numbers, (0, 1) and (2, 3) of a codebook's
PLACES = ((0x6240, 0x2604), (0x7351, 0x3715)), ((0x5410, 0x1054), (0x7632, 0x3276))


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
    loads = words // 128  # 16-byte loads of a lane

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * (1 + len(names) + tables),),
        return_type=plgpu.ShapeDtypeStruct(
            (ROWS, HALF * deep), jnp.bfloat16, layout=plgpu.Layout.WGMMA
        ),
    )
    def decode(ctx, refs):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        warp, lane = ptx.lane()
        warp = arith.andi(warp, ptx.number(3))
        r, c = arith.shrui(lane, ptx.number(2)), arith.andi(lane, ptx.number(3))
        start = arith.addi(arith.muli(warp, ptx.number(words)), arith.muli(lane, ptx.number(4)))
        held = []
        for i in range(loads):
            held += ptx.load(refs[0], ptx.add(start, i * 128), 4, i32)
        per_block = len(held) // (2 * deep)
        exchanged = _exchange(weight, looked_up(refs[-1], lane) if tables else None)
        factors: dict[int, Callable[[ir.Value, int], ir.Value]] = {}

        def scaled(group: int) -> Callable[[ir.Value, int], ir.Value]:
            if group not in factors:
                factors[group] = _scaling(weight, names, refs[1:], warp, r, group, deep)
            return factors[group]

        out: list[ir.Value] = []
        for block in range(2 * deep):  # 32 of k
            group = 32 * block // weight.group if names else 0
            block_words = held[block * per_block : (block + 1) * per_block]
            for i, value in enumerate(exchanged(block_words, c)):
                out.append(utils.bitcast(scaled(group)(value, i % 2), pair))
        shape = fa.WGMMA_LAYOUT.registers_shape((ROWS, HALF * deep))
        return fa.FragmentedArray(
            _registers=np.array(out, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT,
            _is_signed=None,
        )

    return decode


def _shuffled(word: ir.Value, mask: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(32)
    code = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xFFFFFFFF;"
    return ptx.asm(kind, code, "=r,r", word, effects=True)


def _bytes(a: ir.Value, b: ir.Value, selector: ir.Value) -> ir.Value:
    kind = ir.IntegerType.get_signless(32)
    return ptx.asm(kind, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", a, b, selector)


def _is(c: ir.Value, bit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ne, arith.andi(c, ptx.number(bit)), ptx.number(0))


def _exchange(
    weight: Weight, table: Operand | None
) -> Callable[[Sequence[ir.Value], ir.Value], list[ir.Value]]:
    """(words of a lane for 32 of k, c) -> the eight registers of two operands, not scaled."""
    wide = "8" in weight.code
    operand = table or OPERANDS[weight.code if wide else "int4"](None)

    def packed(words: Sequence[ir.Value], c: ir.Value) -> list[ir.Value]:
        moved = _swap8(words, c) if wide else _swap4(words, c, PLACES[table is not None])
        half = len(moved) // 2
        return [*operand(moved[:half]), *operand(moved[half:])]

    return packed


def _swap4(
    words: Sequence[ir.Value], c: ir.Value, places: Sequence[tuple[int, int]]
) -> list[ir.Value]:
    """Two words of a lane, each with two pairs of bytes: pair p of lane c goes to lane p, where
    pairs of lanes 0 and 1 make one word, those of 2 and 3 the other. `places` has the selectors of
    two words' first pairs, in order and turned, and those of their second.
    """
    first, second = words
    high, odd = _is(c, 2), _is(c, 1)
    turned = lambda flag, pair: arith.select(flag, *(ptx.number(v) for v in reversed(pair)))
    keep, send = arith.select(high, second, first), arith.select(high, first, second)
    got = _shuffled(send, 2)
    even_pair, odd_pair = (turned(high, pair) for pair in places)
    mine = _bytes(keep, got, arith.select(odd, odd_pair, even_pair))
    theirs = _bytes(keep, got, arith.select(odd, even_pair, odd_pair))
    got = _shuffled(theirs, 1)
    return [_bytes(mine, got, turned(odd, pair)) for pair in places]


def _swap8(words: Sequence[ir.Value], c: ir.Value) -> list[ir.Value]:
    """Four words of a lane: word p of lane c becomes word c of lane p."""
    high, odd = _is(c, 2), _is(c, 1)
    swap = lambda flag, a, b: (arith.select(flag, b, a), arith.select(flag, a, b))
    (a, x), (b, y) = swap(high, words[0], words[2]), swap(high, words[1], words[3])
    x, y = _shuffled(x, 2), _shuffled(y, 2)  # words 2 (c // 2) and the next, of lane c ^ 2
    (a, b), (x, y) = swap(odd, a, b), swap(odd, x, y)
    b, y = _shuffled(b, 1), _shuffled(y, 1)  # of lanes c ^ 1 and c ^ 3
    a, b = swap(odd, a, b)
    x, y = swap(odd, x, y)
    (a, x), (b, y) = swap(high, a, x), swap(high, b, y)
    return [a, b, x, y]


def _split(value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A float32 as two bfloat16 whose sum is it but for 2 ** -17, each in both halves of a word."""
    i32, code = ir.IntegerType.get_signless(32), "cvt.rn.bf16x2.f32 $0, $1, $1;"
    first = ptx.asm(i32, code, "=r,f", value)
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
    """`(a pair as `hopper_decode` gives it, 0 for channel r and 1 for r + 8) -> its bfloat16`."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    plain = "8" not in weight.code and weight.values is None
    short = all(getattr(weight, n) == "bfloat16" for n in names if n != "zero")

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
            return [_bytes(word, word, ptx.number(s)) for s in (0x1010, 0x3232)]
        return halves(word, getattr(weight, name))

    def both(code: str, *args: ir.Value) -> ir.Value:
        return ptx.asm(i32, code, "=r" + ",r" * len(args), *args)

    zero = held("zero") if "zero" in names else None
    if zero is None and plain:
        start = int(np.float32(128 - layout.lowest(weight)).view(np.uint32)) >> 16
        zero = [ptx.number(start * PAIRS)] * 2
    scale = held("scale") if names else None
    if weight.values is not None and not short and scale is not None:
        scale, rest = zip(*(_split(v) for v in scale), strict=True)
    offset = held("offset") if "offset" in names else None

    def scaled(value: ir.Value, row: int) -> ir.Value:
        if zero is not None:  # exact
            value = both("sub.rn.bf16x2 $0, $1, $2;", value, zero[row])
        if scale is None:
            return value
        if short and offset is None:
            return both("mul.rn.bf16x2 $0, $1, $2;", value, scale[row])
        if short:
            return both("fma.rn.bf16x2 $0, $1, $2, $3;", value, scale[row], offset[row])
        if weight.values is not None and offset is None:
            part = both("mul.rn.bf16x2 $0, $1, $2;", value, rest[row])
            return both("fma.rn.bf16x2 $0, $1, $2, $3;", value, scale[row], part)
        wide = [arith.mulf(v, scale[row]) for v in halves(value, "bfloat16")]
        if offset is not None:
            wide = [arith.addf(v, offset[row]) for v in wide]
        return ptx.asm(i32, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", *wide)

    return scaled
