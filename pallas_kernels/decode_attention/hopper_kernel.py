"""The Hopper kernel: a cluster of blocks attends for the heads that share a key head.

Each warp takes tiles of 16 positions, strided over the cluster, straight from memory into the
operands of `mma.m16n8k16`: scores are q k^T with heads as rows, whose result is, as it lies, the
left operand of the product with the values. The order of head_dim within a product is free, so
that a lane loads 16 bytes of a key at a time; pairs of neighboring positions are made of values by
`prmt`. A warp takes two tiles at a time, and asks for the next keys once these have made scores,
for the next values once these are in the sums. Each warp keeps its own maximum and sums; they meet
in shared memory, then in the block that writes the channel.

The queries are turned by every warp, the new key by the one warp that also counts it and writes it.

The first and the new position are read twice: before the kernel in front is done, so that keys can
be asked for as soon as it is, and after that. The first time is a guess: XLA may have made them
just before, and its kernels too may let the next one start early. If it was wrong, all is asked for
again.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.chained import follow
from pallas_kernels.decode_attention.mosaic_gpu import cluster_of
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_sums import Exchange

WARPGROUPS = 2
WARPS = 4 * WARPGROUPS
TILE = 16  # positions
LOWEST = -1e30  # below every score, and finite
TABLES = 4  # words before the cosines


def kernel(problem: Problem) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`f(q, k, v, where, keys, values) -> (y, keys, values)`; see `op`. `where` int32
    [4 + head_dim] has the first position, the new one, two words for nothing, and the bits of the
    cosines and sines.
    """
    p = problem
    size = p.groups * p.head_dim
    guessed, attend, send, finish = _guessed(p), _attend(p), _send(p), _finish(p)
    exchange = Exchange(size * 16)

    def decode_attention(q, k, v, where, keys, values, y, *, parts, tops, slots, arrived):
        block = jnp.broadcast_to(lax.axis_index("n"), (128,))
        exchange.open(arrived)
        guess = guessed(where)
        follow()
        attend(q, k, v, where, keys, values, parts, tops, block, guess)
        exchange.meet()
        send(parts, tops, slots, arrived)
        exchange.wait(arrived)
        finish(y, slots, block)

    run = plgpu.kernel(
        decode_attention,
        out_type=jax.ShapeDtypeStruct((p.batch, p.kv_heads * size), jnp.bfloat16),
        scratch_types={
            "parts": plgpu.SMEM((WARPS, size), jnp.float32),
            "tops": plgpu.SMEM((WARPS, 2 * p.groups), jnp.float32),
            "slots": plgpu.SMEM((size * 4,), jnp.float32),
            "arrived": plgpu.SMEM((1, 2), jnp.int32),
        },
        grid=(p.batch * p.kv_heads,),
        grid_names=("n",),
        cluster=(cluster_of(p),),
        cluster_names=("k",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )

    def call(q, k, v, where, keys, values):
        def in_place(refs):
            y, keys, values = refs
            y[...] = run(q, k, v, where, keys, values)

        return pl.run_state(in_place)((jnp.zeros_like(q), keys, values))

    return call


class _Lane:
    """What a lane of the kernel knows of its place, and how it reaches memory.

    Of 16 positions it holds the key of rows r and r + 8 at 8 c of each 32 of head_dim, and the
    value of rows 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 at 8 r of each 64.
    """

    def __init__(self, p: Problem, block: ir.Value) -> None:
        self.p, self.chunks, self.halves = p, p.head_dim // 32, p.head_dim // 64
        self.row, self.kv = (f(block, _n(p.kv_heads)) for f in (arith.divui, arith.remui))
        self.rank = ptx.rank(True)
        self.warp, lane = ptx.lane()
        self.r, self.c = arith.shrui(lane, _n(2)), arith.andi(lane, _n(3))
        self.stride = p.kv_heads * p.head_dim  # of a position in the cache
        self.cache = _sum(
            _times(self.row, p.length * self.stride), _times(self.kv, p.head_dim)
        )  # position 0
        self.at_key, self.at_value = _times(self.c, 8), _times(self.r, 8)

    def key(self, ref: ir.Value, begin: ir.Value, live: ir.Value) -> list[ir.Value]:
        """Words of a head that begins there, in the order of keys."""
        at = _at(ref, _sum(begin, self.at_key))
        return [w for b in range(self.chunks) for w in _load(at, 64 * b, live)]

    def value(self, ref: ir.Value, begin: ir.Value, live: ir.Value) -> list[ir.Value]:
        """Words of a head that begins there, in the order of values."""
        at = _at(ref, _sum(begin, self.at_value))
        return [w for h in range(self.halves) for w in _load(at, 128 * h, live)]

    def keys(self, ref: ir.Value, index: ir.Value, last: ir.Value) -> list[ir.Value]:
        """Words of the keys of a tile; zeros from `last` on."""
        return self._tile(self.key, ref, index, last, [ptx.add(self.r, 8 * i) for i in range(2)])

    def values(self, ref: ir.Value, index: ir.Value, last: ir.Value) -> list[ir.Value]:
        """Words of the values of a tile; zeros from `last` on."""
        return self._tile(self.value, ref, index, last, self.places())

    def _tile(self, load: Any, ref: Any, index: Any, last: Any, rows: Any) -> list[ir.Value]:
        positions = [_sum(_times(index, TILE), row) for row in rows]
        begins = [_sum(self.cache, _times(at, self.stride)) for at in positions]
        live = [_less(at, last) for at in positions]
        return [w for begin, ok in zip(begins, live, strict=True) for w in load(ref, begin, ok)]

    def turn(self, where: ir.Value) -> list[list[ir.Value]]:
        """The cosines and the sines by which a head in the order of keys is turned."""
        always, f32 = arith.constant(ir.IntegerType.get_signless(1), 1), ir.F32Type.get()
        bytes_ = [128 * b + 16 * i for b in range(self.chunks // 2) for i in range(2)]
        places = [
            _at(where, ptx.add(self.at_key, TABLES + begin), ir.IntegerType.get_signless(32))
            for begin in (0, self.p.head_dim // 2)
        ]
        return [
            [arith.bitcast(f32, w) for byte in bytes_ for w in _load(at, byte, always)]
            for at in places
        ]

    def places(self) -> list[ir.Value]:
        """Rows of a tile whose scores and values a lane holds."""
        return [ptx.add(_times(self.c, 2), i % 2 + 8 * (i // 2)) for i in range(4)]


def _guessed(p: Problem) -> Any:
    """The first position that is seen, and that of the new token, or what stood there before; in
    any case such that keys between them are in the cache.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=ptx.held(2))
    def guessed(ctx, where):
        inside = lambda v: arith.maxsi(arith.minsi(v, _n(p.length - 1)), _n(0))
        words = [inside(v) for v in _positions(where)]
        return ptx.registers(words, ir.IntegerType.get_signless(32))

    return guessed


def _positions(where: ir.Value) -> list[ir.Value]:
    """As they are in memory now: not from a line that this multiprocessor has read before."""
    i32 = ir.IntegerType.get_signless(32)
    got = ptx.asm(
        llvm.StructType.get_literal([i32] * 2),
        "ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l,~{memory}",
        utils.memref_ptr(where),
        effects=True,
    )
    return [llvm.extractvalue(i32, got, [i]) for i in range(2)]


def _attend(p: Problem) -> Any:
    """Leaves each warp's sums of each channel, and maximum and sum of weights of each head."""
    ref = plgpu.RefType()
    heads, size, step = p.kv_heads * p.groups, p.groups * p.head_dim, cluster_of(p) * WARPS

    @plgpu.inline_mgpu(arg_types=(*[ref] * 8, ptx.SCALAR, ptx.held(2).layout))
    def attend(ctx, q, k, v, where, keys, values, parts, tops, block, guess):
        f32, me = ir.F32Type.get(), _Lane(p, block.registers.item())
        own_tile = lambda first: _sum(
            _sum(_times(me.rank, WARPS), me.warp), arith.shrui(first, _n(4))
        )
        two = lambda index: [ptx.add(index, step * i) for i in range(2)]
        both = (me.keys, keys), (me.values, values)
        held = lambda first, last: [
            get(ref, index, last) for get, ref in both for index in two(own_tile(first))
        ]
        guess = ptx.words(guess)
        words = list(itertools.chain(*held(*guess)))
        first, last = _positions(where)
        is_head = _less(me.r, _n(p.groups))
        head = _sum(_times(me.kv, p.groups), arith.select(is_head, me.r, _n(0)))
        queries = me.key(q, _times(_sum(_times(me.row, heads), head), p.head_dim), is_head)
        turn = me.turn(where)
        off = [arith.xori(a, b) for a, b in zip(guess, (first, last), strict=True)]
        wrong = arith.cmpi(arith.CmpIPredicate.ne, arith.ori(*off), _n(0))
        branch = scf.IfOp(wrong, [w.type for w in words], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_(list(itertools.chain(*held(first, last))))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(words)
        words, mine = list(branch.results), own_tile(first)
        queries = _rotated(queries, *turn)
        scores = lambda words, live: _scores(p, queries, words, live)

        state = [ptx.real(LOWEST)] + [ptx.zero()] * (1 + 16 * me.halves)
        chosen = arith.cmpi(
            arith.CmpIPredicate.eq, arith.ori(me.rank, me.warp), _n(0)
        )  # the warp of the new token
        branch = scf.IfOp(chosen, [f32] * len(state), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            begin = _times(_sum(_times(me.row, p.kv_heads), me.kv), p.head_dim)
            is_row, is_column = (_equal(v, 0) for v in (me.r, me.c))
            key = _rotated(me.key(k, begin, is_row), *me.turn(where))
            value = me.value(v, begin, is_column)
            new = _sum(me.cache, _times(last, me.stride))
            for b in range(me.chunks):
                at = _at(keys, _sum(new, me.at_key))
                _store(at, 64 * b, key[4 * b : 4 * b + 4], is_row)
            for h in range(me.halves):
                at = _at(values, _sum(new, me.at_value))
                _store(at, 128 * h, value[4 * h : 4 * h + 4], is_column)
            none = [_n(0)]  # the other rows of its tile
            never = arith.constant(ir.IntegerType.get_signless(1), 0)
            of_new = scores(key + none * len(key), [is_column, never, never, never])
            scf.yield_(_added(p, state, [of_new], [value + none * (3 * len(value))]))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(state)
        state = list(branch.results)

        def live(index):
            counts = []
            for place in me.places():
                position = _sum(_times(index, TILE), place)
                late = arith.cmpi(arith.CmpIPredicate.sge, position, first)
                counts.append(arith.andi(_less(position, last), late))
            return counts

        tiles = arith.shrui(ptx.add(last, TILE - 1), _n(4))
        left = arith.subi(ptx.add(tiles, 2 * step - 1), mine)
        count, size_of_two = len(state), len(words) // 2

        @utils.fori(arith.divui(left, _n(2 * step)), [*state, *words])
        def loop(i, carry):
            state, words = carry[:count], carry[count:]
            index = _sum(mine, _times(i, 2 * step))
            after = two(ptx.add(index, 2 * step))
            of_two = lambda words: (words[: size_of_two // 2], words[size_of_two // 2 :])
            pairs = zip(of_two(words[:size_of_two]), two(index), strict=True)
            found = [scores(key, live(at)) for key, at in pairs]
            later = [me.keys(keys, at, last) for at in after]
            state = _added(p, state, found, of_two(words[size_of_two:]))
            later += [me.values(values, at, last) for at in after]
            return [*state, *itertools.chain(*later)]

        top, weight, *sums = list(loop.results)[:count]
        for mask in (1, 2):
            weight = arith.addf(weight, _shuffle(weight, mask))
        branch = scf.IfOp(is_head)
        with ir.InsertionPoint(branch.then_block):
            begin = _sum(_times(me.warp, size), _times(me.r, p.head_dim))
            begin = _sum(begin, _times(me.c, 16))
            for h in range(me.halves):
                for odd in range(2):
                    for j in range(0, 8, 2):
                        pair = [sums[2 * (8 * h + j + i) + odd] for i in range(2)]
                        ptx.store_pair(parts, ptx.add(begin, 64 * h + 8 * odd + j), pair)
            lead = scf.IfOp(_equal(me.c, 0))
            with ir.InsertionPoint(lead.then_block):
                at = _times(_sum(_times(me.warp, p.groups), me.r), 2)
                ptx.store_pair(tops, at, [top, weight])
                scf.yield_([])
            scf.yield_([])
        ptx.run("bar.sync 0;", "~{memory}")

    return attend


def _send(p: Problem) -> Any:
    """Writes each channel's (maximum, sum, sum of weights) of a block to the block that owns it."""
    size, cluster = p.groups * p.head_dim, cluster_of(p)
    share = size // cluster

    @plgpu.inline_mgpu(arg_types=[plgpu.RefType()] * 4)
    def send(ctx, parts, tops, slots, arrived):
        rank = ptx.rank(True)

        def one(channel):
            head, found = arith.divui(channel, _n(p.head_dim)), []
            for i in range(WARPS):
                place = _times(ptx.add(head, i * p.groups), 2)
                top, weight = ptx.load(tops, place, 2, ir.F32Type.get())
                (part,) = ptx.load(parts, ptx.add(channel, i * size), 1, ir.F32Type.get())
                found.append((top, part, weight))
            owner, place = (f(channel, _n(share)) for f in (arith.divui, arith.remui))
            byte = _times(_sum(_times(rank, share), place), 16)
            ptx.run(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                "[$0], {$2, $3, $4, $2}, [$1];",
                "r,r,f,f,f",
                _sum(ptx.far(ptx.near(slots), owner), byte),
                ptx.far(ptx.near(arrived), owner),
                *_combined(found),
            )

        _each(size, one)

    return send


def _finish(p: Problem) -> Any:
    """Adds what the blocks sent, and writes the channels that this block owns."""
    size, cluster = p.groups * p.head_dim, cluster_of(p)
    share = size // cluster

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), ptx.SCALAR))
    def finish(ctx, y, slots, block):
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()

        def write(channel):
            places = [_times(ptx.add(channel, i * share), 4) for i in range(cluster)]
            _, total, weight = _combined([ptx.load(slots, at, 4, f32)[:3] for at in places])
            at = _sum(_times(block.registers.item(), size), _times(ptx.rank(True), share))
            ptx.run(
                "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
                "l,f,~{memory}",
                ptx.at(y, arith.extui(i64, _sum(at, channel)), ir.BF16Type.get()),
                arith.divf(total, weight),
            )

        _each(share, write)

    return finish


def _scores(
    p: Problem, queries: Sequence[ir.Value], words: Sequence[ir.Value], live: Sequence[ir.Value]
) -> list[ir.Value]:
    """A lane's four scores of a tile, in units of log2(e); -inf where they do not count."""
    none, half, found = _n(0), p.head_dim // 8, []  # words of 8 keys of a lane
    for key in (words[:half], words[half:]):
        part = [ptx.zero()] * 4
        for i in range(0, half, 2):
            part = ptx.mma([queries[i], none, queries[i + 1], none], key[i : i + 2], part)
        found += part[:2]
    factor, out = ptx.real(p.scale * math.log2(math.e)), ptx.real(float("-inf"))
    pairs = zip(found, live, strict=True)
    return [arith.select(ok, arith.mulf(s, factor), out) for s, ok in pairs]


def _added(
    p: Problem,
    state: Sequence[ir.Value],
    scores: Sequence[Sequence[ir.Value]],
    values: Sequence[Sequence[ir.Value]],
) -> list[ir.Value]:
    """A warp's (maximum, weight, sums) with the positions of more tiles."""
    none, word = _n(0), ir.IntegerType.get_signless(32)
    top, weight, *sums = state
    high = functools.reduce(arith.maximumf, itertools.chain(*scores), top)
    for mask in (1, 2):
        high = arith.maximumf(high, _shuffle(high, mask))
    shrink = _exp2(arith.subf(top, high))
    scores = [[_exp2(arith.subf(s, high)) for s in four] for four in scores]
    weight = functools.reduce(arith.addf, itertools.chain(*scores), arith.mulf(weight, shrink))
    sums = [arith.mulf(s, shrink) for s in sums]
    for four, words in zip(scores, values, strict=True):
        a, new = [_narrow(*four[:2]), none, _narrow(*four[2:]), none], []
        rows = [words[p.head_dim // 16 * i :] for i in range(4)]
        for at in range(p.head_dim // 8):  # channels 64 (at / 8) + 8 r + at % 8
            pick = _n(0x7632 if at % 2 else 0x5410)
            b = []
            for one, other in (rows[:2], rows[2:]):
                pair = one[at // 2], other[at // 2]
                b.append(ptx.asm(word, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", *pair, pick))
            new += ptx.mma(a, b, [*sums[2 * at : 2 * at + 2], ptx.zero(), ptx.zero()])[:2]
        sums = new
    return [high, weight, *sums]


def _rotated(words: list, cos: list, sin: list) -> list[ir.Value]:
    """A head in the order of keys, its pairs (d, d + head_dim / 2) turned in float32."""
    half, out = len(words) // 2, [*words]
    for i in range(half):
        turned = []
        for x, z, c, s in zip(
            _wide(words[i]),
            _wide(words[half + i]),
            cos[2 * i : 2 * i + 2],
            sin[2 * i : 2 * i + 2],
            strict=True,
        ):
            first = arith.subf(arith.mulf(x, c), arith.mulf(z, s))
            turned.append((first, arith.addf(arith.mulf(z, c), arith.mulf(x, s))))
        out[i], out[half + i] = (_narrow(*pair) for pair in zip(*turned, strict=True))
    return out


def _combined(found: Sequence[Sequence[ir.Value]]) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(maximum, sum, sum of weights) of those of several sets of positions, in order."""
    high = found[0][0]
    for top, *_ in found[1:]:
        high = arith.maximumf(high, top)
    total = weight = ptx.zero()
    for top, part, own in found:
        share = _exp2(arith.subf(top, high))
        total = arith.addf(total, arith.mulf(share, part))
        weight = arith.addf(weight, arith.mulf(share, own))
    return high, total, weight


def _each(count: int, use: Callable[[ir.Value], None]) -> None:
    """`use` of 0 to count - 1, over the threads of a block."""
    for i in range(-(-count // (32 * WARPS))):
        index = ptx.add(ptx.thread(), i * 32 * WARPS)
        branch = scf.IfOp(_less(index, _n(count)))
        with ir.InsertionPoint(branch.then_block):
            use(index)
            scf.yield_([])


def _at(ref: ir.Value, index: ir.Value, unit: Any = None) -> ir.Value:
    """A pointer to a place of an array of bfloat16, or of another unit."""
    wide = arith.extui(ir.IntegerType.get_signless(64), index)
    return ptx.at(ref, wide, unit or ir.BF16Type.get())


def _load(at: ir.Value, byte: int, live: ir.Value) -> list[ir.Value]:
    """Four words of memory, zeros where not live."""
    i32 = ir.IntegerType.get_signless(32)
    got = ptx.asm(
        llvm.StructType.get_literal([i32] * 4),
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
        f"mov.b32 $3, 0; @p ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4+{byte}]; }}",
        "=&r,=&r,=&r,=&r,l,r,~{memory}",
        at,
        ptx.flag(live),
        effects=True,
    )
    return [llvm.extractvalue(i32, got, [i]) for i in range(4)]


def _store(at: ir.Value, byte: int, words: Sequence[ir.Value], live: ir.Value) -> None:
    """Four words to memory, where live."""
    ptx.run(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
        f"@p st.global.v4.b32 [$0+{byte}], {{$1, $2, $3, $4}}; }}",
        "l,r,r,r,r,r,~{memory}",
        at,
        *words,
        ptx.flag(live),
    )


def _wide(word: ir.Value) -> list[ir.Value]:
    """The two bfloat16 of a word as float32."""
    low, high = arith.shli(word, _n(16)), arith.andi(word, _n(-65536))
    return [arith.bitcast(ir.F32Type.get(), v) for v in (low, high)]


def _narrow(low: ir.Value, high: ir.Value) -> ir.Value:
    """Two float32 as a word of bfloat16."""
    kind = ir.IntegerType.get_signless(32)
    return ptx.asm(kind, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", low, high)


def _shuffle(value: ir.Value, mask: int) -> ir.Value:
    """That of the lane whose number differs by `mask`."""
    code = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xFFFFFFFF;"
    return ptx.asm(ir.F32Type.get(), code, "=f,f", value, effects=True)


def _exp2(value: ir.Value) -> ir.Value:
    return ptx.asm(ir.F32Type.get(), "ex2.approx.ftz.f32 $0, $1;", "=f,f", value)


def _n(value: int) -> ir.Value:
    return ptx.number(value)


def _sum(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.addi(a, b)


def _times(a: ir.Value, n: int) -> ir.Value:
    return arith.muli(a, _n(n))


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def _equal(a: ir.Value, n: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, _n(n))
