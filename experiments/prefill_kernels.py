"""Finds the fastest config of Hopper's kernel for m > 16 per shape, and how far the ceiling is.

Checked and timed as in tune_kernels.py. T* is the larger of the time to read the bytes (weight, x
and result) and the time of the operations at the rate of XLA's bfloat16 dot of 8192 cubed, measured
at the beginning; from 512 rows on, where a card may not hold that rate, behind each row too. The
kernel, that dot of the same shape and the reader take turns in one program; ratios are medians of
those of turns.

    python experiments/prefill_kernels.py check
    python experiments/prefill_kernels.py tune            # writes tables_wgmma/<card>.json
    python experiments/prefill_kernels.py tune int8       # this format only; other rows are kept
    ROWS=32,64 SHAPES=8192x8192 python experiments/prefill_kernels.py tune    # k x n
    CANDIDATES=1 python experiments/prefill_kernels.py tune    # configs of the table or guess

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
from collections.abc import Callable
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np
import tune_kernels as decode

from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma, problems
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight

SHAPES = [(8192, 8192), (4096, 28672), (4096, 4096), (14336, 4096), (4096, 6144)]  # k, n
ROWS = (32, 64, 128, 256, 512, 1024, 4096, 16384)
FORMATS = {
    "int4": (SHAPES, ROWS),
    "int8": (SHAPES[:2], (32, 64, 128, 256, 1024)),
    "fp8": (SHAPES[:2], (32, 64, 128, 256, 1024)),
    "nf4": (SHAPES[:2], (64, 1024)),
}
CANDIDATES = int(os.environ.get("CANDIDATES", "5"))
SECONDS = float(os.environ.get("SECONDS", "330"))  # no row is measured after so many
HOT = 512  # rows from which on the card may not hold its rate, and a row has no reader above
CHECKED = (17, 65, 264)  # m; of these, those that $ROWS lists
CHECKS = {  # more than those of decoding
    **decode.CHECKS,
    "int4 short": (Weight(64, 264, 32, "int4", "bfloat16"), None),
    "int8 short": (Weight(40, 64, 40, "int8"), "relu"),
    "nf4 channel": (Weight(2048, 264, 2048, "uint4", values=problems.NF4), None),
    "nf4 short scales": (Weight(2048, 264, 64, "uint4", "bfloat16", values=problems.NF4), None),
    # at m 264 the last round is short: of clusters of two, of four
    "int4 rounds": (Weight(1024, 11520, 128, "int4", "bfloat16"), None),
    "int4 rounds of four": (Weight(1024, 8192, 128, "int4", "bfloat16"), None),
}
EVERY = ("int4 square", "int4 rounds", "int4 rounds of four")  # all configs that fit are checked
CONFIGS = [  # a fourth of them per m for the others
    Config(32, 2, 8),
    Config(64, 2, 5, 2),
    Config(64, 2, 4, channels=64, teams=2),
    Config(64, 1, 4, 2, channels=64, teams=2),
    Config(64, 1, 5, 2),
    Config(128, 1, 4),
    Config(32, 2, 6, 2, channels=64, teams=2),
    Config(64, 1, 6, 2, channels=128, teams=2),
    Config(128, 1, 4, 1, 2),
    Config(256, 1, 3),
    Config(256, 1, 3, 2),
    Config(256, 1, 3, 4),
    Config(128, 1, 4, 4),
    Config(32, 1, 4, channels=128, teams=2),
    Config(32, 2, 6, 4, channels=64, teams=2),
    Config(256, 1, 3, 1, 2),
    Config(64, 2, 6, 1, 2, channels=64, teams=2),
    Config(32, 2, 4, 1, 2, channels=128, teams=2),
    Config(32, 2, 6, 4),
    Config(32, 2, 4, channels=128, teams=2),
    Config(64, 2, 4, channels=256),
    Config(32, 2, 5, 2, channels=256),
    Config(64, 1, 4, 1, 2, channels=256),
    Config(64, 1, 4, 2, channels=256),
]


def build(problem: Problem, config: Config) -> Any:
    """A program that is compiled when it is called."""
    return jax.jit(lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a]))


def problem_of(m: int, weight: Weight, *ends: Any) -> Problem:
    """That of bfloat16 in and out."""
    return Problem(m, weight, decode.layout_of(weight), "bfloat16", "bfloat16", *ends)


def check(name: str, pool: concurrent.futures.Executor) -> bool:
    """Whether each config is at most twice as far from the truth as XLA, and without a bias decodes
    to the bit (a codebook's values times other scales than bfloat16: to a unit); prints both.
    """
    weight, activation = CHECKS[name]
    singles = [] if activation else decode.singles(max(CHECKED), weight)
    units = int(weight.values is not None and weight.scale != "bfloat16")
    whole, arrays, w = decode.operands(max(CHECKED), weight)
    sums, good = np.asarray(whole, np.float64) @ w, True
    if activation is not None:
        bias = jax.random.normal(jax.random.key(9), (weight.n,)) * np.abs(sums).mean()
        arrays["bias"] = bias
        sums = decode.ACTIVATIONS[activation](sums + np.asarray(bias, np.float64))
    jobs: list[Any] = []
    first = list(CHECKS).index(name)
    for i, m in enumerate(decode.chosen("ROWS", CHECKED, int)):
        problem = problem_of(m, weight, activation is not None, activation)
        configs = CONFIGS if name in EVERY else CONFIGS[(first + i) % 4 :: 4]
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
                ceilings.poison()
                error, run = decode.worst(job.result()(x, arrays), truth), job.result()
                off = sum(decode.off(run(one[:m], a), y[:m], units) for one, a, y in singles)
            except Exception as why:  # noqa: BLE001
                print(f"FAILED {name}, m {m}, {tuple(config)}: {str(why)[:300]}", flush=True)
                good = False
                continue
            right = error <= 2 * xla and not off
            good = good and right
            verdict = "ok   " if right else "WRONG"
            print(
                f"{verdict} {name}, m {m}, {tuple(config)}: error {error:.5f}, XLA {xla:.5f}, "
                f"{off} weights differ",
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


def clock() -> Callable[[], float]:
    """What measures operations per microsecond of XLA's bfloat16 dot of 8192 cubed."""
    x, w = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in (0, 1))
    program = ceilings.compiled(jnp.dot, x, w)

    def rate() -> float:
        calls = ceilings.timed(program, x, w)
        return 2 * 8192**3 / statistics.median(sum(us for _, us in call) for call in calls)

    return rate


