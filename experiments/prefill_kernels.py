"""Finds the fastest config of Hopper's kernel for m > 16 per shape, and how far the ceiling is.

Checked and timed as in tune_kernels.py. T* is the larger of the time to read the bytes (weight, x
and result) and the time of the operations at the rate of XLA's bfloat16 dot of 8192 cubed, measured
in the same run. The kernel, that dot of the same shape and the reader take turns in one program.

    python experiments/prefill_kernels.py check
    python experiments/prefill_kernels.py tune            # writes tables_wgmma/<card>.json
    python experiments/prefill_kernels.py tune int8       # this format only; other rows are kept
    ROWS=32,64 SHAPES=8192x8192 python experiments/prefill_kernels.py tune    # k x n

"""

import concurrent.futures
import datetime
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np
import tune_kernels as decode

from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma, reference
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight

SHAPES = [(8192, 8192), (4096, 28672), (4096, 4096), (14336, 4096), (4096, 6144)]  # k, n
ROWS = (32, 64, 128, 256, 1024, 4096, 16384)
FORMATS = {
    "int4": (SHAPES, ROWS),
    "int8": (SHAPES[:2], (64, 1024)),
    "fp8": (SHAPES[:2], (64, 1024)),
}
CANDIDATES = int(os.environ.get("CANDIDATES", "5"))
SECONDS = float(os.environ.get("SECONDS", "330"))  # no new shape is begun after so many
CHECKED = (17, 65, 264)  # m; of these, those that $ROWS lists
CONFIGS = [  # that checks go through, where they fit
    Config(32, 2, 8),
    Config(64, 2, 5, 2),
    Config(64, 1, 5, 2),
    Config(32, 2, 6, 4),
    Config(128, 1, 4),
    Config(128, 1, 4, 1, 2),
    Config(256, 1, 3),
    Config(256, 1, 3, 1, 2),
]


def build(problem: Problem, config: Config) -> Any:
    """A program that is compiled when it is called."""
    return jax.jit(lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a]))


def problem_of(m: int, weight: Weight, *ends: Any) -> Problem:
    """That of bfloat16 in and out."""
    return Problem(m, weight, decode.layout_of(weight), "bfloat16", "bfloat16", *ends)


def check(name: str, pool: concurrent.futures.Executor) -> bool:
    """Whether each config is at most twice as far from the truth as XLA; prints both."""
    weight, activation = decode.CHECKS[name]
    whole, arrays, w = decode.operands(max(CHECKED), weight)
    sums, good = np.asarray(whole, np.float64) @ w, True
    if activation is not None:
        bias = jax.random.normal(jax.random.key(9), (weight.n,)) * np.abs(sums).mean()
        arrays["bias"] = bias
        sums = decode.ACTIVATIONS[activation](sums + np.asarray(bias, np.float64))
    jobs: list[Any] = []
    for i, m in enumerate(chosen("ROWS", CHECKED, int)):
        problem = problem_of(m, weight, activation is not None, activation)
        configs = CONFIGS if name == "int4 square" else CONFIGS[i % 2 :: 2]
        fits = [c for c in configs if mosaic_wgmma.fits(problem, c) is None]
        jobs += [
            (m, problem, c, pool.submit(build(problem, c).lower(whole[:m], arrays).compile))
            for c in fits
        ]
    for m, same in itertools.groupby(jobs, key=lambda job: job[0]):
        x, truth, xla = whole[:m], sums[:m], None
        for _, problem, config, job in same:
            if xla is None:
                xla = decode.worst(decode.plain(x, arrays, problem), truth)
            try:
                error = decode.worst(job.result()(x, arrays), truth)
            except Exception as why:  # noqa: BLE001
                print(f"FAILED {name}, m {m}, {tuple(config)}: {str(why)[:300]}", flush=True)
                good = False
                continue
            right = error <= 2 * xla
            good = good and right
            verdict = "ok   " if right else "WRONG"
            print(
                f"{verdict} {name}, m {m}, {tuple(config)}: error {error:.5f}, XLA {xla:.5f}",
                flush=True,
            )
    return good


def check_all(names: list[str]) -> bool:
    """Those of CHECKS, four at a time: most of it is compiling."""
    executor = concurrent.futures.ThreadPoolExecutor
    with executor(12) as pool, executor(4) as workers:
        good = list(workers.map(lambda name: check(name, pool), names))
    return all([*good, *(check_joined(m) for m in (40, 300))])


