"""What this GPU can do at best: the time to read bytes, to copy them, dots, an empty launch.

Writes experiments/results/ceilings_<card>.json. All times are medians of a kernel's own duration
(CUPTI), over buffers that together exceed the L2 cache, on random data. Dots are XLA's `jnp.dot` of
bfloat16 and cuBLASLt's of int8 (to int32) and FP8 (to bfloat16) codes, nothing scaled; the kernels
that ran stand beside the latter.

    python experiments/ceilings.py

"""

import functools
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import profiler, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

MIB = 2**20
READ_SIZES = [2 * MIB * 2**i for i in range(10)]  # 2 MiB to 1 GiB
CODES = {"int8": jnp.int32, "float8_e4m3fn": jnp.bfloat16}  # and the result of a dot of them
DOTS = [(m, k, n) for m in (1, 16) for k, n in ((4096, 4096), (8192, 8192), (4096, 28672))]
L2 = 160_000_000  # bytes that a rotation of buffers must exceed: three times the cache
RUNS = 10  # of a rotation
READERS = [(528, 8), (1056, 8), (1056, 4), (2112, 4)]  # blocks, 16-byte loads of a thread at once


def durations(
    fn: Callable[..., Any], *args: Any, runs: int = RUNS
) -> list[list[tuple[str, float]]]:
    """(kernel, microseconds) of every kernel of `runs` calls, in order, after a warm-up."""
    return timed(compiled(fn, *args), *args, runs=runs)


def compiled(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None) -> Any:
    """`fn`, compiled for these arguments."""
    return jax.jit(fn).lower(*args).compile(options)


def timed(program: Any, *args: Any, runs: int = RUNS) -> list[list[tuple[str, float]]]:
    """`durations` of a compiled program."""
    jax.block_until_ready(program(*args))
    measure = profiler.Cupti(finalize=False).measure(program, aggregate=False, iterations=runs)
    _, calls = measure(*args)
    return [[(name, 1e3 * ms) for name, ms in call] for call in calls]


def reader(words: int, blocks: int, unroll: int) -> Callable[..., jax.Array]:
    """A kernel that reads int32 `[words]` once: 128 threads a block, `unroll` loads at once.

    `read(data)` returns nothing of use. `read(data, x, y)` returns a copy of x: what takes that
    runs behind it, as it runs behind what made y. So launches of one program keep an order.
    """
    chunk = 128 * 4 * unroll
    if words % chunk:
        raise ValueError(f"{words} words are no multiple of {chunk}")

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def read(ctx: Any, data: Any, out: Any) -> None:
        i32, block, thread = ir.IntegerType.get_signless(32), utils.block_idx(), utils.thread_idx()
        left = arith.addi(arith.subi(number(words // chunk), block), number(blocks - 1))
        four = llvm.StructType.get_literal([i32] * 4)

        @utils.fori(arith.divui(left, number(blocks)), [number(0)])
        def loop(i: Any, carry: Any) -> list[Any]:
            (seen,) = carry
            at = arith.addi(arith.muli(i, number(blocks)), block)
            here = piece(data, arith.addi(arith.muli(at, number(128 * unroll)), thread))
            got = [
                llvm.inline_asm(
                    four,
                    [here],
                    f"ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4+{k * 2048}];",
                    "=r,=r,=r,=r,l",
                    has_side_effects=True,
                )
                for k in range(unroll)
            ]
            for load, k in itertools.product(got, range(4)):
                seen = arith.xori(seen, llvm.extractvalue(i32, load, [k]))
            return [seen]

        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [utils.memref_ptr(out), loop.results[0]],
            "{ .reg .pred p; setp.eq.u32 p, $1, 0x12345; @p st.global.b32 [$0], $1; }",
            "l,r",
            has_side_effects=True,
        )

    def copy(pieces: int) -> Callable[..., None]:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def copy(ctx: Any, x: Any, out: Any) -> None:
            first = arith.muli(utils.block_idx(), number(128))
            first = arith.addi(first, utils.thread_idx())
            for begin in range(0, pieces, 128 * blocks):
                at = arith.addi(first, number(begin))
                live = arith.cmpi(arith.CmpIPredicate.ult, at, number(pieces))
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [piece(x, at), piece(out, at), arith.extui(number(0).type, live)],
                    "{ .reg .pred p; .reg .b32 v<4>; setp.ne.b32 p, $2, 0; "
                    "@p ld.global.v4.b32 {v0, v1, v2, v3}, [$0]; "
                    "@p st.global.v4.b32 [$1], {v0, v1, v2, v3}; }",
                    "l,l,r",
                    has_side_effects=True,
                )

        return copy

    def call(data: jax.Array, *order: jax.Array) -> jax.Array:
        def read_bytes(data: Any, *refs: Any) -> None:
            read(data, refs[-1])
            if order:
                copy(order[0].nbytes // 16)(refs[0], refs[-1])

        out = order[0] if order else jax.ShapeDtypeStruct((128,), jnp.int32)
        semantics = plgpu.LoweringSemantics.Warpgroup
        kernel = plgpu.kernel(
            read_bytes,
            out_type=jax.ShapeDtypeStruct(out.shape, out.dtype),
            grid=(blocks,),
            grid_names=("n",),
            compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
        )
        return kernel(data, *order)

    return call


def number(value: int, bits: int = 32) -> ir.Value:
    """A constant."""
    kind = ir.IntegerType.get_signless(bits)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))


