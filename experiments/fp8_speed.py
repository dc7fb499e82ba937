"""How much faster than bfloat16 the matmuls of a Llama-shaped layer train in FP8 on this GPU.

The projections alone (q, k, v, o, gate, up, down; no attention), forward and backward, gradients to
the input and the weights, casts included. Each recipe and bfloat16 take turns; the medians count.
Also printed: how many of the optimized program's matmuls are cuBLASLt FP8 calls (three per site are
wanted, less those that XLA finds equal: q, k and v get the same gradient) and how many are others.

XLA's Triton matmuls are off: tuning them for FP8 takes minutes per program.

    python experiments/fp8_speed.py

"""

import dataclasses
import os
import re
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")

import jax
import jax.numpy as jnp

from qjax import training

TOKENS = 16384
WIDTHS = (4096, 8192)
EXPANSION = 3.5  # hidden = 3.5 * width: Llama-3
RECIPES = ("current", "rowwise", "block")
BARS = {(8192, "current"): 1.6, (8192, "rowwise"): 1.5, (8192, "block"): 1.3}
RUNS, REPEATS = 7, 3  # medians of RUNS, each the mean of REPEATS calls


def weights(width: int, hidden: int) -> dict[str, jax.Array]:
    """Random bfloat16 weights `[in, out]`."""
    shapes = dict.fromkeys("qkvo", (width, width))
    shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: (jax.random.normal(key, shape) * shape[0] ** -0.5).astype(jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(p: dict[str, jax.Array], x: jax.Array, target: jax.Array) -> jax.Array:
    """Of one layer's projections."""
    mixed = x @ p["q"] + x @ p["k"] + x @ p["v"]
    x = x + mixed @ p["o"]
    x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return jnp.sum((x * target).astype(jnp.float32))


def compiled(name: str, p: Any, *args: jax.Array) -> Any:
    """A compiled function of (params, x, target) that returns every gradient."""
    if name == "bf16":
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(p, *args).compile()
    # The last matmul runs dense by default, as the papers keep the head: here it is none.
    recipe = dataclasses.replace(training.RECIPES[name], keep_head=False)
    low = training.fp8(loss, recipe, argnums=(0, 1))
    state = low.init(p, *args)
    return jax.jit(lambda p, *a: low.grads(p, state, *a)[1:]).lower(p, *args).compile()


def calls(program: Any) -> tuple[int, int]:
    """(cuBLASLt FP8 matmuls, other matmuls) of the optimized program."""
    text = program.as_text()
    fp8 = len(re.findall(r'custom_call_target="__cublas\$lt\$matmul\$f8"', text))
    rest = len(re.findall(r'custom_call_target="__cublas\$(?:gemm|lt\$matmul)"', text))
    rest += len(re.findall(r'kind":"__triton_(?:nested_)?gemm', text))
    return fp8, rest


def main() -> None:
    """Prints one line per width and variant."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {TOKENS} tokens")
    print(f"{'width':>6} {'recipe':8} {'bf16 ms':>8} {'ms':>8} {'gain':>7}  (fp8 calls, others)")
    for width in WIDTHS:
        p = weights(width, int(EXPANSION * width))
        keys = jax.random.split(jax.random.key(1))
        x, target = (jax.random.normal(k, (TOKENS, width)).astype(jnp.bfloat16) for k in keys)
        dense = compiled("bf16", p, x, target)
        for name in RECIPES:
            start = time.perf_counter()
            low = compiled(name, p, x, target)
            build = time.perf_counter() - start
            seconds: dict[Any, list[float]] = {dense: [], low: []}
            for i in range(RUNS + 1):
                for call, times in seconds.items():
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        out = call(p, x, target)
                    jax.block_until_ready(out)
                    if i:  # the first round warms up
                        times.append((time.perf_counter() - start) / REPEATS)
                    del out
            bf16, ours = (statistics.median(times) for times in seconds.values())
            ratio, bar = bf16 / ours, BARS.get((width, name))
            verdict = "" if bar is None else f" (bar {bar}: {'met' if ratio >= bar else 'MISSED'})"
            print(
                f"{width:6} {name:8} {1e3 * bf16:8.2f} {1e3 * ours:8.2f} {ratio:6.2f}x  "
                f"{calls(low)}, built in {build:.0f} s{verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
