"""step: a warp multiplies one tile of channels over its own k."""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul import hopper_x
from pallas_kernels.quantized_matmul.hopper_decode import RAW, halves
from pallas_kernels.quantized_matmul.hopper_pairs import looked_up
from pallas_kernels.quantized_matmul.hopper_shape import Shape
from pallas_kernels.quantized_matmul.mosaic_gpu import Config


def step(shape: Shape, config: Config, row: int) -> Any:
    """Writes the sums of each warp over its k, of one tile of a turn, `[warp, (row, column, half),
    64]`: a lane's pair at 2 lane holds channel r + 8 half, rows 8 column + 2 c and the next of x.
    """
    columns, groups, per_group = shape.columns, shape.groups, shape.group // 16
    depth, words = config.depth, shape.piece("codes").words
    blocks = 512 // words  # of 32 along k, in four words of a lane
    per_channel = not shape.piece("scale").per_tile
    kept_types = tuple(held for _, held in hopper_x.layouts(shape, config))
    tables = [] if shape.values is None else [plgpu.RefType()]
    raw = RAW.get(shape.decode)
    small, second = (raw.unit, raw.second) if raw is not None else (1.0, 1.0)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), kept_types, tables))
    def multiply(ctx, w_s, sums_s, kept, tables):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        warp, lane = ptx.lane()
        pairs = looked_up(*tables, lane) if raw is None else raw.bits
        w_s, sums_s = ptx.begin(w_s), ptx.begin(sums_s)
        x_of, *rest = (
            [llvm.extractelement(v, ptx.number(0)) for v in held.registers.flat] for held in kept
        )
        starts = iter(rest[0] if rest else ())
        r = arith.shrui(lane, ptx.number(2))
        stage = arith.muli(warp, ptx.number(config.steps * shape.words(depth)))
        stage_r = arith.addi(stage, r)
        own = arith.addi(stage, ptx.place(r, arith.andi(lane, ptx.number(3))))

        def fma(a, b, c):
            return ptx.asm(f32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

        def times(value, by):
            return value if by == 1 else arith.mulf(value, ptx.real(by))

        def wide(word):
            """The float32 of channels r and r + 8."""
            return [ptx.load(w_s, ptx.add(stage_r, word + 8 * i), 1, f32)[0] for i in range(2)]

        def begins(start):
            """Of accumulators, from the sums of x."""
            return [*start, *(times(v, second) for v in start)]

        def pair(name, dtype, j, group):
            """What channels r and r + 8 have in a group of tile j, as float32."""
            piece = shape.piece(name)
            begin, size = shape.begin(name, depth) + j * piece.words, piece.words // groups
            if size == layout.ROWS:
                return wide(begin + size * group)
            (word,) = ptx.load(w_s, ptx.add(stage_r, begin + size * group), 1, i32)
            return halves(word, dtype)

        sums = [[ptx.zero()] * 4 for _ in range(columns)]
        for j in range(depth):
            lines = range(j * words, (j + 1) * words, 128)
            units = [ptx.load(w_s, ptx.add(own, line), 4, i32) for line in lines]
            for group in range(groups):
                start = [[next(starts), next(starts)] for _ in range(columns)] if rest else []
                if per_channel:
                    parts = sums
                    if shape.center:
                        parts = [
                            [arith.addf(*v) for v in zip(total, begins(more), strict=True)]
                            for total, more in zip(sums, start, strict=True)
                        ]
                elif shape.center:
                    parts = [begins(v) for v in start]
                else:
                    parts = [[ptx.zero()] * 4 for _ in range(columns)]
                for i in range(group * per_group, (group + 1) * per_group):
                    line, block = divmod(i // 2, blocks)
                    two = units[line][2 * (i % 2) :][:2]
                    a = [v for word in two for v in pairs(word, block)]
                    for column in range(columns):
                        at_x = ((j * 4 + i // 2) * columns + column) * 4 + 2 * (i % 2)
                        parts[column] = ptx.mma(a, x_of[at_x : at_x + 2], parts[column])
                if per_channel:
                    sums = parts
                    continue
                first, other = pair("scale", shape.scale, j, group)
                scale, zero = [first, times(other, 1 / second)], None
                if shape.has("zero"):  # z is held as 128 + z
                    bias = pair("zero", "bfloat16", j, group)
                    zero = [
                        fma(v, ptx.real(by), ptx.real(-128.0 * by))
                        for v, by in zip(bias, (1.0, second), strict=True)
                    ]
                offset = pair("offset", shape.offset, j, group) if shape.has("offset") else None
                for column, (total, part) in enumerate(zip(sums, parts, strict=True)):
                    for i in range(4):
                        if zero is not None:  # minus z times the sum of x
                            part[i] = fma(zero[i // 2], start[column][i % 2], part[i])
                        total[i] = fma(scale[i // 2], part[i], total[i])
                        if offset is not None:  # -1 / start of it is the sum of x
                            scaled = arith.mulf(offset[i // 2], ptx.real(-1 / shape.start))
                            total[i] = fma(scaled, start[column][i % 2], total[i])
        sums = [[times(t, small) for t in v] for v in sums]
        if per_channel:
            first, other = wide(shape.begin("scale", depth))
            scale = [first, times(other, 1 / second)]
            sums = [[arith.mulf(scale[i // 2], t) for i, t in enumerate(v)] for v in sums]
        if shape.has("bias"):
            bias = wide(shape.begin("bias", depth))
            here = arith.ori(warp, ptx.rank(config.cluster > 1))
            first = arith.cmpi(arith.CmpIPredicate.eq, here, ptx.number(0))
            once = [arith.select(first, v, ptx.zero()) for v in bias]
            sums = [[arith.addf(once[i // 2], t) for i, t in enumerate(v)] for v in sums]
        for column in range(columns):
            for half in range(2):
                line = (row * columns + column) * 2 + half
                place = arith.addi(
                    arith.muli(warp, ptx.number(config.rows * 2 * columns * 64)),
                    ptx.add(arith.muli(lane, ptx.number(2)), line * 64),
                )
                ptx.store_pair(sums_s, place, sums[column][2 * half : 2 * half + 2])

    return multiply