def candidates(problem: Problem) -> list[Config]:
    """The best guesses."""
    guesses = [c for _, c in sorted(mosaic_wgmma.configs(problem))]
    known = mosaic_wgmma.choose_config(problem, jax.devices()[0].device_kind)
    first = [] if known is None else [known]
    return list(dict.fromkeys([*first, *guesses]))[:CANDIDATES]


def tune(problem: Problem, buffers: list[Any], pool: Any) -> Callable[[], list[Any]]:
    """A function that times: [(microseconds, config)], fastest first. Compiling is begun."""
    x = jax.random.normal(jax.random.key(1), (problem.m, problem.weight.k), jnp.bfloat16)
    few = buffers[:8]

    def one(config: Config) -> Any:
        launch = lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a])
        return ceilings.compiled(lambda x, w: [launch(x, a) for a in w], x, few)

    built = [(config, pool.submit(one, config)) for config in candidates(problem)]

    def time_all() -> list[Any]:
        timed = []
        for config, program in built:
            try:
                calls = ceilings.timed(program.result(), x, few, runs=4)
            except Exception as why:  # noqa: BLE001
                print(f"{tuple(config)} does not run: {str(why)[:200]}", flush=True)
                continue
            mine = [us for call in calls for name, us in call if "quantized_matmul" in name]
            timed.append((statistics.median(mine), config))
        return sorted(timed)

    return time_all


