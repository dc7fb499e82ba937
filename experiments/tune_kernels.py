"""Finds the fastest config of the Hopper kernel per shape, and says how far it is from the ceiling.

The kernel is first compared with the float64 product of the same quantized operands, beside XLA's
bfloat16 dot on the dequantized weight: at most twice its error; and to the bit with rows of the
weight, which rows of x with a single one take out. Times are medians of kernel
durations (CUPTI), weights rotated past the L2 cache; the ratio to the time of reading the same
bytes is the median of ratios of neighbors in one program, kernel and reader taking turns.

    python experiments/tune_kernels.py                  # check, tune, write the table, report
    python experiments/tune_kernels.py check            # correctness only
    python experiments/tune_kernels.py check zeros nf4  # of these only; "problems" are the tests'
    python experiments/tune_kernels.py tune             # without it
    python experiments/tune_kernels.py tune int8 nf4    # these formats only; other rows are kept
    ROWS=1,16 SHAPES=4096x28672 python experiments/tune_kernels.py tune    # m; k x n
    CANDIDATES=30 ROWS=1 python experiments/tune_kernels.py tune int8    # more configs of each

Several may run at once, each with its formats: they compile beside each other and take turns at the
card and at the table.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import choose
from pallas_kernels.quantized_matmul import (
    epilogue,
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
        (1, 8, 16),
    ),
}
CANDIDATES = int(os.environ.get("CANDIDATES", "4"))  # guesses timed per shape and m, best first
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
    "offsets": (Weight(1024, 520, 64, "uint4", "float16", offset="float16"), None),
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


NEAR = (-12, 4)  # powers of two of scales
FAR = {"bfloat16": (-80, 32), "float32": (-66, 30), "float16": (-13, 14)}  # all that are exact


def operands(
    m: int,
    weight: Weight,
    seed: int = 0,
    rounded: bool = False,
    powers: tuple[int, int] = NEAR,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """x, whose second row is zero, arrays in kernel order, and the float64 weight that they stand
    for; the values of a codebook `rounded` to bfloat16, as the kernel holds them.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    order, per_group = LAYOUTS[layout_of(weight)], (weight.groups, weight.n)
    bits = jax.random.bits(keys[0], (weight.k, weight.n), jnp.uint8)
    if weight.code.startswith("float8"):
        codes = lax.bitcast_convert_type(bits, weight.code)
        codes = jnp.where(jnp.isfinite(codes.astype(jnp.float32)), codes, 0)
        values = np.asarray(codes.astype(jnp.float32), np.float64)
    else:
        wide = bits.astype(jnp.int32)
        codes = (wide - 128 if weight.code == "int8" else wide % 16).astype(jnp.int8)
        codes = codes - jnp.int8(8) if weight.code == "int4" else codes
        values = np.asarray(codes, np.float64)
        if weight.values is not None:
            book = np.asarray(weight.values, jnp.bfloat16 if rounded else np.float64)
            values = book.astype(np.float64)[np.asarray(codes)]
    spread = jnp.exp2(jax.random.randint(keys[1], per_group, *powers).astype(jnp.float32))
    scale = spread * jax.random.uniform(keys[4], per_group, jnp.float32, 0.5, 1.0)
    scale = scale.at[:, : weight.n > 1].set(0)  # a channel of zeros
    held = {"scale": scale.astype(weight.scale)}
    if weight.zero is not None:
        held["zero"] = jax.random.randint(keys[2], per_group, 0, 16, jnp.int8)
    if weight.offset is not None:
        held["offset"] = jax.random.normal(keys[2], per_group).astype(weight.offset)
    arrays = {"codes": order.pack_codes(codes.astype(weight.code), weight)}
    arrays |= {name: order.pack_scale(v, weight) for name, v in held.items()}
    x = jax.random.normal(keys[3], (m, weight.k), jnp.bfloat16).at[1:2].set(0)
    along_k = lambda v: np.repeat(np.asarray(v, np.float64), weight.group, 0)[: weight.k]
    w = values - along_k(held["zero"]) if "zero" in held else values
    w = w * along_k(held["scale"])
    w = w + along_k(held["offset"]) if "offset" in held else w
    return x, arrays, w


