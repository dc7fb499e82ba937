"""Finds the fastest config of the Hopper kernel per shape, and says how far it is from the ceiling.

The kernel is first compared with the float64 product of the same quantized operands, beside XLA's
bfloat16 dot on the dequantized weight: at most twice its error. Times are medians of kernel
durations (CUPTI), weights rotated past the L2 cache; the ratio to the time of reading the same
bytes is the median of ratios of neighbors in one program, kernel and reader taking turns.

    python experiments/tune_kernels.py                  # check, tune, write the table, report
    python experiments/tune_kernels.py check            # correctness only
    python experiments/tune_kernels.py check zeros nf4  # of these only; "problems" are the tests'
    python experiments/tune_kernels.py tune             # without it
    python experiments/tune_kernels.py tune int8 nf4    # these formats only; other rows are kept

"""

import concurrent.futures
import datetime
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import choose
from pallas_kernels.quantized_matmul import (
    epilogue,
    hopper_layout,
    mosaic_gpu,
    problems,
    reference,
)
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.op import quantized_matmul
from pallas_kernels.quantized_matmul.problem import Problem, Weight

SQUARE = [(4096, 4096), (8192, 8192), (16384, 16384)]  # k, n
LLAMA = [(4096, 6144), (4096, 28672), (14336, 4096)]  # of 8B: q/k/v joined, gate/up joined, down
LLAMA += [(4096, 14336), (4096, 1024), (4096, 128256)]  # gate, k, head
FORMATS = {  # name -> (weight of k and n, shapes, m)
    "int4": (lambda k, n: Weight(k, n, 128, "int4", "bfloat16"), SQUARE + LLAMA, (1, 8, 16)),
    "int8": (lambda k, n: Weight(k, n, k, "int8"), SQUARE + LLAMA[:3], (1, 16)),
    "fp8": (lambda k, n: Weight(k, n, k, "float8_e4m3fn"), SQUARE + LLAMA[:3], (1, 16)),
    "nf4": (
        lambda k, n: Weight(k, n, 64, "uint4", values=problems.NF4),
        SQUARE + LLAMA[:3],
        (1, 16),
    ),
}
BETWEEN = 2**23  # bytes read between two launches
CANDIDATES = 6  # configs timed per shape and m, best guesses first
RUNS = 50  # of the final report
SECONDS = float(os.environ.get("SECONDS", "330"))  # stop tuning new shapes then
CHECKS = {  # ragged k and n, every kind of code and scale; bias and activation where named
    "int4": (Weight(512, 128, 128, "int4", "bfloat16"), None),
    "int4 square": (Weight(4096, 4096, 128, "int4", "bfloat16"), None),
    "int4 ragged": (Weight(1032, 40, 128, "int4", "bfloat16"), None),
    "int4 channel": (Weight(2048, 264, 2048, "int4"), "silu"),
    "int4 float32 scales": (Weight(2048, 264, 64, "int4"), None),
    "zeros": (Weight(1000, 328, 32, "uint4", "bfloat16", zero="uint4"), None),
    "zeros long": (Weight(11008, 1024, 128, "uint4", "float16", zero="uint4"), None),
    "offsets": (Weight(2048, 520, 64, "uint4", "float16", offset="float16"), None),
    "nf4": (Weight(2048, 264, 64, "uint4", values=problems.NF4), None),
    "nf4 ragged": (Weight(1032, 40, 128, "uint4", "float16", values=problems.NF4), "gelu_tanh"),
    "int8": (Weight(4096, 1024, 4096, "int8"), None),
    "int8 ragged": (Weight(1032, 40, 1032, "int8", "bfloat16"), "gelu_tanh"),
    "int8 groups": (Weight(2048, 264, 32, "int8", "float16"), None),
    "fp8": (Weight(4096, 1024, 4096, "float8_e4m3fn"), "relu"),
    "fp8 groups": (Weight(1000, 328, 128, "float8_e4m3fn", "float32"), None),
    "fp8_e5m2": (Weight(2048, 264, 2048, "float8_e5m2"), None),
}


def layout_of(weight: Weight) -> str:
    """The layout for Hopper that takes it."""
    return next(n for n in mosaic_gpu.LAYOUTS if LAYOUTS[n].supports(weight) is None)


