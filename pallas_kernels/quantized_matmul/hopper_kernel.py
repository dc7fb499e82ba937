"""The Hopper kernel, m <= 16: x by a 4-bit weight that is streamed once, in one launch.

x is stationary: every warp keeps the x of its own stretch of k in registers, in operand order, and
weights stream past it, 16 output channels at a time, through the warp's own ring in shared memory.
A warp decodes its tiles straight into the A operands of `mma.m16n8k16`: `lop3` makes 128 + u of a
code exactly. What that is too much comes off by way of the sums of x, which the warp takes once:
the accumulator of a group starts at -start * sum(x), and the group's scale is applied to it in
float32. The warps' sums meet in shared memory; blocks of a cluster, which split k further, send
theirs to the block that owns the channels. All sums are taken in fixed order.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.mosaic_gpu import Config, columns, plan
from pallas_kernels.quantized_matmul.problem import Problem

LAG = 2  # turns after which a cluster's sums are collected
F32 = jnp.float32


class Shape(NamedTuple):
    """What the kernel is built for: rows of x, channels, k, and the rest of the weight."""

    m: int
    n: int
    k: int
    group: int
    start: float  # what is taken off 128 + u at once: the accumulator starts at -start * sum(x)
    zeros: bool
    offsets: bool
    scale: str
    offset: str | None
    out: Any
    tiles_n: int
    tiles_k: int

    @property
    def columns(self) -> int:
        return columns(self.m)

    @property
    def groups(self) -> int:
        """Of a tile."""
        return layout.DEPTH // self.group

    @property
    def pairs(self) -> int:
        """Words of a tile's scales, zero points or offsets."""
        return self.groups * layout.ROWS // 2

    @property
    def words(self) -> int:
        return layout.CODES + self.pairs * (1 + self.zeros + self.offsets)