def worst(y: Any, truth: np.ndarray) -> float:
    """The largest difference, in units of its row's largest value; NaN counts as infinite, and so
    does nearly what is not zero in a row of zeros.
    """
    largest = np.maximum(np.abs(truth).max(1, keepdims=True), np.finfo(np.float32).tiny)
    difference = np.abs(np.asarray(y, np.float64) - truth) / largest
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
    run = jax.jit(lambda x, a: mosaic_gpu.launch(problem, config, (weight.n,), x, [a])[0])
    began = time.time()
    ceilings.poison()
    ours = worst(run(x, arrays), truth)
    print(
        f"      {name}, m {m}, {tuple(config)} came back in {time.time() - began:.1f} s", flush=True
    )
    xla = worst(plain(x, arrays, problem), truth)
    off = 0 if bias else different(run, m, weight)
    good = ours <= 2 * xla and not off
    verdict = "ok   " if good else "WRONG"
    what = f"{verdict} {name}, m {m}, {tuple(config)}"
    print(f"{what}: error {ours:.5f}, XLA {xla:.5f}, {off} weights differ", flush=True)
    return good


def singles(m: int, weight: Weight) -> list[tuple[jax.Array, dict[str, jax.Array], np.ndarray]]:
    """Rows of x with a single one, arrays, and the product, which is m rows of the weight in
    bfloat16: with scales near 1, and as far from it as they are exact.
    """
    at = (np.arange(m) * (weight.k // m) + 37 * np.arange(m)) % weight.k
    x = jnp.zeros((m, weight.k), jnp.bfloat16).at[np.arange(m), at].set(1)
    out = []
    for powers in (NEAR, FAR[weight.scale]):
        _, arrays, w = operands(m, weight, rounded=True, powers=powers)
        out.append((x, arrays, w[at].astype(np.float32).astype(jnp.bfloat16)))
    return out


def off(y: Any, wanted: np.ndarray, units: int = 0) -> int:
    """How many numbers are further from what they should be than so many units of bfloat16."""
    y, wanted = (np.asarray(v, np.float64) for v in (y, wanted))
    return int(np.sum(~(np.abs(y - wanted) <= units * 2.0**-7 * np.abs(wanted))))


def different(run: Any, m: int, weight: Weight) -> int:
    """How many weights of m rows of k are not decoded to the bit."""
    count = 0
    for x, arrays, wanted in singles(m, weight):
        ceilings.poison()
        count += off(run(x, arrays), wanted)
    return count


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # compiled once for all weights of a shape
def random_codes(shape: tuple[int, ...], code: str, uniform: bool, seed: int) -> jax.Array:
    """Words of the codes that normal numbers have, in no order; of a codebook all are as many."""
    key, held = jax.random.key(seed), 8 if code in ("int4", "uint4") else 4
    if uniform:
        return jax.random.bits(key, shape).view(jnp.int32)
    normal = jax.random.normal(key, (*shape, held))
    if code.startswith("float8"):
        held_by_all = jnp.clip(100 * normal, -448, 448)  # the largest float8_e4m3fn
        bits = lax.bitcast_convert_type(held_by_all.astype(code), jnp.uint8)
    else:  # the largest of a group of 128 is near 2.7, of a channel near 4
        top, scale = (8, 7 / 2.7) if held == 8 else (128, 127 / 4)
        bits = jnp.clip(jnp.round(normal * scale), -top, top - 1) + top
    shifts = jnp.arange(held, dtype=jnp.uint32) * (32 // held)
    return (bits.astype(jnp.uint32) << shifts).sum(-1, dtype=jnp.uint32).view(jnp.int32)


def random_arrays(weight: Weight, count: int) -> list[dict[str, jax.Array]]:
    """Weights of normal numbers and scales near 1, made on the device."""
    shapes = LAYOUTS[layout_of(weight)].shapes(weight)
    wide = weight.scale == "float32"
    mask, one = (0x000FFFFF, 0x3F800000) if wide else (0x001F001F, 0x3F803F80)
    out = []
    for i in range(count):
        codes = shapes["codes"].shape, weight.code, weight.values is not None
        arrays = {"codes": random_codes(*codes, i)}
        near_one = ceilings.random_words(100 + i, shapes["scale"].shape) & mask | one
        out.append(arrays | {"scale": near_one})
    return out


def candidates(m: int, weight: Weight) -> list[mosaic_gpu.Config]:
    """What the table has, and the best guesses: of the first three longer and shorter rings too."""
    guesses = [c for _, c in sorted(mosaic_gpu.configs(m, weight), reverse=True)]
    known = mosaic_gpu.choose_config(m, weight, jax.devices()[0].device_kind)
    first = ([known] if known is not None else []) + guesses[:CANDIDATES]
    rings = [c._replace(steps=c.steps + more) for c in first[:3] for more in (-1, 1)]
    early = [c._replace(early=2) for c in first[:1]]
    plans = [(c, mosaic_gpu.plan(m, weight, c)) for c in (*rings, *early) if c.steps]
    fits = [c for c, p in plans if not isinstance(p, str) and c.steps <= p.turns * c.rows]
    return list(dict.fromkeys([*first, *fits]))


def grouped(configs: list[mosaic_gpu.Config]) -> list[list[mosaic_gpu.Config]]:
    """As many a group as there are readers; what the last one lacks is the first ones again."""
    size = len(ceilings.READERS)
    groups = [configs[i : i + size] for i in range(0, len(configs), size)]
    spare = (c for c in configs if c not in groups[-1])
    groups[-1] += itertools.islice(spare, size - len(groups[-1]))
    return groups


def compiled(m: int, weight: Weight, configs: Sequence[mosaic_gpu.Config], count: int) -> Any:
    """`(x, weights, data) -> x`: each weight by a config, then by the next one, and a reader behind
    each launch.

    A kernel starts before the one in front of it is done, and its waiting would count; readers do
    not. Each takes what the one before it gives, or XLA would choose the order. All weights come
    before one comes again: by then the L2 cache has lost it.
    """
    problem = Problem(m, weight, layout_of(weight), "bfloat16", "bfloat16")
    shapes = LAYOUTS[problem.layout].shapes(weight)
    arrays = {name: shapes[name] for name in ("codes", "scale")}
    words = read_words(m, weight)
    readers = [ceilings.reader(words, *how) for how in ceilings.READERS]
    launch = lambda config, x, a: mosaic_gpu.launch(problem, config, (weight.n,), x, [a])[0]

    def turns(x: jax.Array, weights: Any, data: Any) -> Any:
        for config, read in zip(configs, readers, strict=False):
            for a, d in zip(weights, data, strict=True):
                x = read(d, x, launch(config, x, a))
        return x

    one = jax.ShapeDtypeStruct((words,), jnp.int32)
    x = jax.ShapeDtypeStruct((m, weight.k), jnp.bfloat16)
    return jax.jit(turns).lower(x, [arrays] * count, [one] * count).compile()


def read_words(m: int, weight: Weight) -> int:
    """Of all bytes of a product: weight, x and result."""
    shapes = LAYOUTS[layout_of(weight)].shapes(weight)
    size = 4 * (shapes["codes"].size + shapes["scale"].size) + 2 * m * (weight.k + weight.n)
    unit = 4 * 128 * 4 * max(loads for _, loads in ceilings.READERS)
    return -(-size // unit) * unit // 4


def measure(
    m: int, weight: Weight, groups: Sequence[Sequence[mosaic_gpu.Config]], programs: Sequence[Any]
) -> dict[str, Any]:
    """A row of the table: of the fastest config of all programs."""
    count = ceilings.rotation(4 * read_words(m, weight))
    x = jax.random.normal(jax.random.key(m), (m, weight.k), jnp.bfloat16)
    data = [ceilings.random_words(200 + i, (read_words(m, weight),)) for i in range(count)]
    buffers, rows = random_arrays(weight, count), []
    for configs, program in zip(groups, programs, strict=True):
        calls = ceilings.timed(program, x, buffers, data, runs=RUNS // count + 1)
        mine, reads = (by_config(calls, name, count) for name in ("quantized_matmul", "read_bytes"))
        read = min(reads, key=statistics.median)
        for config, us in zip(configs, mine, strict=False):
            ratio = statistics.median(a / b for a, b in zip(us, read, strict=True))
            row = {"m": m, "k": weight.k, "n": weight.n, "words": mosaic_gpu.tile_words(weight)}
            row |= {"config": list(config), "us": statistics.median(us)}
            rows.append(row | {"read_us": statistics.median(read), "ratio": ratio})
    return min(rows, key=lambda row: row["us"])


def by_config(calls: Sequence[Any], kernel: str, count: int) -> list[list[float]]:
    """The times of a kernel in `calls`, in each of which a config's `count` follow each other."""
    each = [[us for name, us in call if kernel in name] for call in calls]
    return [
        [us for times in each for us in times[start : start + count]]
        for start in range(0, len(each[0]), count)
    ]


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
    dots: dict[tuple[int, int, int], float] = {}
    points = [
        (name, m, make(k, n))
        for name, (make, shapes, ms) in FORMATS.items()
        if name in (names or FORMATS)
        for k, n in chosen("SHAPES", shapes, shape)
        for m in chosen("ROWS", ms, int)
    ]
    print("format    k     n  m | read us  kernel us  kernel / read | bf16 dot / kernel | config")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = []
        for _, m, weight in points:
            count = ceilings.rotation(4 * read_words(m, weight))
            groups = grouped(candidates(m, weight))
            built = [pool.submit(compiled, m, weight, group, count) for group in groups]
            jobs.append((groups, built))
        for (name, m, weight), (groups, built) in zip(points, jobs, strict=True):
            k, n, programs = weight.k, weight.n, [job.result() for job in built]
            if time.time() - began > SECONDS:
                print("out of time")
                pool.shutdown(cancel_futures=True)
                return
            with alone():
                row = measure(m, weight, groups, programs)
                if (m, k, n) not in dots:
                    dots[m, k, n] = round(ceilings.dot(m, k, n), 2)
            row["bf16_dot_us"] = dots[m, k, n]
            row = {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}
            print(
                f"{name:6} {k:5d} {n:6d} {m:2d} | {row['read_us']:7.2f}  {row['us']:9.2f}  "
                f"{row['ratio']:13.3f} | {dots[m, k, n] / row['us']:17.2f} | {row['config']}",
                flush=True,
            )
            rows.append({"format": name} | row)
            with alone():
                write(card, rows)


def chosen(variable: str, default: Any, read: Any) -> list[Any]:
    """What an environment variable lists, with commas between, or all."""
    return [read(v) for v in os.environ.get(variable, "").split(",") if v] or list(default)


def shape(text: str) -> tuple[int, ...]:
    """A k and an n."""
    return tuple(map(int, text.split("x")))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other process of this user is in here."""
    with open(pathlib.Path(tempfile.gettempdir()) / f"tune_kernels_{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def table(card: str, folder: pathlib.Path = mosaic_gpu.TABLES) -> list[dict[str, Any]]:
    """The rows that a folder has of it, by default the package."""
    path = folder / f"{card.replace(' ', '_')}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(card: str, rows: Sequence[dict[str, Any]]) -> None:
    """The device's table, or a file of its name in the folder $OUT: what was measured, and how.

    Rows of other formats, shapes and m that the table has are kept.
    """
    name = f"{card.replace(' ', '_')}.json"
    key = lambda row: (row.get("format", "int4"), row["k"], row["n"], row["m"])
    out = pathlib.Path(os.environ.get("OUT", mosaic_gpu.TABLES))
    out.mkdir(exist_ok=True)
    kept = table(card, out) or table(card)
    date = {"date": str(datetime.date.today()), "jax": jax.__version__}
    merged = {key(row): row for row in kept} | {key(row): row | date for row in rows}
    head = {"device": card, "command": "python experiments/tune_kernels.py tune"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in merged.values())
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    (out / name).write_text(text)


if __name__ == "__main__":
    main()