def check_joined(m: int) -> bool:
    """Three weights of one x as one launch, and stacked weights in a scan."""
    weights = [Weight(1024, n, 128, "int4", "bfloat16") for n in (512, 128, 256)]
    made = [decode.operands(m, w, i) for i, w in enumerate(weights)]
    x, arrays = made[0][0], [v[1] for v in made]
    each = [problem_of(m, w) for w in weights]
    assert mosaic_wgmma.joins(each) is None
    ys = jax.jit(lambda x, a: mosaic_wgmma.run_joined(x, a, each))(x, arrays)
    truths = [np.asarray(x, np.float64) @ v[2] for v in made]
    xla = [decode.plain(x, a, p) for a, p in zip(arrays, each, strict=True)]
    worst = lambda ys: max(decode.worst(y, t) for y, t in zip(ys, truths, strict=True))
    stack = jax.tree.map(
        lambda *v: jnp.stack(v), *[decode.operands(m, weights[0], i)[1] for i in (0, 5)]
    )
    one = lambda _, a: (None, mosaic_wgmma.run(x, a, each[0]))
    scanned = jax.jit(lambda s: jax.lax.scan(one, None, s)[1])(stack)
    other = np.asarray(x, np.float64) @ decode.operands(m, weights[0], 5)[2]
    errors = worst(ys), decode.worst(scanned[0], truths[0]), decode.worst(scanned[1], other)
    good = max(errors) <= 2 * worst(xla)
    print(f"{'ok   ' if good else 'WRONG'} joined and scanned, m {m}: errors {errors}", flush=True)
    return good


def rate() -> float:
    """Operations per microsecond of XLA's bfloat16 dot of 8192 cubed."""
    return 2 * 8192**3 / ceilings.dot(8192, 8192, 8192)


def candidates(problem: Problem) -> list[Config]:
    """The best guesses."""
    guesses = [c for _, c in sorted(mosaic_wgmma.configs(problem))]
    known = mosaic_wgmma.choose_config(problem, jax.devices()[0].device_kind)
    first = [] if known is None else [known]
    return list(dict.fromkeys([*first, *guesses]))[:CANDIDATES]


def tune(problem: Problem, buffers: list[Any]) -> list[tuple[float, Config]]:
    """(microseconds, config), fastest first; compiled side by side, timed one after the other."""
    x = jax.random.normal(jax.random.key(1), (problem.m, problem.weight.k), jnp.bfloat16)
    configs = candidates(problem)

    def one(config: Config) -> Any:
        launch = lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a])
        return ceilings.compiled(lambda x, w: [launch(x, a) for a in w], x, buffers)

    with concurrent.futures.ThreadPoolExecutor(len(configs)) as pool:
        built = [pool.submit(one, config) for config in configs]
    timed = []
    for config, program in zip(configs, built, strict=True):
        try:
            calls = ceilings.timed(program.result(), x, buffers, runs=3)
        except Exception as why:  # noqa: BLE001
            print(f"{tuple(config)} does not run: {str(why)[:200]}", flush=True)
            continue
        mine = [us for call in calls for name, us in call if "quantized_matmul" in name]
        timed.append((statistics.median(mine), config))
    return sorted(timed)