def kernel(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """`f(x [m, k], arrays) -> [m, n]` for one problem.

    Raises:
      ValueError: if the config cannot run it.
    """
    weight = problem.weight
    sizes = plan(problem.m, weight, config)
    if isinstance(sizes, str):
        raise ValueError(f"{config} cannot run {problem}: {sizes}")
    start = 1.0 if weight.zero is not None else 128.0 - layout.lowest(weight)
    shape = Shape(
        problem.m,
        weight.n,
        weight.k,
        weight.group,
        start,
        weight.zero is not None,
        weight.offset is not None,
        weight.scale,
        weight.offset,
        jnp.dtype(problem.out),
        sizes.tiles_n,
        sizes.tiles_k,
    )
    c, words = config, shape.words
    parts, buffers = c.cluster * c.warpgroups, min(2, sizes.turns)
    owned = -(-sizes.turns // c.cluster)
    sums_shape = (c.rows * 2 * shape.columns, 64)
    warps = 4 * c.warpgroups
    scratch = {
        "w_s": plgpu.SMEM((warps, c.steps, c.depth * words), jnp.int32),
        "full": plgpu.SMEM((warps, c.steps, 2), jnp.int32),
        "sums": plgpu.SMEM((buffers, warps, *sums_shape), F32),
    }
    if c.cluster > 1:
        scratch["slots"] = plgpu.SMEM((owned, c.cluster, *sums_shape), F32)
        scratch["arrived"] = plgpu.SMEM((owned, 2), jnp.int32)

    load_x, meet = _load_x(shape, config), _meet()
    step = [_step(shape, config, row) for row in range(c.rows)]
    ring = _Ring(shape, config)
    push, exchange = _push(shape, config), _Exchange(c.cluster * sums_shape[0] * 256)
    write_warps = _write(shape, config, warps)
    write_blocks = _write(shape, config, c.cluster)

    def quantized_matmul(x, *refs, w_s, full, sums, slots=None, arrived=None):
        *weights, out = refs
        block = lax.axis_index("n")
        rank = lax.axis_index("k") if c.cluster > 1 else jnp.int32(0)
        wg = lax.axis_index("wg") if c.warpgroups > 1 else jnp.int32(0)
        first = jnp.minimum(
            (rank * c.warpgroups + wg) * shape.tiles_k // parts, shape.tiles_k - sizes.box
        )
        turns = (shape.tiles_n // c.rows - block + sizes.grid - 1) // sizes.grid

        def channel(turn):
            return _thread_wide((block + turn * sizes.grid) * c.rows * layout.ROWS)

        def fetch(tile):
            at = lax.rem(tile, jnp.int32(c.steps))
            row = (block + tile // c.rows * sizes.grid) * c.rows + lax.rem(tile, jnp.int32(c.rows))
            place = (row, pl.ds(first, sizes.box))
            ring.fetch([w.at[place] for w in weights], w_s.at[:, at], full.at[:, at])

        def collect(turn):
            """Adds the blocks' sums of a turn, in the block that owns it."""

            @pl.when((turn >= 0) & (lax.rem(turn, jnp.int32(c.cluster)) == rank))
            def _():
                exchange.wait(arrived.at[turn // c.cluster])
                write_blocks(out, slots.at[turn // c.cluster], channel(turn))

        def begin(tile, _):
            pl.when(tile < turns * c.rows)(lambda: fetch(tile))
            return _

        ring.open(full)
        lax.fori_loop(0, c.steps, begin, jnp.int32(0))
        if c.cluster > 1:
            exchange.open(arrived)
        kept = load_x(x)
        if c.cluster > 1:
            exchange.meet()

        def one_turn(turn, _):
            mine = sums.at[lax.rem(turn, jnp.int32(buffers))]
            for row in range(c.rows):
                tile = turn * c.rows + row
                at = lax.rem(tile, jnp.int32(c.steps))
                ring.wait(full.at[:, at], _thread_wide(tile // c.steps % 2))
                step[row](w_s.at[:, at], mine, kept)
                ahead = tile + c.steps
                pl.when(ahead < turns * c.rows)(lambda ahead=ahead: fetch(ahead))
            meet()  # also: whoever comes here has read the sums of the turn before
            if c.cluster == 1:
                write_warps(out, mine, channel(turn))
                return _
            own = turn // c.cluster
            owner = _thread_wide(lax.rem(turn, jnp.int32(c.cluster)))
            push(slots.at[own, rank], arrived.at[own], mine, owner)
            collect(turn - LAG)
            return _

        lax.fori_loop(0, turns, one_turn, jnp.int32(0))
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
        out_type=jax.ShapeDtypeStruct((shape.m, shape.n), shape.out),
        scratch_types=scratch,
        grid=(sizes.grid,),
        grid_names=("n",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )
    names = [n for n in ("codes", "scale", "zero", "offset") if n == "codes" or getattr(weight, n)]
    return lambda x, arrays: run(x, *(arrays[name] for name in names))


def _thread_wide(scalar: jax.Array) -> jax.Array:
    """A scalar as `SCALAR`, the one form in which inline code takes it."""
    return jnp.broadcast_to(scalar, (128,))


SCALAR = plgpu.Layout.WG_SPLAT((128,))

# What Pallas has no operation for, in Mosaic GPU. Of the lanes of a warp, lane = 4 r + c.


def _i32(value: int) -> ir.Value:
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value - (1 << 32) * (value >> 31)))


def _f32(value: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), value))


def _zero() -> ir.Value:
    return _f32(0.0)


def _add(x: ir.Value, n: int) -> ir.Value:
    return arith.addi(x, _i32(n)) if n else x


def _asm(kind: Any, code: str, constraints: str, *args: ir.Value, effects: bool = False) -> Any:
    return llvm.inline_asm(kind, list(args), code, constraints, has_side_effects=effects)


def _run(code: str, constraints: str, *args: ir.Value) -> None:
    _asm(ir.Type.parse("!llvm.void"), code, constraints, *args, effects=True)


def _lane() -> tuple[ir.Value, ir.Value]:
    """(warp of the block, lane of the warp)."""
    thread = utils.thread_idx()
    return arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))


def _at(ref: ir.Value, offset: ir.Value, unit: ir.Type) -> ir.Value:
    """A pointer `offset` units into a ref."""
    base = utils.memref_ptr(ref)
    return llvm.getelementptr(
        base.type, base, [offset], [-2147483648], unit, llvm.GEPNoWrapFlags.none
    )


def _near(ref: ir.Value, byte: int = 0) -> ir.Value:
    """The 32-bit address of a ref to shared memory."""
    return _add(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)), byte)


def _far(address: ir.Value, rank: ir.Value) -> ir.Value:
    """The address of the same place in another block of the cluster."""
    i32 = ir.IntegerType.get_signless(32)
    return _asm(i32, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", address, rank)


def _load(ref: ir.Value, word: ir.Value, n: int, kind: ir.Type) -> list[ir.Value]:
    """`n` neighboring 32-bit words of shared memory, as one vector load."""
    vector = llvm.load(ir.VectorType.get((n,), kind), _at(ref, word, kind), alignment=4 * n)
    return [llvm.extractelement(vector, _i32(i)) for i in range(n)]


def _meet():
    @plgpu.inline_mgpu(arg_types=())
    def meet(ctx):
        _run("bar.sync 0;", "~{memory}")

    return meet


class _Ring:
    """Each warp's own stages of weights, `[warp, step]`, and barriers that say they are full."""

    def __init__(self, shape: Shape, config: Config) -> None:
        ref = plgpu.RefType()
        count = config.depth * shape.words
        pieces = [config.depth * layout.CODES]
        pieces += [config.depth * shape.pairs] * (1 + shape.zeros + shape.offsets)

        @plgpu.inline_mgpu(arg_types=(ref,))
        def open_(ctx, full):
            warp, lane = _lane()
            live = arith.cmpi(arith.CmpIPredicate.ult, lane, _i32(config.steps))
            place = _add_bytes(_near(full), warp, config.steps * 8)
            _run(
                "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.init.shared::cta.b64 [$0], 1; "
                "fence.mbarrier_init.release.cluster; bar.warp.sync 0xFFFFFFFF; }",
                "r,r,~{memory}",
                _add_bytes(place, lane, 8),
                _flag(live),
            )

        @plgpu.inline_mgpu(arg_types=([ref] * len(pieces), ref, ref))
        def fetch(ctx, weights, w_s, full):
            i64 = ir.IntegerType.get_signless(64)
            warp, lane = _lane()
            barrier = _add_bytes(_near(full), warp, config.steps * 8)
            to = _add_bytes(_near(w_s), warp, config.steps * count * 4)
            part = arith.andi(warp, _i32(3))
            live = _flag(arith.cmpi(arith.CmpIPredicate.eq, lane, _i32(0)))
            _run(
                "{ .reg .pred p; bar.warp.sync 0xFFFFFFFF; setp.ne.b32 p, $1, 0; "
                f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count * 4}; }}",
                "r,r,~{memory}",
                barrier,
                live,
            )
            done = 0
            for w, piece in zip(weights, pieces, strict=True):
                source = arith.extui(i64, arith.muli(part, _i32(piece)))
                _run(
                    "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.shared::cluster.global"
                    f".mbarrier::complete_tx::bytes [$0], [$1], {piece * 4}, [$2]; }}",
                    "r,l,r,r,~{memory}",
                    _add(to, done * 4),
                    _at(w, source, ir.IntegerType.get_signless(32)),
                    barrier,
                    live,
                )
                done += piece

        @plgpu.inline_mgpu(arg_types=(ref, SCALAR))
        def wait(ctx, full, phase):
            warp, _ = _lane()
            _run(
                "{ .reg .pred p; AGAIN_${:uid}: "
                "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra AGAIN_${:uid}; }",
                "r,r,~{memory}",
                _add_bytes(_near(full), warp, config.steps * 8),
                phase.registers.item(),
            )

        self.open, self.fetch, self.wait = open_, fetch, wait


