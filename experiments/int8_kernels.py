"""How fast int8 by int8 products are on this GPU, with outlier columns and without; whether right.

Small products are compared with the exact one (largest difference over the largest value of its
row; the result in float32 and in bfloat16). Then, in turns, wall clock of calls in flight, medians:

    ours, outliers     the kernel, and the kernel with 64 columns of x in bfloat16 beside
    int8 dot           cuBLASLt's, of codes as they lie best for it, to int32: nothing scaled
    xla                that dot, its scales and the rounding to bfloat16
    w8a16              the kernel that multiplies the same weight with x in bfloat16
    bf16               XLA's dot of a bfloat16 weight
    int8_token         x in bfloat16 through `qjax.quantized`, the weight prepared
    llm_int8           the same with seven of the features of x as outlier columns
    xla llm_int8       that with the weight as it was quantized

    python experiments/int8_kernels.py [check] [time] [tune] [--json ROWS.json]

XLA's Triton matmuls are off, so that its int8 product is cuBLASLt's.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fp8_kernels import turns  # switches Triton off before jax starts
from jax import lax

import qjax
from pallas_kernels.int8_matmul import mosaic_gpu, problems
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul import mosaic_wgmma
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem as Product

ORDER = LAYOUTS["hopper8"]


def operands(problem: Problem) -> dict[str, Any]:
    """Random codes of all values, scales, and outlier columns of magnitudes from 6 up."""
    m, k, n = problem.m, problem.weight.k, problem.weight.n
    keys = jax.random.split(jax.random.key(problem.m + k), 6)
    codes = jax.random.randint(keys[1], (k, n), -128, 128, jnp.int8)
    scale = jax.random.uniform(keys[2], (1, n), jnp.float32, 0.5, 2) / 100
    held = {"codes": codes, "scale": scale}
    held["x"] = jax.random.randint(keys[0], (m, k), -127, 128, jnp.int8)
    held["x_scale"] = jax.random.uniform(keys[3], (m,), jnp.float32, 0.5, 2) / 100
    packed = {"codes": ORDER.pack_codes(codes, problem.weight)}
    held["arrays"] = packed | {"scale": ORDER.pack_scale(scale, problem.weight)}
    at = jax.random.choice(keys[4], k, (problem.outliers,), replace=False)
    columns = jax.random.normal(keys[5], (m, problem.outliers)) * 20
    held["outliers"] = (columns.astype(jnp.bfloat16), at.astype(jnp.int32))
    return held


def agree(m: int = 300, k: int = 1024, n: int = 512) -> float:
    """Prepared weights in the model's way against QTensors, both on this device: the largest
    difference over the largest value, with as many outliers as fit, more, and few rows.
    """
    worst, w = 0.0, jax.random.normal(jax.random.key(0), (k, n))
    call = jax.jit(qjax.quantized(lambda p, x: x @ p["w"].astype(x.dtype)))
    for rows, count in ((m, 0), (m, 5), (m, 40), (12, 5)):
        q = qjax.quantize(w, "int8/int8_token", 0)
        act = dataclasses.replace(q.activation, threshold=6.0, budget=16)
        q = {"w": dataclasses.replace(q, activation=act)}
        x = jax.random.normal(jax.random.key(1), (rows, k), jnp.bfloat16)
        x = x.at[:, 3 : 3 + count].multiply(30)
        got, wanted = (call(p, x).astype(jnp.float32) for p in (qjax.prepare(q), q))
        worst = max(worst, float(jnp.max(jnp.abs(got - wanted)) / jnp.max(jnp.abs(wanted))))
    if not worst <= 2**-7:  # one unit of bfloat16
        raise SystemExit(f"prepared weights are {worst} from QTensors")
    return worst


def check(problem: Problem) -> dict[str, Any]:
    """The largest error over the largest value of its row, beside that of rounding the result."""
    held = operands(problem)
    outliers = held["outliers"] if problem.outliers else ()
    args = held["x"], held["x_scale"], held["arrays"], *outliers
    got = np.asarray(mosaic_gpu.run(*args, problem=problem), np.float64)
    codes, columns = np.asarray(held["codes"], np.float64), np.asarray(held["outliers"][0])
    truth = np.asarray(held["x"], np.float64) @ codes * np.asarray(held["x_scale"])[:, None]
    truth += columns.astype(np.float64) @ codes[np.asarray(held["outliers"][1])]
    truth *= np.asarray(held["scale"], np.float64)
    largest = np.max(np.abs(truth), axis=1, keepdims=True)
    off = lambda y: float(np.max(np.abs(y - truth) / largest))
    error, rounding = off(got), off(np.asarray(jnp.asarray(truth, problem.out), np.float64))
    if not error <= rounding + 1e-6:  # float32 scales and sums of outliers
        raise SystemExit(f"{problem}: {error} from the exact product, rounding it {rounding}")
    return {"error": error, "rounding": rounding}


def measure(problem: Problem) -> dict[str, Any]:
    """Microseconds of each, in turns."""
    held, weight = operands(problem._replace(outliers=64)), problem.weight
    plain, second = problem._replace(outliers=0), problem._replace(outliers=64)
    x, x_scale, arrays = held["x"], held["x_scale"], held["arrays"]
    columns, at = held["outliers"]
    rows, scale = held["codes"].T.copy(), held["scale"][0]
    floats = jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16)
    floats = floats.at[:, at[:7]].multiply(20)
    wide = (held["codes"].astype(jnp.float32) * held["scale"]).astype(jnp.bfloat16)
    ours = functools.partial(mosaic_gpu.run, problem=plain)
    with_second = functools.partial(mosaic_gpu.run, problem=second)
    contract = (((1,), (1,)), ((), ()))
    dot = functools.partial(
        lax.dot_general, dimension_numbers=contract, preferred_element_type=jnp.int32
    )

    def xla(x, x_scale, rows, scale):
        y = dot(x, rows).astype(jnp.float32)
        return (y * x_scale[:, None] * scale).astype(jnp.bfloat16)

    q = qjax.quantize(held["codes"].astype(jnp.float32), "int8/int8_token", 0)
    tokens = qjax.prepare({"w": q}, unsupported="raise")
    apart = dataclasses.replace(q.activation, threshold=6.0, budget=64)
    q = {"w": dataclasses.replace(q, activation=apart)}
    prepared = qjax.prepare(q, unsupported="raise")
    model = qjax.quantized(lambda p, x: x @ p["w"].astype(x.dtype))
    print(qjax.explain(model, prepared, floats).uses[0].how, flush=True)
    w8a16 = Product(problem.m, weight, problem.layout, "bfloat16", "bfloat16")
    calls = {
        "ours": (ours, (x, x_scale, arrays)),
        "outliers": (with_second, (x, x_scale, arrays, columns, at)),
        "int8 dot": (dot, (x, rows)),
        "xla": (xla, (x, x_scale, rows, scale)),
        "w8a16": (functools.partial(mosaic_wgmma.run, problem=w8a16), (floats, arrays)),
        "bf16": (lambda x, w: x @ w, (floats, wide)),
        "int8_token": (model, (tokens, floats)),
        "llm_int8": (model, (prepared, floats)),
        "xla llm_int8": (model, (q, floats)),
    }
    programs = compiled(calls)
    got, wanted = (programs[name][0](*programs[name][1]) for name in ("ours", "xla"))
    largest = jnp.max(jnp.abs(wanted.astype(jnp.float32)), axis=1, keepdims=True)
    off = float(jnp.max(jnp.abs(got.astype(jnp.float32) - wanted.astype(jnp.float32)) / largest))
    if not off <= 2**-7:  # one unit of bfloat16
        raise SystemExit(f"{problem}: {off} from XLA's product")
    us = {name: round(us, 1) for name, us in turns(programs).items()}
    return {"off": off, "us": us}


def compiled(calls: dict[str, tuple[Any, tuple]]) -> dict[str, tuple[Any, tuple]]:
    """The same calls, compiled side by side."""
    build = lambda call: (jax.jit(call[0]).lower(*call[1]).compile(), call[1])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(calls, pool.map(build, calls.values()), strict=True))


def tune(problem: Problem) -> dict[str, Any]:
    """Microseconds of every config that fits."""
    held, calls = operands(problem), {}
    args = held["x"], held["x_scale"], held["arrays"], *(held["outliers"] * bool(problem.outliers))
    for rows, steps, width in itertools.product((64, 128, 256), (3, 4, 6), (4, 8, 16)):
        config = mosaic_gpu.Config(rows, steps, width)
        if mosaic_gpu.fits(problem, config) is not None:
            continue
        if rows < 2 * problem.m:
            calls[str(tuple(config[:3]))] = (
                functools.partial(mosaic_gpu.launch, problem, config),
                args,
            )
    us = turns(compiled(calls))
    best = sorted(us, key=us.get)[:5]
    chosen = str(tuple(mosaic_gpu.choose_config(problem)[:3]))
    return {"chosen": (chosen, us.get(chosen)), "best": {name: round(us[name], 1) for name in best}}


DOING = {
    "check": (check, problems.SMALL + problems.TALL),
    "time": (measure, problems.LARGE),
    "tune": (tune, problems.LARGE),
}


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["check", "time"], help=", ".join(DOING))
    parser.add_argument("--shapes", nargs="*", help="of LARGE, as m x k x n: 1024x8192x8192")
    parser.add_argument("--json", type=pathlib.Path, help="where rows go")
    options, rows = parser.parse_args(), []
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    if "check" in options.what:
        print("prepared and not, apart:", agree(), flush=True)
    for what in options.what:
        do, wanted = DOING[what]
        for problem in wanted:
            weight = problem.weight
            shape = f"{problem.m}x{weight.k}x{weight.n}"
            if what != "check" and options.shapes and shape not in options.shapes:
                continue
            row = {"what": what, "m": problem.m, "k": weight.k, "n": weight.n}
            row |= {"outliers": problem.outliers, "out": problem.out} | do(problem)
            print(row, flush=True)
            rows.append(row)
            if options.json:
                card, command = jax.devices()[0].device_kind, "python experiments/int8_kernels.py"
                meta = {"card": card, "jax": jax.__version__, "command": command}
                options.json.write_text(json.dumps(meta | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