def piece(ref: ir.Value, at: ir.Value) -> ir.Value:
    """A pointer to 16 bytes of what a reference holds."""
    byte = arith.muli(arith.extui(ir.IntegerType.get_signless(64), at), number(16, 64))
    start, unit = utils.memref_ptr(ref), ir.IntegerType.get_signless(8)
    return llvm.getelementptr(
        start.type, start, [byte], [-2147483648], unit, llvm.GEPNoWrapFlags.none
    )


def poison() -> None:
    """Leaves NaN in memory that the next results get."""
    jax.block_until_ready([jnp.full((2**20,), jnp.nan, jnp.bfloat16) for _ in range(8)])


@functools.partial(jax.jit, static_argnums=1)  # compiled once for all seeds
def random_words(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """int32 whose bits are random."""
    return jax.random.bits(jax.random.key(seed), shape).view(jnp.int32)


def rotation(size: int) -> int:
    """How many buffers of `size` bytes exceed the L2 cache."""
    return max(3, min(24, -(-L2 // size)))


def best_reader(size: int) -> tuple[float, Callable[..., Any], list[jax.Array]]:
    """The fastest reader of `size` bytes, its time in microseconds, and the buffers it read."""
    unit = 4 * 128 * 4 * max(u for _, u in READERS)
    words = -(-size // unit) * unit // 4
    buffers = [random_words(i, (words,)) for i in range(rotation(size))]
    best = None
    for blocks, unroll in READERS:
        read = reader(words, blocks, unroll)
        calls = durations(lambda *b, read=read: [read(v) for v in b], *buffers)
        time = statistics.median(us for call in calls for _, us in call)
        if best is None or time < best[0]:
            best = time, read
    assert best is not None
    return *best, buffers


def dot(m: int, k: int, n: int) -> float:
    """Microseconds of XLA's bfloat16 dot, all its kernels counted."""
    count = rotation(2 * k * n)
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), count)
    weights = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys]
    calls = durations(lambda x, *w: [jnp.dot(x, v) for v in w], x, *weights)
    return statistics.median(sum(us for _, us in call) for call in calls) / count


def codes_dot(m: int, k: int, n: int, dtype: str) -> tuple[float, list[str]]:
    """Microseconds of cuBLASLt's product of codes `[m, k]` and `[n, k]`, and the kernels it ran."""
    count = rotation(k * n)
    words = [random_words(i, (n, k // 4)) for i in range(count)]
    weights = [w.view(jnp.int8).astype(dtype) for w in words]  # of 256 integers, whatever the dtype
    x = random_words(count, (m, k // 4)).view(jnp.int8).astype(dtype)
    one = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=CODES[dtype],
    )
    turns = lambda x, w: [one(x, v) for v in w]
    program = compiled(turns, x, weights, options={"xla_gpu_enable_triton_gemm": False})
    calls = timed(program, x, weights)
    us = statistics.median(sum(us for _, us in call) for call in calls) / count
    return us, sorted({name for name, _ in calls[0]})


def main() -> None:
    """Measures and writes all of it."""
    card = jax.devices()[0].device_kind
    reads = {}
    for size in READ_SIZES:
        us = reads[size] = best_reader(size)[0]
        print(f"read {size / MIB:6.0f} MiB: {us:7.2f} us, {size / us / 1e6:.2f} TB/s")
    copied = [random_words(i, (64 * MIB,)) for i in range(2)]
    calls = durations(lambda *v: [lax.optimization_barrier(x) + 1 for x in v], *copied)
    copy = statistics.median(us for call in calls for _, us in call)
    print(f"copy 256 MiB: {copy:.2f} us, {2 * 256 * MIB / copy / 1e6:.2f} TB/s both ways")
    tiny = random_words(0, (8, 128))
    calls = durations(lambda v: lax.optimization_barrier(v) + 1, tiny)
    empty = statistics.median(us for call in calls for _, us in call)
    print(f"a launch that adds 1 to 4 KiB: {empty:.2f} us")
    dots = {f"{m}x{k}x{n}": dot(m, k, n) for m, k, n in DOTS}
    for name, time in dots.items():
        print(f"bf16 dot {name}: {time:.2f} us")
    codes: dict[str, dict[str, Any]] = {dtype: {} for dtype in CODES}
    for dtype, (m, k, n) in itertools.product(CODES, DOTS):
        us, kernels = codes_dot(m, k, n, dtype)
        codes[dtype][f"{m}x{k}x{n}"] = {"us": us, "kernels": kernels}
        print(f"{dtype} dot {m}x{k}x{n}: {us:.2f} us by {', '.join(kernels)}")
    path = pathlib.Path(__file__).parent / "results" / f"ceilings_{card.replace(' ', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    results = {"card": card, "jax": jax.__version__, "command": "python experiments/ceilings.py"}
    results |= {"read_us": reads, "copy_256_mib_us": copy, "launch_us": empty, "bf16_dot_us": dots}
    results |= {"codes_dot": codes}
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