def _flag(condition: ir.Value) -> ir.Value:
    return arith.extui(ir.IntegerType.get_signless(32), condition)


def _add_bytes(address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    return arith.addi(address, arith.muli(index, _i32(size)))


def _load_x(shape: Shape, config: Config):
    """The x of each warp's k: int32 `[registers, thread]`, register
    `((4 j + b) columns + col) 4 + q` of a lane: bfloat16 pair q of the eight at
    k = 128 j + 32 b + 8 c of row 8 col + r.

    Beyond the rows of x, and where the tiles belong to another warpgroup, it is 0. With it come
    float32 `[2 groups columns, thread]`: -start times the sum of x over each group, of rows
    8 col + 2 c and the next.
    """
    box, parts = 4 * config.depth, config.cluster * config.warpgroups
    (count, kept_layout), (totals, totals_layout) = _x_layouts(shape, config)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=(
            plgpu.ShapeDtypeStruct((count, 128), jnp.int32, layout=kept_layout),
            plgpu.ShapeDtypeStruct((totals, 128), F32, layout=totals_layout),
        ),
    )
    def load_x(ctx, x):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        four = llvm.StructType.get_literal([i32] * 4)
        warp, lane = _lane()
        rank = _asm(i32, "mov.u32 $0, %cluster_ctarank;", "=r") if config.cluster > 1 else _i32(0)
        part = arith.addi(arith.muli(rank, _i32(config.warpgroups)), arith.shrui(warp, _i32(2)))
        begin, end = (
            arith.divui(arith.muli(_add(part, i), _i32(shape.tiles_k)), _i32(parts)) for i in (0, 1)
        )
        first = arith.minui(begin, _i32(shape.tiles_k - box))
        tile = arith.addi(first, arith.muli(arith.andi(warp, _i32(3)), _i32(config.depth)))
        r, c = arith.shrui(lane, _i32(2)), arith.andi(lane, _i32(3))
        out = []
        for j in range(config.depth):
            own = _add(tile, j)
            mine = arith.andi(
                arith.cmpi(arith.CmpIPredicate.uge, own, begin),
                arith.cmpi(arith.CmpIPredicate.ult, own, end),
            )
            start = arith.addi(arith.muli(own, _i32(layout.DEPTH)), arith.muli(c, _i32(8)))
            for b in range(4):
                k = _add(start, 32 * b)
                inside = arith.cmpi(arith.CmpIPredicate.ult, k, _i32(shape.k))
                for column in range(shape.columns):
                    row = _add(r, 8 * column)
                    there = arith.cmpi(arith.CmpIPredicate.ult, row, _i32(shape.m))
                    live = _flag(arith.andi(arith.andi(mine, inside), there))
                    offset = arith.addi(arith.muli(row, _i32(shape.k)), k)
                    got = _asm(
                        four,
                        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                        "mov.b32 $2, 0; mov.b32 $3, 0; "
                        "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }",
                        "=&r,=&r,=&r,=&r,l,r",
                        _at(x, arith.extui(i64, offset), ir.BF16Type.get()),
                        live,
                    )
                    out += [llvm.extractvalue(i32, got, [q]) for q in range(4)]
        bits = int(np.float32(-shape.start).view(np.uint32)) >> 16  # of a bfloat16
        minus = [_i32(bits << 16 | bits)] * 4
        sums, per_group = [], shape.group // 16
        for group in range(config.depth * shape.groups):
            for column in range(shape.columns):
                total = [_zero()] * 4
                for i in range(group * per_group, (group + 1) * per_group):
                    at = (i // 2 * shape.columns + column) * 4 + 2 * (i % 2)
                    total = _mma(minus, out[at : at + 2], total)
                sums += total[:2]
        return _registers(out, i32), _registers(sums, ir.F32Type.get())

    return load_x


def _x_layouts(shape: Shape, config: Config) -> list[tuple[int, Any]]:
    """(values of a thread, their layout) of x and of its sums."""
    counts = config.depth * 16 * shape.columns, config.depth * shape.groups * shape.columns * 2
    return [(n, plgpu.Layout.WG_STRIDED((n, 128), vec_size=1)) for n in counts]


def _registers(values: list[ir.Value], kind: ir.Type) -> fa.FragmentedArray:
    """One value of each thread per row of `[len(values), 128]`."""
    one = ir.VectorType.get((1,), kind)
    registers = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        registers[i] = llvm.insertelement(llvm.mlir_undef(one), value, _i32(0))
    return fa.FragmentedArray(
        _registers=registers,
        _layout=fa.WGStridedFragLayout((len(values), 128), vec_size=1),
        _is_signed=None if isinstance(kind, ir.F32Type) else True,
    )


def _mma(a: list[ir.Value], b: list[ir.Value], c: list[ir.Value]) -> list[ir.Value]:
    """`c + a b` on the tensor cores: 16 x 16 by 16 x 8 bfloat16."""
    f32 = ir.F32Type.get()
    got = _asm(
        llvm.StructType.get_literal([f32] * 4),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        *a,
        *b,
        *c,
    )
    return [llvm.extractvalue(f32, got, [i]) for i in range(4)]


def _step(shape: Shape, config: Config, row: int):
    """Writes the sums of each warp over its k, of one tile of a turn, `[warp, (row, column, half),
    64]`: a lane's pair at 2 lane holds channel r + 8 half, rows 8 column + 2 c and the next of x.
    """
    columns, groups, per_group = shape.columns, shape.groups, shape.group // 16
    depth = config.depth
    kept, totals = (layout_of for _, layout_of in _x_layouts(shape, config))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), (kept, totals)))
    def step(ctx, w_s, sums_s, kept):
        x, x_totals = kept
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        warp, lane = _lane()
        x_of, flat = (
            [llvm.extractelement(v, _i32(0)) for v in a.registers.flat] for a in (x, x_totals)
        )
        x_sums = [flat[i : i + 2] for i in range(0, len(flat), 2)]

        def operand(word):
            code = "lop3.b32 $0, $1, 0x000F000F, 0x43004300, 0xEA;"
            moved = [arith.shrui(word, _i32(4 * p)) if p else word for p in range(4)]
            return [_asm(i32, code, "=r,r", v) for v in moved]

        def fma(a, b, c):
            return _asm(f32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

        def halves(word, dtype):
            if dtype == "float16":
                code = "{ .reg .b16 h, l; mov.b32 {l, h}, $1; cvt.f32.f16 $0, SIDE; }"
                return [_asm(f32, code.replace("SIDE", side), "=f,r", word) for side in "lh"]
            low, high = arith.shli(word, _i32(16)), arith.andi(word, _i32(0xFFFF0000))
            return [utils.bitcast(v, f32) for v in (low, high)]

        lane_4 = arith.muli(lane, _i32(4))
        r = arith.shrui(lane, _i32(2))
        tile = arith.muli(warp, _i32(config.steps * depth * shape.words))
        sums = [[_zero()] * 4 for _ in range(columns)]
        for j in range(depth):
            base = _add(tile, j * layout.CODES)
            codes = []
            for half in range(2):
                codes += _load(w_s, arith.addi(base, _add(lane_4, half * 128)), 4, i32)
            for group in range(groups):
                at = depth * layout.CODES + j * shape.pairs + 8 * group
                at = arith.addi(tile, _add(r, at))
                scale = halves(_load(w_s, at, 1, i32)[0], shape.scale)
                start = x_sums[(j * groups + group) * columns :][:columns]
                parts = [[_zero()] * 4 if shape.zeros else [v[0], v[1]] * 2 for v in start]
                for i in range(group * per_group, (group + 1) * per_group):
                    a = operand(codes[i])
                    for column in range(columns):
                        at_x = ((j * 4 + i // 2) * columns + column) * 4 + 2 * (i % 2)
                        parts[column] = _mma(a, x_of[at_x : at_x + 2], parts[column])
                if shape.zeros or shape.offsets:
                    (word,) = _load(w_s, _add(at, depth * shape.pairs), 1, i32)
                    extra = halves(word, "bfloat16" if shape.zeros else shape.offset)
                for total, part, v in zip(sums, parts, start, strict=True):
                    for i in range(4):
                        if shape.zeros:  # minus bias times the sum of x
                            part[i] = fma(extra[i // 2], v[i % 2], part[i])
                        total[i] = fma(scale[i // 2], part[i], total[i])
                        if shape.offsets:  # -1 / 128 of v is the sum of x
                            scaled = arith.mulf(extra[i // 2], _f32(-1 / shape.start))
                            total[i] = fma(scaled, v[i % 2], total[i])
        for column in range(columns):
            for half in range(2):
                line = (row * columns + column) * 2 + half
                place = arith.addi(
                    arith.muli(warp, _i32(config.rows * 2 * columns * 64)),
                    _add(arith.muli(lane, _i32(2)), line * 64),
                )
                _store_pair(sums_s, place, sums[column][2 * half : 2 * half + 2])

    return step


def _store_pair(ref: ir.Value, place: ir.Value, values: list[ir.Value]) -> None:
    f32 = ir.F32Type.get()
    vector = llvm.mlir_undef(ir.VectorType.get((2,), f32))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, _i32(i))
    llvm.store(vector, _at(ref, place, f32), alignment=8)


def _each_total(
    shape: Shape, config: Config, sums: ir.Value, count: int, use: Callable[..., None]
) -> None:
    """Adds `count` sums `[count, line, 64]` in order; warps take turns at the lines.

    `use` is given the line, the lane and the pair of totals. Where there are fewer lines than
    warps, they go to warps of different warpgroups and schedulers.
    """
    f32 = ir.F32Type.get()
    lines, warps = config.rows * 2 * shape.columns, 4 * config.warpgroups
    warp, lane = _lane()
    quad, place = arith.shrui(warp, _i32(2)), arith.andi(warp, _i32(3))
    turned = arith.andi(arith.subi(place, quad), _i32(3))
    warp = arith.addi(arith.muli(turned, _i32(config.warpgroups)), quad)
    for i in range(-(-lines // warps)):
        line = _add(warp, i * warps)
        live = arith.cmpi(arith.CmpIPredicate.ult, line, _i32(lines))
        branch = scf.IfOp(live)
        with ir.InsertionPoint(branch.then_block):
            place = arith.addi(arith.muli(line, _i32(64)), arith.muli(lane, _i32(2)))
            got = [_load(sums, _add(place, part * lines * 64), 2, f32) for part in range(count)]
            total = got[0]
            for part in got[1:]:
                total = [arith.addf(t, v) for t, v in zip(total, part, strict=True)]
            use(line, lane, total)
            scf.yield_([])


def _write(shape: Shape, config: Config, count: int):
    """Adds `count` sums and writes them to `[m, n]` of the result, from the channel `first` on."""
    half_word = shape.out == jnp.dtype(jnp.bfloat16)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def write(ctx, out, sums, first):
        i64 = ir.IntegerType.get_signless(64)
        kind = ir.BF16Type.get() if half_word else ir.F32Type.get()

        def put(line, lane, total):
            rest = arith.shrui(line, _i32(1))
            column, row = (f(rest, _i32(shape.columns)) for f in (arith.remui, arith.divui))
            half = arith.muli(arith.andi(line, _i32(1)), _i32(8))
            inner = arith.addi(half, arith.shrui(lane, _i32(2)))
            tile = arith.addi(first.registers.item(), arith.muli(row, _i32(layout.ROWS)))
            channel = arith.addi(tile, inner)
            known = arith.cmpi(arith.CmpIPredicate.ult, channel, _i32(shape.n))
            pair = arith.muli(arith.andi(lane, _i32(3)), _i32(2))
            m = arith.addi(arith.muli(column, _i32(8)), pair)
            for i, value in enumerate(total):
                there = _add(m, i)
                offset = arith.addi(arith.muli(there, _i32(shape.n)), channel)
                live = arith.andi(known, arith.cmpi(arith.CmpIPredicate.ult, there, _i32(shape.m)))
                code = "@p st.global.f32 [$0], $1;"
                if half_word:
                    code = "cvt.rn.bf16.f32 h, $1; @p st.global.b16 [$0], h;"
                _run(
                    "{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; " + code + " }",
                    "l,f,r",
                    _at(out, arith.extui(i64, offset), kind),
                    value,
                    _flag(live),
                )

        _each_total(shape, config, sums, count, put)

    return write


def _push(shape: Shape, config: Config):
    """Adds the warps' sums and sends them to a slot of the block that owns them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), SCALAR))
    def push(ctx, slot, arrived, sums, owner):
        rank = owner.registers.item()
        barrier, start = _far(_near(arrived), rank), _far(_near(slot), rank)

        def send(line, lane, total):
            byte = arith.addi(arith.muli(line, _i32(256)), arith.muli(lane, _i32(8)))
            _run(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
                "[$0], {$2, $3}, [$1];",
                "r,r,f,f",
                arith.addi(start, byte),
                barrier,
                *total,
            )

        _each_total(shape, config, sums, 4 * config.warpgroups, send)

    return push


class _Exchange:
    """Barriers on which the blocks of a cluster leave `size` bytes for each other, once."""

    def __init__(self, size: int) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def open_(ctx, barriers):
            live = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), _i32(0))
            for i in range(ir.MemRefType(barriers.type).shape[0]):
                _run(
                    "{ .reg .pred p; setp.ne.b32 p, $1, 0; "
                    "@p mbarrier.init.shared::cta.b64 [$0], 1; "
                    f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size}; }}",
                    "r,r",
                    _near(barriers, 8 * i),
                    _flag(live),
                )
            _run("barrier.cluster.arrive.release.aligned;", "~{memory}")

        @plgpu.inline_mgpu(arg_types=())
        def meet(ctx):
            _run("barrier.cluster.wait.acquire.aligned;", "~{memory}")

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def wait(ctx, barrier):
            _run(
                "{ .reg .pred p; AGAIN_${:uid}: "
                "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], 0; "
                "@!p bra AGAIN_${:uid}; }",
                "r,~{memory}",
                _near(barrier),
            )

        self.open, self.meet, self.wait = open_, meet, wait
