"""Quantized matmuls of PyTorch and of XLA beside ours, on one GPU in one run.

Device time of a product (CUPTI, all kernels of it, medians over weights that exceed the L2): int4
in groups of 128 by PyTorch's tinygemm, by XLA's own fusions and by our kernels; int8 and fp8 by our
kernels, XLA's fusions, and as products of two such operands (`_int_mm`, `_scaled_mm`: activations
in codes, made beforehand and not counted); XLA's dot on a dequantized (bfloat16) weight. In JAX a
reader stands behind each product: our kernels start before the one in front is done, and their
waiting would count.

    python experiments/peers_kernels.py                      # prints a table, needs torch
    SHAPES=8192x8192 ROWS=1,16 python experiments/peers_kernels.py

"""

import datetime
import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import torch
import tune_kernels as decode
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.dispatch import choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma
from pallas_kernels.quantized_matmul.problem import Problem, Weight

GROUP = 128
SHAPES = [(8192, 8192), (4096, 28672)]  # k, n
ROWS = (1, 16, 32, 64)
READ = 2**20  # words
KERNELS = {"mosaic_gpu": mosaic_gpu.run, "mosaic_wgmma": mosaic_wgmma.run}


def of_torch(call: Callable[[Any], Any], weights: list[Any]) -> float:
    """Microseconds of `call(weight)`, by the timer of `ceilings`."""
    for _ in range(2):
        for weight in weights:
            call(weight)
    torch.cuda.synchronize()
    library = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # what `profiler.Cupti` calls
    library._cupti_init()
    for _ in range(ceilings.RUNS):
        for weight in weights:
            call(weight)
    torch.cuda.synchronize()
    timings = [1e3 * ms for _, ms in library._cupti_get_timings(False)]
    size = len(timings) // (ceilings.RUNS * len(weights))
    return statistics.median(sum(timings[i : i + size]) for i in range(0, len(timings), size))


def of_jax(call: Callable[..., Any], x: jax.Array, weights: list[Any]) -> float:
    """Microseconds of `call(x, weight)`."""
    data = ceilings.random_words(0, (READ,))
    read = ceilings.reader(READ, *ceilings.READERS[0])

    def turns(x: jax.Array, weights: Any, data: jax.Array) -> jax.Array:
        for weight in weights:
            x = read(data, x, call(x, weight))
        return x

    calls = ceilings.durations(turns, x, weights, data, runs=5)
    mine = [sum(us for name, us in call if "read_bytes" not in name) for call in calls]
    return statistics.median(mine) / len(weights)


def torch_weights(k: int, n: int, count: int) -> dict[str, list[Any]]:
    """Random weights as PyTorch's products take them."""
    on: dict[str, Any] = {"device": "cuda"}
    packed = []
    for _ in range(count):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **on)
        scales = torch.rand(k // GROUP, n, 2, **on).to(torch.bfloat16)
        packed.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    wide = [torch.randint(-128, 128, (n, k), dtype=torch.int8, **on).t() for _ in range(count)]
    fp8 = [torch.randn(n, k, **on).to(torch.float8_e4m3fn).t() for _ in range(count)]
    return {"tinygemm": packed, "_int_mm": wide, "_scaled_mm": fp8}


def peers_of_torch(m: int, k: int, weights: dict[str, list[Any]]) -> dict[str, float | None]:
    """Microseconds of each; None where it refuses m."""
    x = torch.randn(m, k, device="cuda")
    short, codes, fp8 = x.to(torch.bfloat16), x.to(torch.int8), x.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    calls = {
        "tinygemm": lambda w: torch.ops.aten._weight_int4pack_mm(short, w[0], GROUP, w[1]),
        "_int_mm": lambda w: torch._int_mm(codes, w),
        "_scaled_mm": lambda w: torch._scaled_mm(fp8, w, one, one, out_dtype=torch.bfloat16),
    }
    found: dict[str, float | None] = {}
    for name, call in calls.items():
        try:
            found[name] = of_torch(call, weights[name])
        except RuntimeError as why:
            print(f"{name}, m {m}: {str(why).splitlines()[0][:160]}", flush=True)
            found[name] = None
    return found


def peers_of_jax(m: int, k: int, n: int, count: int) -> dict[str, float | None]:
    """Microseconds of our kernels, and of XLA on a bfloat16 weight and on codes."""
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    found: dict[str, float | None] = {}
    for name, weight in {
        "int4": Weight(k, n, GROUP, "int4", "bfloat16"),
        "int8": Weight(k, n, k, "int8"),
        "fp8": Weight(k, n, k, "float8_e4m3fn"),
    }.items():
        problem = Problem(m, weight, decode.layout_of(weight), "bfloat16", "bfloat16")
        run = KERNELS[choose("quantized_matmul", problem, Device.default())]
        call = lambda x, a, run=run, problem=problem: run(x, a, problem)
        found[f"ours {name}"] = of_jax(call, x, decode.random_arrays(weight, count))
    keys = jax.random.split(jax.random.key(1), count)
    weights = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys]
    found["XLA bf16"] = of_jax(jnp.dot, x, weights)

    def opened(x: jax.Array, weight: Any) -> jax.Array:
        codes, scale = weight
        cut = codes.reshape(len(scale), -1, n).astype(jnp.bfloat16) * scale[:, None]
        return jnp.dot(x, cut.reshape(k, n))

    for dtype, group in (("int4", GROUP), ("int8", k), ("float8_e4m3fn", k)):
        low = 8 if dtype == "int4" else 128
        made = [
            (jax.random.randint(key, (k, n), -low, low, jnp.int8).astype(dtype), w[: k // group])
            for key, w in zip(keys, weights, strict=True)
        ]
        found[f"XLA {dtype}"] = of_jax(opened, x, made)
    return found


def main() -> None:
    """Prints a row per shape and m, and writes them to $OUT or experiments/results."""
    card = jax.devices()[0].device_kind
    print(card, "jax", jax.__version__, "torch", torch.__version__, flush=True)
    rows = []
    asked = os.environ.get("SHAPES", "")
    shapes = [tuple(map(int, v.split("x"))) for v in asked.split(",") if v] or SHAPES
    ms = [int(v) for v in os.environ.get("ROWS", "").split(",") if v] or ROWS
    for k, n in shapes:
        count = ceilings.rotation(k * n // 2)
        weights = torch_weights(k, n, count)
        for m in ms:
            found = peers_of_torch(m, k, weights)
            found |= peers_of_jax(m, k, n, min(4, count))
            rounded = {name: us and round(us, 1) for name, us in found.items()}
            print(k, n, m, rounded, flush=True)
            rows.append({"k": k, "n": n, "m": m, **rounded})
            out = pathlib.Path(os.environ.get("OUT", pathlib.Path(__file__).parent / "results"))
            head = {"card": card, "jax": jax.__version__, "torch": torch.__version__}
            head |= {"date": str(datetime.date.today())}
            head |= {"command": "python experiments/peers_kernels.py", "rows": rows}
            path = out / f"peers_kernels_{card.replace(' ', '_')}.json"
            path.write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