def operands(m: int, weight: Weight, seed: int = 0) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """x, arrays in kernel order, and the float64 weight that they stand for."""
    keys = jax.random.split(jax.random.key(seed), 5)
    order, per_group = LAYOUTS[layout_of(weight)], (weight.groups, weight.n)
    bits = jax.random.bits(keys[0], (weight.k, weight.n), jnp.uint8)
    if weight.code.startswith("float8"):
        codes = jax.lax.bitcast_convert_type(bits, weight.code)
        codes = jnp.where(jnp.isfinite(codes.astype(jnp.float32)), codes, 0)
        values = np.asarray(codes.astype(jnp.float32), np.float64)
    else:
        wide = bits.astype(jnp.int32)
        codes = (wide - 128 if weight.code == "int8" else wide % 16).astype(jnp.int8)
        codes = codes - jnp.int8(8) if weight.code == "int4" else codes
        values = np.asarray(codes, np.float64)
        if weight.values is not None:
            values = np.asarray(weight.values, np.float64)[np.asarray(codes)]
    spread = jnp.exp2(jax.random.randint(keys[1], per_group, -12, 4).astype(jnp.float32))
    scale = spread * jax.random.uniform(keys[4], per_group, jnp.float32, 0.5, 1.0)
    scale = scale.at[:, : weight.n > 1].set(0)  # a channel of zeros
    held = {"scale": scale.astype(weight.scale)}
    if weight.zero is not None:
        held["zero"] = jax.random.randint(keys[2], per_group, 0, 16, jnp.int8)
    if weight.offset is not None:
        held["offset"] = jax.random.normal(keys[2], per_group).astype(weight.offset)
    arrays = {"codes": order.pack_codes(codes.astype(weight.code), weight)}
    arrays |= {name: order.pack_scale(v, weight) for name, v in held.items()}
    x = jax.random.normal(keys[3], (m, weight.k), jnp.bfloat16)
    along_k = lambda v: np.repeat(np.asarray(v, np.float64), weight.group, 0)[: weight.k]
    w = values - along_k(held["zero"]) if "zero" in held else values
    w = w * along_k(held["scale"])
    w = w + along_k(held["offset"]) if "offset" in held else w
    return x, arrays, w


def worst(y: Any, truth: np.ndarray) -> float:
    """The largest difference, in units of its row's largest value; NaN counts as infinite."""
    difference = np.abs(np.asarray(y, np.float64) - truth) / np.abs(truth).max(1, keepdims=True)
    return float(np.nan_to_num(difference, nan=np.inf).max())


ACTIVATIONS = {  # in float64
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda y: y / (1 + np.exp(-np.clip(y, -700, None))),
    "gelu_tanh": lambda y: y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))),
}


