"""Finds the fastest config of the Hopper kernel per shape, and says how far it is from the ceiling.

The kernel is first compared with the float64 product of the same quantized operands, beside XLA's
bfloat16 dot on the dequantized weight: at most twice its error. Times are medians of kernel
durations (CUPTI), weights rotated past the L2 cache; the ratio to the time of reading the same
bytes is the median of ratios of neighbors in one program, kernel and reader taking turns.

    python experiments/tune_kernels.py            # check, tune, write the device's table, report
    python experiments/tune_kernels.py check      # correctness only
    python experiments/tune_kernels.py tune       # without it

"""

import datetime
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

from pallas_kernels.quantized_matmul import hopper_kernel, hopper_layout, mosaic_gpu, reference
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem, Weight

ROWS = (1, 8, 16)  # m
SHAPES = [  # k, n; square ones, then the matmuls of a Llama-3-8B, q/k/v and gate/up joined or not
    (4096, 4096),
    (8192, 8192),
    (16384, 16384),
    (4096, 28672),
    (14336, 4096),
    (4096, 6144),
    (4096, 14336),
    (4096, 1024),
    (4096, 128256),
]
GROUP = 128
CANDIDATES = 8  # configs timed per shape and m, best guesses first
RUNS = 50  # of the final report
SECONDS = 330  # stop tuning new shapes then
CHECKS = [  # k, n, group, scale, zero, offset: ragged k and n, every kind of scale
    (512, 128, 128, "bfloat16", None, None),
    (4096, 4096, 128, "bfloat16", None, None),
    (1000, 328, 32, "bfloat16", "uint4", None),
    (2048, 520, 64, "float16", None, "float16"),
    (11008, 1024, 128, "float16", "uint4", None),
    (1032, 40, 128, "bfloat16", None, None),
]


def operands(m: int, weight: Weight, seed: int = 0) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """x, arrays in kernel order, and the float64 product."""
    keys = jax.random.split(jax.random.key(seed), 5)
    low, high = (-8, 8) if weight.code == "int4" else (0, 16)
    order, per_group = LAYOUTS["hopper4"], (weight.groups, weight.n)
    codes = jax.random.randint(keys[0], (weight.k, weight.n), low, high, jnp.int8)
    spread = jnp.exp2(jax.random.randint(keys[1], per_group, -12, 4).astype(jnp.float32))
    scale = spread * jax.random.uniform(keys[4], per_group, jnp.float32, 0.5, 1.0)
    scale = scale.at[:, 0].set(0)  # a channel of zeros
    held = {"scale": scale.astype(weight.scale)}
    if weight.zero is not None:
        held["zero"] = jax.random.randint(keys[2], per_group, 0, 16, jnp.int8)
    if weight.offset is not None:
        held["offset"] = jax.random.normal(keys[2], per_group).astype(weight.offset)
    arrays = {"codes": order.pack_codes(codes, weight)}
    arrays |= {name: order.pack_scale(v, weight) for name, v in held.items()}
    x = jax.random.normal(keys[3], (m, weight.k), jnp.bfloat16)
    along_k = lambda v: np.repeat(np.asarray(v, np.float64), weight.group, 0)[: weight.k]
    w = np.asarray(codes, np.float64)
    w = w - along_k(held["zero"]) if "zero" in held else w
    w = w * along_k(held["scale"])
    w = w + along_k(held["offset"]) if "offset" in held else w
    return x, arrays, np.asarray(x, np.float64) @ w


def worst(y: Any, truth: np.ndarray) -> float:
    """The largest difference, in units of its row's largest value; NaN counts as infinite."""
    difference = np.abs(np.asarray(y, np.float64) - truth) / np.abs(truth).max(1, keepdims=True)
    return float(np.nan_to_num(difference, nan=np.inf).max())


def check(problem: Problem, config: mosaic_gpu.Config) -> bool:
    """Whether the kernel is at most twice as far from the truth as XLA; prints both."""
    x, arrays, truth = operands(problem.m, problem.weight)
    ours = worst(jax.jit(hopper_kernel.kernel(problem, config))(x, arrays), truth)
    xla = worst(jax.jit(lambda x, a: reference.run(x, a, problem))(x, arrays), truth)
    good = ours <= 2 * xla
    verdict = "ok   " if good else "WRONG"
    w = problem.weight
    print(
        f"{verdict} m {problem.m:2d} k {w.k:5d} n {w.n:5d} g {w.group:3d} {w.scale} "
        f"zero {w.zero} offset {w.offset} {tuple(config)}: error {ours:.5f}, XLA {xla:.5f}",
        flush=True,
    )
    return good


