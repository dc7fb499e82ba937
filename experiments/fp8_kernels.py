"""How close the FP8 kernels come to a copy and to cuBLASLt on this GPU, and whether they are right.

Casts are compared bit for bit with their definition, products with the float32 product of the same
codes and scales (largest difference over the largest value of its row). Then each takes turns with
what it is measured against: XLA's copy of as many bytes and XLA's own code for the definition;
cuBLASLt's FP8 product of the same codes, without scales, and for scales of rows with XLA's pass
over its result. Wall clock over calls in flight, medians. Rows are written to a JSON file as they
are made, small problems, which are not timed, last.

    python experiments/fp8_kernels.py [OP...] [--json ROWS.json] [--sizes]

`--sizes` asks instead from which size on the kernels beat XLA's code: square tensors, many calls in
one program, as dispatching one takes longer than a small kernel.

XLA's Triton matmuls are off, so that its FP8 product is cuBLASLt's.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.amax import hopper_kernel as maxima
from pallas_kernels.amax import mosaic_gpu as amax_plan
from pallas_kernels.amax import problems as amax_problems
from pallas_kernels.amax import reference as amax_reference
from pallas_kernels.block_scaled_matmul import hopper_kernel as products
from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_plan
from pallas_kernels.block_scaled_matmul import problems as block_problems
from pallas_kernels.block_scaled_matmul import reference as block_reference
from pallas_kernels.cast_fp8 import mosaic_gpu as casts
from pallas_kernels.cast_fp8 import problems as cast_problems
from pallas_kernels.cast_fp8 import reference as cast_reference
from pallas_kernels.row_scaled_matmul import mosaic_gpu as row_plan
from pallas_kernels.row_scaled_matmul import problems as row_problems
from pallas_kernels.row_scaled_matmul import reference as row_reference

F8, F32 = jnp.float8_e4m3fn, jnp.float32
ROUNDS, SECONDS = 5, 0.02  # medians of so many turns, each at least so long
SIZES, CALLS = (512, 1024, 2048, 4096), 16


def turns(calls: dict[str, tuple[Callable[..., Any], tuple]]) -> dict[str, float]:
    """Microseconds of a call of each, taken in turns."""
    compiled = {
        name: f if isinstance(f, jax.stages.Compiled) else jax.jit(f).lower(*args).compile()
        for name, (f, args) in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for turn in range(ROUNDS + 1):
        for name, (_, args) in calls.items():
            run = compiled[name]
            start = time.perf_counter()
            for _ in range(counts.get(name, 3)):
                out = run(*args)
            jax.block_until_ready(out)
            each = (time.perf_counter() - start) / counts.get(name, 3)
            del out
            if turn == 0:  # warms up, and says how many calls a turn takes
                counts[name] = max(3, int(SECONDS / each))
            else:
                times[name].append(1e6 * each)
    return {name: statistics.median(v) for name, v in times.items()}


def different(a: jax.Array, b: jax.Array) -> int:
    """Elements that are not the same number; NaN equals NaN."""
    a, b = a.astype(F32), b.astype(F32)
    same = (a == b) & (jnp.signbit(a) == jnp.signbit(b)) | (jnp.isnan(a) & jnp.isnan(b))
    return int(jnp.sum(~same))


def cast_operands(problem: Any) -> tuple[jax.Array, ...]:
    """Random x of many magnitudes with a NaN, an Inf and zeros, and reciprocals where given."""
    shape = (problem.rows, problem.columns)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    x = x.at[5, 7].set(jnp.nan).at[200, 300].set(jnp.inf).at[128:256, :128].set(0)
    x = x.at[:, 128:200].multiply(1e-30)
    if problem.scales != "given":
        return (x,)
    pairs = zip(jax.random.split(jax.random.key(1)), shape[: 1 + problem.turned], strict=False)
    return x, *(jax.random.uniform(k, (n,), F32, 50, 200) for k, n in pairs)


def cast(problem: Any, timed: bool) -> dict[str, Any]:
    """Bits that differ, and times."""
    args = cast_operands(problem)
    ours = functools.partial(casts.run, problem=problem)
    wanted = functools.partial(cast_reference.run, problem=problem)
    made, truth = jax.jit(ours)(*args), jax.jit(wanted)(*args)
    off = sum(different(*pair) for pair in zip(made, truth, strict=True))
    row = {"op": "cast_fp8", **problem._asdict(), "different": off}
    if timed:
        # of as many bytes, in 32-bit words: XLA copies shorter ones at 3/4 of the speed, and halves
        # that do not begin at whole vectors of words at 3/5
        moved = sum(v.nbytes for v in (*args, *made)) // 4
        half, copy = moved // 3 // 1024 * 1024, lambda w: w[:half] ^ w[half:]
        if problem.turned:  # as much is written as read
            half, copy = moved // 4, lambda w: w ^ 1
        words = jax.random.bits(jax.random.key(2), (2 * half,))
        del made, truth
        us = turns({"copy": (copy, (words,)), "xla": (wanted, args), "ours": (ours, args)})
        share, bar = us["copy"] / us["ours"], 0.93 if problem.turned else 0.95
        row |= {"us": us, "of_copy": share, "xla_of_copy": us["copy"] / us["xla"]}
        row |= {"bar": bar, "verdict": "met" if share >= bar else "MISSED"}
    return row


def amax(problem: Any, timed: bool) -> dict[str, Any]:
    """Maxima that differ, and times beside XLA's and a sum, which reads the same bytes."""
    args = cast_operands(cast_problems.Problem(problem.rows, problem.columns, "block"))
    configs = {"ours": amax_plan.config(problem)}
    configs |= {f"{t}x{s}": amax_plan.Config(t, s) for t, s in ((1, 1), (4, 2))}
    kernels = {name: maxima.kernel(problem, config) for name, config in configs.items()}
    wanted = functools.partial(amax_reference.run, problem=problem)
    truth = jax.jit(wanted)(*args)
    found = {name: sum(map(different, jax.jit(f)(*args), truth)) for name, f in kernels.items()}
    row = {"op": "amax", **problem._asdict(), "different": sum(found.values())}
    if timed:
        read = lambda x: jnp.sum(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
        calls = {"read": (read, args), "xla": (wanted, args)}
        us = turns(calls | {n: (f, args) for n, f in kernels.items()})
        row |= {"us": us, "of_read": {n: us["read"] / us[n] for n in (*kernels, "xla")}}
    return row


def block_operands(problem: Any) -> tuple[jax.Array, ...]:
    """Codes and scales of random matrices."""
    keys = jax.random.split(jax.random.key(0))
    cast = lambda rows, kind, key: jax.jit(
        lambda: cast_reference.run(
            jax.random.normal(key, (rows, problem.k), jnp.bfloat16),
            problem=cast_problems.Problem(rows, problem.k, kind),
        )
    )()
    a, _, a_scale, _ = cast(problem.m, "block", keys[0])
    b, _, b_scale, *_ = cast(problem.n, "block" if problem.b_rows else "tile", keys[1])
    return a, a_scale, b, b_scale


@functools.cache
def block_product(problem: Any) -> jax.stages.Compiled:
    """The kernel."""
    of_b = (problem.k // 128, problem.n) if problem.b_rows else (problem.n // 128, problem.k // 128)
    codes = [jax.ShapeDtypeStruct((rows, problem.k), F8) for rows in (problem.m, problem.n)]
    scales = [jax.ShapeDtypeStruct(size, F32) for size in ((problem.k // 128, problem.m), of_b)]
    call = jax.jit(products.kernel(problem, block_plan.config(problem)))
    return call.lower(codes[0], scales[0], codes[1], scales[1]).compile()


def error(
    y: jax.Array, args: tuple[jax.Array, ...], problem: Any, definition: Any = block_reference
) -> float:
    """Of the first, middle and last rows."""
    part = problem._replace(m=128, out="float32")
    reference = jax.jit(lambda *v: definition.run(*v, part))
    worst = 0.0
    for start in (0, problem.m // 256 * 128, problem.m - 128):
        at = slice(start, start + 128)
        truth = reference(args[0][at], args[1][..., at], *args[2:])
        off = jnp.max(jnp.abs(y[at].astype(F32) - truth), 1) / jnp.max(jnp.abs(truth), 1)
        worst = max(worst, float(jnp.nan_to_num(jnp.max(off), nan=jnp.inf)))
    return worst


def product(problem: Any, timed: bool) -> dict[str, Any]:
    """Its error and times."""
    args = block_operands(problem)
    if problem.b_rows and not timed:  # of the first columns: too far apart for totals in units
        args = (*args[:3], args[3].at[0, : block_plan.BLOCK].multiply(2.0**-45))
    ours = block_product(problem)
    row = {"op": "block_scaled_matmul", **problem._asdict()}
    row["error"] = error(ours(*args), args, problem)
    return row | (beside_cublaslt(problem, args, {"ours": ours}) if timed else {})


def library(a: jax.Array, _: jax.Array, b: jax.Array, __: jax.Array) -> jax.Array:
    """CuBLASLt's product, without scales."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def beside_cublaslt(problem: Any, args: tuple, calls: dict[str, Any]) -> dict[str, Any]:
    """Times, and the shares of cuBLASLt's speed."""
    us = turns({n: (f, args) for n, f in ({"cublaslt": library} | calls).items()})
    flops = 2e-6 * problem.m * problem.n * problem.k
    shares = {n: us["cublaslt"] / us[n] for n in calls}
    return {
        "us": us,
        "tflops": {n: flops / t for n, t in us.items()},
        "of_cublaslt": shares["ours"] if len(shares) == 1 else shares,
    }


def scaled(problem: Any, timed: bool) -> dict[str, Any]:
    """Its error, and times beside cuBLASLt's product and XLA's pass over that with the scales.

    The tensor cores keep 14 bits of sums over all of k, cuBLASLt's too: that is most of the error.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    code = jax.jit(
        lambda key, rows: (64 * jax.random.normal(key, (rows, problem.k), jnp.bfloat16)).astype(F8),
        static_argnums=1,
    )
    scale = lambda key, rows: jax.random.uniform(key, (rows,), F32, 0.5, 2)
    args = code(keys[0], problem.m), scale(keys[1], problem.m)
    args += code(keys[2], problem.n), scale(keys[3], problem.n)
    ours = functools.partial(row_plan.run, problem=problem)
    xla = lambda a, sa, b, sb: (
        (library(a, sa, b, sb).astype(F32) * sa[:, None]) * sb[None, :]
    ).astype(problem.out)
    row = {"op": "row_scaled_matmul", **problem._asdict()}
    for name, f in {"error": ours, "xla_error": xla}.items():
        row[name] = error(jax.jit(f)(*args), args, problem, row_reference)
    return row | (beside_cublaslt(problem, args, {"xla": xla, "ours": ours}) if timed else {})


def sizes(n: int) -> dict[str, Any]:
    """Microseconds of a call on n x n, of each op: the kernel, and XLA's code for the same."""
    xs = [jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(CALLS)]
    ones = jnp.ones(n)
    given, tile = (cast_problems.Problem(n, n, kind) for kind in ("given", "tile"))
    maximum = amax_problems.Problem(n, n)
    of_a = [cast_reference.run(x, problem=given._replace(scales="block")) for x in xs]
    of_b = [cast_reference.run(x, problem=tile) for x in xs]
    operands = [(a[0], a[2], b[0], b[2]) for a, b in zip(of_a, of_b, strict=True)]
    work = block_problems.Problem(n, n, n, False, "bfloat16")
    wide = lambda a, sa, b, sb: (
        (a.astype(F32) * jnp.repeat(sa.T, 128, 1)).astype(jnp.bfloat16)
        @ (b.astype(F32) * jnp.repeat(jnp.repeat(sb, 128, 0), 128, 1)).astype(jnp.bfloat16).T
    )
    pairs = {
        "cast": (
            lambda x: casts.run(x, ones, ones, problem=given),
            lambda x: cast_reference.run(x, ones, ones, problem=given),
            [(x,) for x in xs],
        ),
        "amax": (
            lambda x: amax_plan.run(x, maximum),
            lambda x: amax_reference.run(x, maximum),
            [(x,) for x in xs],
        ),
        "product": (lambda *v: block_plan.run(*v, work), wide, operands),
    }
    row: dict[str, Any] = {"n": n}
    for name, (ours, xla, args) in pairs.items():
        many = lambda f: lambda *v: [f(*one) for one in v]
        us = turns({"ours": (many(ours), tuple(args)), "xla": (many(xla), tuple(args))})
        row |= {name: us["ours"] / CALLS, f"{name} xla": us["xla"] / CALLS}
    return row


def text(row: dict[str, Any]) -> str:
    """One line."""
    short = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    flat = lambda v: (
        " ".join(f"{n} {short(x)}" for n, x in v.items()) if isinstance(v, dict) else short(v)
    )
    return "  ".join(f"{name}: {flat(v)}" for name, v in row.items())


OPS = {
    "product": (product, block_problems.SMALL.values(), block_problems.LARGE),
    "scaled": (scaled, row_problems.SMALL, row_problems.LARGE),
    "cast": (cast, cast_problems.SMALL, cast_problems.LARGE),
    "amax": (amax, amax_problems.SMALL, amax_problems.LARGE),
}


def main() -> None:
    """Checks and measures all problems."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", help=", ".join(OPS))
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--sizes", action="store_true")
    args = parser.parse_args()
    card = jax.devices()[0].device_kind
    results = (
        pathlib.Path(__file__).parent / "results" / f"fp8_kernels_{card.replace(' ', '_')}.json"
    )
    print(f"{card}, jax {jax.__version__}")
    if args.sizes:
        for n in SIZES:
            print(text(sizes(n)), flush=True)
        return
    path = args.json or results
    path.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    chosen = [OPS[name] for name in args.ops or OPS]
    if OPS["product"] in chosen:  # compiled side by side
        problems = (*block_problems.LARGE, *block_problems.SMALL.values())
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(block_product, problems))
    work = [(measure, p, True) for measure, _, large in chosen for p in large]
    work += [(measure, p, False) for measure, small, _ in chosen for p in small]
    for measure, problem, timed in work:
        rows.append(measure(problem, timed))
        print(text(rows[-1]), flush=True)
        held = {"card": card, "jax": jax.__version__, "rows": rows}
        path.write_text(json.dumps(held, indent=1) + "\n")
    bar = lambda row: max(0.005, 1.2 * row.get("xla_error", 0))
    bad = [r for r in rows if r.get("different") or r.get("error", 0) > bar(r)]
    print("all are right" if not bad else f"WRONG: {len(bad)}")


if __name__ == "__main__":
    main()