def measure(
    problem: Problem, buffers: list[Any], config: Config, read: Any, pool: Any
) -> Callable[[float, Callable[[], float] | None], dict[str, Any]]:
    """A function that makes a row, given operations per microsecond as they were first, and what
    measures them again or None: the kernel in turns with XLA's dot of a bfloat16 weight and the
    reader. Compiling is begun.
    """
    m, k, n = problem.m, problem.weight.k, problem.weight.n
    count = min(len(buffers), max(2, ceilings.rotation(2 * k * n)))
    unit = 4 * 128 * 4 * 8
    words = -(-(sum(v.nbytes for v in buffers[0].values()) + 2 * m * (k + n)) // unit) * unit // 4
    data = [ceilings.random_words(i, (words,)) for i in range(count)] if read else [None] * count
    once = ceilings.reader(words, *read) if read else lambda d: None
    make = lambda seed, *shape: [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(seed), count)
    ]
    launch = lambda x, a: mosaic_wgmma.launch(problem, config, (problem.weight.n,), x, [a])
    turns = lambda parts: [(launch(x, a), jnp.dot(x, w), once(d)) for x, a, w, d in parts]
    # an x for each dot, since XLA joins dots of one
    parts = list(zip(make(1, m, k), buffers, make(2, k, n), data, strict=False))
    program = pool.submit(ceilings.compiled, turns, parts)

    def finish(first: float, again: Callable[[], float] | None) -> dict[str, Any]:
        runs = max(5, min(50 // count, 2**17 // m))  # the results of all are held at once
        calls = ceilings.timed(program.result(), parts, runs=runs)
        per_us = first if again is None else again()
        of = lambda call, kernel: [us for name, us in call if kernel in name]
        mine = [us for call in calls for us in of(call, "quantized_matmul")]
        reads = [us for call in calls for us in of(call, "read_bytes")] or [0.0] * len(mine)
        ours = [sum(of(call, "quantized_matmul")) for call in calls]
        dots = [sum(of(c, "")) - sum(of(c, "read_bytes")) for c in calls]
        dots = [both - own for both, own in zip(dots, ours, strict=True)]
        us, read_us, least = statistics.median(mine), statistics.median(reads), 2 * m * k * n

        def ratio(per_us: float) -> float:
            each = (a / max(b, least / per_us) for a, b in zip(mine, reads, strict=True))
            return round(statistics.median(each), 3)

        return {
            "m": m,
            "k": k,
            "n": n,
            "words": mosaic_gpu.tile_words(problem.weight),
            "config": list(config),
            "us": round(us, 2),
            "read_us": round(read_us, 2),
            "best_us": round(max(read_us, least / per_us), 2),
            "ratio": ratio(per_us),
            **({} if again is None else {"ratio_first": ratio(first)}),
            "bf16_dot_us": round(statistics.median(dots) / count, 2),
            "of_bf16": round(statistics.median(a / b for a, b in zip(dots, ours, strict=True)), 3),
            "bf16_tflops": round(per_us / 1e6),
        }

    return finish


def fastest_reader(size: int) -> tuple[int, int]:
    """Blocks and loads at once of the reader that reads so many bytes fastest."""
    words = size // 2**16 * 2**14
    buffers = [ceilings.random_words(i, (words,)) for i in range(ceilings.rotation(size))]

    def us(how: tuple[int, int]) -> float:
        read = ceilings.reader(words, *how)
        calls = ceilings.durations(lambda *b: [read(v) for v in b], *buffers, runs=4)
        return statistics.median(us for call in calls for _, us in call)

    return min(ceilings.READERS, key=us)


def main() -> None:
    """Checks or tunes."""
    began, card = time.time(), jax.devices()[0].device_kind
    print(card, "jax", jax.__version__, flush=True)
    what, names = sys.argv[1], sys.argv[2:]
    if what == "check":
        if not check_all(names or list(CHECKS)):
            raise SystemExit("the kernel is wrong")
        return
    points: list[tuple[str, Problem, Any, Any]] = []
    for name in names or ["int4"]:
        shapes, ms = FORMATS[name]
        for k, n in decode.chosen("SHAPES", shapes, decode.shape):
            weight = decode.FORMATS[name][0](k, n)
            size = -(-n // 16) * -(-k // 128) * 4 * mosaic_gpu.tile_words(weight)
            buffers = decode.random_arrays(weight, ceilings.rotation(size))
            read = fastest_reader(size)
            points += [
                (name, problem_of(m, weight), buffers, read if m <= HOT else None)
                for m in decode.chosen("ROWS", ms, int)
            ]
    points.sort(key=lambda point: point[1].m)  # what warms the card most comes last
    rate = clock()
    first = rate()
    print(f"bfloat16 dot of 8192 cubed: {first / 1e6:.0f} TFLOP/s", flush=True)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        if CANDIDATES > 1:
            timers = [tune(problem, buffers, pool) for _, problem, buffers, _ in points]
            best = []
            for (name, problem, *_), timer in zip(points, timers, strict=True):
                timed = timer()
                print(f"{time.time() - began:.0f} s, {name}", *problem[:1], end=" ")
                print(problem.weight[:2], [(round(us, 1), tuple(c)) for us, c in timed], flush=True)
                best.append(timed[0][1])
        else:
            best = [candidates(problem)[0] for _, problem, *_ in points]
        jobs = [
            measure(problem, buffers, config, read, pool)
            for (_, problem, buffers, read), config in zip(points, best, strict=True)
        ]
        pool.shutdown()  # XLA tries dots out while it compiles: not beside what is timed
        print("format m k n | us, read us, T* us, us / T* | bf16 dot us / us | config", flush=True)
        rows: list[dict[str, Any]] = []
        for (name, problem, *_), job in zip(points, jobs, strict=True):
            if time.time() - began > SECONDS:
                print("out of time")
                break
            row = job(first, rate if problem.m >= HOT else None)
            print(
                f"{name} {row['m']} {row['k']} {row['n']} | {row['us']} {row['read_us']} "
                f"{row['best_us']} {row['ratio']} {row.get('ratio_first', '')} | "
                f"{row['of_bf16']} | {tuple(row['config'])}",
                flush=True,
            )
            rows.append({"format": name, **row})
            write(card, rows)


def write(card: str, rows: list[dict[str, Any]]) -> None:
    """The device's table, or a file of its name in the folder $OUT; other rows are kept."""
    name = f"{card.replace(' ', '_')}.json"
    key = lambda row: (row["format"], row["k"], row["n"], row["m"])
    out = pathlib.Path(os.environ.get("OUT", mosaic_wgmma.TABLES))
    known = next((p for p in (out / name, mosaic_wgmma.TABLES / name) if p.exists()), None)
    kept = json.loads(known.read_text())["rows"] if known else []
    made: dict[str, Any] = {"date": str(datetime.date.today()), "jax": jax.__version__}
    merged = {key(row): row for row in kept} | {key(row): row | made for row in rows}
    head = {"device": card, "command": "python experiments/prefill_kernels.py tune"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in merged.values())
    out.mkdir(exist_ok=True)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    (out / name).write_text(text)


if __name__ == "__main__":
    main()