def check_all() -> bool:
    """All of CHECKS, with the best guess and the worst."""
    good = True
    for k, n, group, scale, zero, offset in CHECKS:
        code = "int4" if zero is None and offset is None else "uint4"
        weight = Weight(k, n, group, code, scale, zero, offset)
        for m in (1, 3, 16):
            guesses = sorted(mosaic_gpu.configs(m, weight), reverse=True)
            if not guesses:
                print(f"no config for {weight}")
                continue
            for _, config in (guesses[0], guesses[-1]) if m != 3 else guesses[:1]:
                good &= check(Problem(m, weight, "hopper4", "bfloat16", "bfloat16"), config)
    return good


def random_arrays(weight: Weight, count: int) -> list[dict[str, jax.Array]]:
    """Weights of random codes and scales near 1, made on the device."""
    shapes = LAYOUTS["hopper4"].shapes(weight)
    out = []
    for i in range(count):
        arrays = {"codes": ceilings.random_words(i, shapes["codes"].shape)}
        near_one = ceilings.random_words(100 + i, shapes["scale"].shape) & 0x001F001F | 0x3F803F80
        out.append(arrays | {"scale": near_one})
    return out


def tune(m: int, weight: Weight, buffers: list[dict[str, jax.Array]]) -> list[tuple[float, Any]]:
    """(microseconds, config), fastest first."""
    problem = Problem(m, weight, "hopper4", "bfloat16", "bfloat16")
    x = jax.random.normal(jax.random.key(m), (m, weight.k), jnp.bfloat16)
    timed = []
    for _, config in sorted(mosaic_gpu.configs(m, weight), reverse=True)[:CANDIDATES]:
        run = hopper_kernel.kernel(problem, config)
        try:
            calls = ceilings.durations(
                lambda x, w, run=run: [run(x, a) for a in w], x, buffers, runs=6
            )
        except jax.errors.JaxRuntimeError as why:
            print(f"{tuple(config)} does not run: {why}")
            continue
        timed.append((statistics.median(us for call in calls for _, us in call), config))
    return sorted(timed)


def main() -> None:
    """Checks, tunes and reports."""
    began, card = time.time(), jax.devices()[0].device_kind
    print(card, "jax", jax.__version__)
    only = sys.argv[1] if len(sys.argv) > 1 else None
    if only != "tune" and not check_all():
        raise SystemExit("the kernel is wrong: nothing was timed")
    if only == "check":
        return
    rows = []
    print("   k     n  m | read us  kernel us  kernel / read | bf16 dot / kernel | config")
    for k, n in SHAPES:
        weight = Weight(k, n, GROUP, "int4", "bfloat16")
        words = mosaic_gpu.tile_words(weight)
        size = -(-n // hopper_layout.ROWS) * -(-k // hopper_layout.DEPTH) * words * 4
        buffers = random_arrays(weight, ceilings.rotation(size))
        for m in ROWS:
            if time.time() - began > SECONDS:
                print("out of time")
                break
            moved = size + 2 * m * (k + n)
            _, read, data = ceilings.best_reader(moved)
            timed = tune(m, weight, buffers)
            config = timed[0][1]
            run = hopper_kernel.kernel(
                Problem(m, weight, "hopper4", "bfloat16", "bfloat16"), config
            )
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            pairs = list(zip(buffers, data, strict=False))
            calls = ceilings.durations(
                lambda x, p, run=run, read=read: [(run(x, a), read(d)) for a, d in p],
                x,
                pairs,
                runs=RUNS // len(pairs) + 1,
            )
            flat = [event for call in calls for event in call]
            theirs = [us for name, us in flat if "read_bytes" in name]
            mine = [us for name, us in flat if "quantized_matmul" in name]
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            us, t_read = statistics.median(mine), statistics.median(theirs)
            beside = ceilings.dot(m, k, n)
            print(
                f"{k:5d} {n:5d} {m:2d} | {t_read:7.2f}  {us:9.2f}  {ratio:13.3f} | "
                f"{beside / us:17.2f} | {tuple(config)}",
                flush=True,
            )
            row = {"m": m, "k": k, "n": n, "words": words, "config": list(config), "us": us}
            rows.append(row | {"read_us": t_read, "ratio": ratio, "bf16_dot_us": beside})
            write(card, rows)


def write(card: str, rows: list[dict[str, Any]]) -> None:
    """The device's table, or a file of its name in the folder $OUT: what was measured, and how."""
    head = {"device": card, "jax": jax.__version__, "date": str(datetime.date.today())}
    head |= {"command": "python experiments/tune_kernels.py tune"}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'
    out = pathlib.Path(os.environ.get("OUT", mosaic_gpu.TABLES))
    out.mkdir(exist_ok=True)
    (out / f"{card.replace(' ', '_')}.json").write_text(text)


if __name__ == "__main__":
    main()