def plain(x: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """XLA's dot on the dequantized weight, made by a program of its own: XLA would try how best to
    fuse the two, for minutes where the weight is of float8 in groups.
    """
    weight, last = problem.weight, functools.partial(epilogue.finish, problem=problem)
    opened = lambda a: reference.dequantize(a, weight, problem.layout).astype(jnp.bfloat16)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return jax.jit(lambda x, w, a: last(dot(x, w), a))(x, jax.jit(opened)(arrays), arrays)


def check(name: str, m: int, weight: Weight, activation: str | None, which: int) -> bool:
    """Whether the kernel is at most twice as far from the truth as XLA; prints both.

    Args:
      name: printed.
      m: rows of x.
      weight: random numbers of it are taken.
      activation: with a bias before it; None for neither.
      which: 0 for the config that is guessed to be the best, -1 for the worst.
    """
    x, arrays, w = operands(m, weight)
    truth = np.asarray(x, np.float64) @ w
    if activation is not None:
        bias = jax.random.normal(jax.random.key(9), (weight.n,)) * np.abs(truth).mean()
        arrays["bias"] = bias
        truth = ACTIVATIONS[activation](truth + np.asarray(bias, np.float64))
    bias = activation is not None
    problem = Problem(m, weight, layout_of(weight), "bfloat16", "bfloat16", bias, activation)
    guesses = sorted(mosaic_gpu.configs(m, weight, bias), reverse=True)
    if not guesses:
        print(f"no config for {weight}")
        return False
    config = guesses[which][1]
    run = lambda x, a: mosaic_gpu.launch(problem, config, (weight.n,), x, [a])[0]
    began = time.time()
    ceilings.poison()
    ours = worst(jax.jit(run)(x, arrays), truth)
    print(
        f"      {name}, m {m}, {tuple(config)} came back in {time.time() - began:.1f} s", flush=True
    )
    xla = worst(plain(x, arrays, problem), truth)
    good = ours <= 2 * xla
    verdict = "ok   " if good else "WRONG"
    print(f"{verdict} {name}, m {m}, {tuple(config)}: error {ours:.5f}, XLA {xla:.5f}", flush=True)
    return good


def check_joined(m: int) -> bool:
    """Three weights of one x as one launch, and stacked weights in a scan and under vmap."""
    weights = [Weight(1024, n, 128, "int4", "bfloat16") for n in (512, 128, 144)]
    made = [operands(m, w, i) for i, w in enumerate(weights)]
    x, arrays = made[0][0], [v[1] for v in made]
    each = [Problem(m, w, "hopper4", "bfloat16", "bfloat16") for w in weights]
    assert mosaic_gpu.joins(each) is None
    ys = jax.jit(lambda x, a: mosaic_gpu.run_joined(x, a, each))(x, arrays)
    errors = [worst(y, np.asarray(x, np.float64) @ v[2]) for y, v in zip(ys, made, strict=True)]
    stack = jax.tree.map(lambda *v: jnp.stack(v), *[operands(m, weights[0], i)[1] for i in (0, 5)])
    truth = np.asarray(x, np.float64) @ np.stack([operands(m, weights[0], i)[2] for i in (0, 5)])
    one = lambda _, a: (None, mosaic_gpu.run(x, a, each[0]))
    scanned = jax.jit(lambda s: jax.lax.scan(one, None, s)[1])(stack)
    errors += [worst(y, t) for y, t in zip(scanned, truth, strict=True)]
    good = max(errors) < 0.008
    print(f"{'ok   ' if good else 'WRONG'} joined and scanned, m {m}: errors {errors}", flush=True)
    return good


def check_problem(name: str, m: int) -> bool:
    """One of the tests' problems, by whatever the op takes for it."""
    weight = problems.WEIGHTS[name]
    if all(LAYOUTS[layout].supports(weight) for layout in mosaic_gpu.LAYOUTS):
        print(f"      {name}: no layout for Hopper")
        return True
    x, arrays, w = operands(m, weight)
    problem = Problem(m, weight, layout_of(weight), "bfloat16", "bfloat16")
    how, truth = choose("quantized_matmul", problem), np.asarray(x, np.float64) @ w
    run = lambda x, a: quantized_matmul(x, a, weight, problem.layout)
    ceilings.poison()
    ours, xla = worst(jax.jit(run)(x, arrays), truth), worst(plain(x, arrays, problem), truth)
    good = ours <= 2 * xla
    verdict = "ok   " if good else "WRONG"
    print(f"{verdict} problem {name}, m {m}, {how}: error {ours:.5f}, XLA {xla:.5f}", flush=True)
    return good


def check_all(names: Sequence[str]) -> bool:
    """Those of CHECKS, with the best guess and for m = 16 the worst."""
    cases = [
        (name, m, *CHECKS[name], which)
        for name, (m, which) in itertools.product(names, ((1, 0), (3, 0), (16, 0), (16, -1)))
        if name in CHECKS
    ]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        good = list(pool.map(lambda case: check(*case), cases))
        if "problems" in names:
            small = itertools.product(problems.WEIGHTS, problems.ROWS)
            good += list(pool.map(lambda case: check_problem(*case), small))
    return all(good) and all(check_joined(m) for m in (1, 16))


def random_arrays(weight: Weight, count: int) -> list[dict[str, jax.Array]]:
    """Weights of random codes and scales near 1, made on the device."""
    shapes = LAYOUTS[layout_of(weight)].shapes(weight)
    wide = weight.scale == "float32"
    mask, one = (0x000FFFFF, 0x3F800000) if wide else (0x001F001F, 0x3F803F80)
    out = []
    for i in range(count):
        arrays = {"codes": ceilings.random_words(i, shapes["codes"].shape)}
        near_one = ceilings.random_words(100 + i, shapes["scale"].shape) & mask | one
        out.append(arrays | {"scale": near_one})
    return out


def tune(m: int, weight: Weight, buffers: list[dict[str, jax.Array]]) -> list[tuple[float, Any]]:
    """(microseconds, config), fastest first; compiled side by side, timed one after the other.

    Between two launches something else is read: the kernel would start before the one in front of
    it is done, and its waiting would count.
    """
    problem = Problem(m, weight, layout_of(weight), "bfloat16", "bfloat16")
    x = jax.random.normal(jax.random.key(m), (m, weight.k), jnp.bfloat16)
    known = mosaic_gpu.choose_config(m, weight, jax.devices()[0].device_kind)
    guesses = [c for _, c in sorted(mosaic_gpu.configs(m, weight), reverse=True)]
    configs = list(dict.fromkeys([known, *guesses]))[:CANDIDATES]
    between = [ceilings.random_words(i, (BETWEEN // 4,)) for i in range(len(buffers))]
    read = ceilings.reader(BETWEEN // 4, *ceilings.READERS[0])

    def build(config: Any) -> Any:
        launch = lambda a: mosaic_gpu.launch(problem, config, (weight.n,), x, [a])
        turns = lambda w, d: [(launch(a), read(v)) for a, v in zip(w, d, strict=True)]
        return ceilings.compiled(turns, buffers, between)

    with concurrent.futures.ThreadPoolExecutor(len(configs)) as pool:
        built = [pool.submit(build, config) for config in configs]
    timed = []
    for config, program in zip(configs, built, strict=True):
        try:
            calls = ceilings.timed(program.result(), buffers, between, runs=6)
        except jax.errors.JaxRuntimeError as why:
            print(f"{tuple(config)} does not run: {why}")
            continue
        mine = [us for call in calls for name, us in call if "quantized_matmul" in name]
        timed.append((statistics.median(mine), config))
    return sorted(timed)


def measure(m: int, weight: Weight, buffers: list[Any], config: Any) -> dict[str, Any]:
    """A row of the table: the kernel in turns with the reader of the same bytes."""
    k, n, words = weight.k, weight.n, mosaic_gpu.tile_words(weight)
    size = sum(v.nbytes for v in buffers[0].values())
    problem = Problem(m, weight, layout_of(weight), "bfloat16", "bfloat16")
    _, read, data = ceilings.best_reader(size + 2 * m * (k + n))
    x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
    pairs = list(zip(buffers, data, strict=False))
    run = lambda x, a: mosaic_gpu.launch(problem, config, (n,), x, [a])[0]
    calls = ceilings.durations(
        lambda x, p: [(run(x, a), read(d)) for a, d in p], x, pairs, runs=RUNS // len(pairs) + 1
    )
    flat = [event for call in calls for event in call]
    theirs = [us for name, us in flat if "read_bytes" in name]
    mine = [us for name, us in flat if "quantized_matmul" in name]
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    row = {"m": m, "k": k, "n": n, "words": words, "config": list(config)}
    row |= {"us": statistics.median(mine), "read_us": statistics.median(theirs), "ratio": ratio}
    return row


def main() -> None:
    """Checks, tunes and reports."""
    began, card = time.time(), jax.devices()[0].device_kind
    print(card, "jax", jax.__version__)
    only = sys.argv[1] if len(sys.argv) > 1 else None
    names = sys.argv[2:]
    checked = names if only and names else [*CHECKS, "problems"]
    if only != "tune" and not check_all(checked):
        raise SystemExit("the kernel is wrong: nothing was timed")
    if only == "check":
        return
    rows: list[dict[str, Any]] = []
    dots: dict[Any, float] = {}
    print("format    k     n  m | read us  kernel us  kernel / read | bf16 dot / kernel | config")
    for name in names or FORMATS:
        make, shapes, ms = FORMATS[name]
        for k, n in shapes:
            weight = make(k, n)
            size = -(-n // hopper_layout.ROWS) * -(-k // hopper_layout.DEPTH)
            size *= 4 * mosaic_gpu.tile_words(weight)
            buffers = random_arrays(weight, ceilings.rotation(size))
            for m in ms:
                if time.time() - began > SECONDS:
                    print("out of time")
                    return
                same = [r for r in rows if (r["k"], r["n"], r["m"]) == (k, n, m)]
                same = [r for r in same if r["words"] == mosaic_gpu.tile_words(weight)]
                config = mosaic_gpu.Config(*same[-1]["config"]) if same else None
                row = measure(m, weight, buffers, config or tune(m, weight, buffers)[0][1])
                if (m, k, n) not in dots:
                    dots[m, k, n] = ceilings.dot(m, k, n)
                row["bf16_dot_us"] = round(dots[m, k, n], 2)
                row = {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}
                print(
                    f"{name:6} {k:5d} {n:6d} {m:2d} | {row['read_us']:7.2f}  {row['us']:9.2f}  "
                    f"{row['ratio']:13.3f} | {dots[m, k, n] / row['us']:17.2f} | {row['config']}",
                    flush=True,
                )
                rows.append({"format": name} | row)
                write(card, rows)


def write(card: str, rows: Sequence[dict[str, Any]]) -> None:
    """The device's table, or a file of its name in the folder $OUT: what was measured, and how.

    Rows of other formats, shapes and m that the table has are kept.
    """
    name = f"{card.replace(' ', '_')}.json"
    key = lambda row: (row.get("format", "int4"), row["k"], row["n"], row["m"])
    known = mosaic_gpu.TABLES / name
    kept = json.loads(known.read_text())["rows"] if known.exists() else []
    date = {"date": str(datetime.date.today()), "jax": jax.__version__}
    merged = {key(row): row for row in kept} | {key(row): row | date for row in rows}
    head = {"device": card, "command": "python experiments/tune_kernels.py tune"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in merged.values())
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    out = pathlib.Path(os.environ.get("OUT", mosaic_gpu.TABLES))
    out.mkdir(exist_ok=True)
    (out / name).write_text(text)


if __name__ == "__main__":
    main()