def measure(problem: Problem, buffers: list[Any], config: Config, per_us: float) -> dict[str, Any]:
    """A row: the kernel in turns with XLA's dot of a bfloat16 weight and the reader."""
    m, k, n = problem.m, problem.weight.k, problem.weight.n
    size = sum(v.nbytes for v in buffers[0].values()) + 2 * m * (k + n)
    if 2 * m * k * n / per_us > size / 1e6:  # operations bind by far: nothing to read beside them
        read, data = lambda d: None, [None] * len(buffers)
    else:
        _, read, data = ceilings.best_reader(size)
    count = min(len(buffers), len(data), max(2, ceilings.rotation(2 * k * n)))
    make = lambda seed, *shape: [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(seed), count)
    ]
    launch = lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a])
    turns = lambda parts: [(launch(x, a), jnp.dot(x, w), read(d)) for x, a, w, d in parts]
    # an x for each dot, since XLA joins dots of one
    parts = list(zip(make(1, m, k), buffers, make(2, k, n), data, strict=False))
    calls = ceilings.durations(turns, parts, runs=max(5, 50 // count))
    is_dot = lambda name: not ("quantized_matmul" in name or "read_bytes" in name)
    events = [event for call in calls for event in call]
    us = statistics.median(us for name, us in events if "quantized_matmul" in name)
    reads = [us for name, us in events if "read_bytes" in name]
    read_us = statistics.median(reads) if reads else 0.0
    dots = statistics.median(sum(us for name, us in c if is_dot(name)) for c in calls) / len(parts)
    today = None
    if (k, n) == SHAPES[0]:  # XLA on the packed weight, the path of what no kernel takes
        run = lambda parts: [reference.run(x, a, problem) for x, a, *_ in parts]
        calls = ceilings.durations(run, parts, runs=3)
        today = statistics.median(sum(us for _, us in call) for call in calls) / len(parts)
    best = max(read_us, 2 * m * k * n / per_us)
    return {
        "m": m,
        "k": k,
        "n": n,
        "words": mosaic_gpu.tile_words(problem.weight),
        "config": list(config),
        "us": round(us, 2),
        "read_us": round(read_us, 2),
        "best_us": round(best, 2),
        "ratio": round(us / best, 3),
        "bf16_dot_us": round(dots, 2),
        "of_bf16": round(dots / us, 3),
        "xla_us": today and round(today, 2),
    }


def main() -> None:
    """Checks or tunes."""
    began, card = time.time(), jax.devices()[0].device_kind
    print(card, "jax", jax.__version__, flush=True)
    what, names = sys.argv[1], sys.argv[2:]
    if what == "check":
        if not check_all(names or list(decode.CHECKS)):
            raise SystemExit("the kernel is wrong")
        return
    found: list[tuple[str, Problem, Any, Config]] = []
    for name in names or ["int4"]:
        shapes, ms = FORMATS[name]
        for k, n in chosen("SHAPES", shapes, lambda v: tuple(map(int, v.split("x")))):
            weight = decode.FORMATS[name][0](k, n)
            size = -(-n // 16) * -(-k // 128) * 4 * mosaic_gpu.tile_words(weight)
            buffers = decode.random_arrays(weight, ceilings.rotation(size))
            for m in chosen("ROWS", ms, int):
                problem = problem_of(m, weight)
                timed = tune(problem, buffers)
                print(f"{time.time() - began:.0f} s, {name} {m} {k} {n}:", end=" ")
                print([(round(us, 1), tuple(c)) for us, c in timed], flush=True)
                if timed:
                    found.append((name, problem, buffers, timed[0][1]))
    per_us = rate()
    print(f"bfloat16 dot of 8192 cubed: {per_us / 1e6:.0f} TFLOP/s", flush=True)
    print("format m k n | us, read us, T* us, us / T* | bf16 dot us / us | XLA us | config")
    rows: list[dict[str, Any]] = []
    for name, problem, buffers, config in found:
        if time.time() - began > SECONDS:
            print("out of time")
            return
        row = measure(problem, buffers, config, per_us)
        print(
            f"{name} {row['m']} {row['k']} {row['n']} | {row['us']} {row['read_us']} "
            f"{row['best_us']} {row['ratio']} | {row['of_bf16']} | {row['xla_us']} | "
            f"{tuple(row['config'])}",
            flush=True,
        )
        rows.append({"format": name, **row})
        write(card, per_us, rows)


def chosen(variable: str, default: Any, read: Any) -> list[Any]:
    """What an environment variable lists, with commas between, or all."""
    return [read(v) for v in os.environ.get(variable, "").split(",") if v] or list(default)


def write(card: str, per_us: float, rows: list[dict[str, Any]]) -> None:
    """The device's table, or a file of its name in the folder $OUT; other rows are kept."""
    name = f"{card.replace(' ', '_')}.json"
    key = lambda row: (row["format"], row["k"], row["n"], row["m"])
    known = mosaic_wgmma.TABLES / name
    kept = json.loads(known.read_text())["rows"] if known.exists() else []
    made: dict[str, Any] = {"date": str(datetime.date.today()), "jax": jax.__version__}
    made["bf16_tflops"] = round(per_us / 1e6)
    merged = {key(row): row for row in kept} | {key(row): row | made for row in rows}
    head = {"device": card, "command": "python experiments/prefill_kernels.py tune"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in merged.values())
    out = pathlib.Path(os.environ.get("OUT", mosaic_wgmma.TABLES))
    out.mkdir(exist_ok=True)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    (out / name).write_text(text)


if __name__ == "__main__":
    main()
