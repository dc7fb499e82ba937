"""What quantizing weights costs on this GPU: GPTQ with the Hessian given, Hessians, RTN.

Random normal weights; a Hessian of correlated features. Compile time is
printed apart. Medians, waited for.

    python experiments/ptq_gpu.py

"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import qjax

SPEC = "int4_g128"
SOLVES = {(4096, 4096): 0.15, (14336, 4096): 1.0}  # [in, out]: seconds allowed
TOKENS, FEATURES = 128 * 2048, 4096  # of the Hessian
RTN_SHAPE, RTN_BAR = (16384, 16384), 200.0  # Gparam/s
RUNS = 5


def measure(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds of the first call, median of those after it)."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def inputs(tokens: int, features: int) -> jax.Array:
    """bfloat16 activations whose features are correlated, as a model's are."""
    keys = jax.random.split(jax.random.key(0), 3)
    mix = jax.random.normal(keys[0], (64, features))
    x = jax.random.normal(keys[1], (tokens, 64)) @ mix / 8
    return (x + 0.5 * jax.random.normal(keys[2], x.shape)).astype(jnp.bfloat16)


def hessian(x: jax.Array) -> jax.Array:
    """x^T x, summed in float32."""
    return jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def main() -> None:
    """Prints one line per measurement."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {SPEC}")
    spec, solver = qjax.Spec.parse(SPEC), qjax.gptq()
    for (k, n), bar in SOLVES.items():
        w = jax.random.normal(jax.random.key(2), (k, n)).astype(jnp.bfloat16)
        h = hessian(inputs(4 * k, k))
        stats = qjax.Stats(hessian=h)
        first, seconds = measure(lambda w=w, stats=stats: solver.quantize(w, spec, stats))
        q, notes = solver.quantize(w, spec, stats)

        def error(q: Any, w: jax.Array = w, h: jax.Array = h) -> float:
            d = w.astype(jnp.float32) - qjax.dequantize(q).astype(jnp.float32)
            return float(jnp.vdot(d, jnp.matmul(h, d, precision="highest")))

        nearest = qjax.quantize(w, spec, 0)
        print(
            f"gptq {k}x{n}: {seconds:.3f} s (bar {bar} s: {verdict(seconds <= bar)}), first call "
            f"{first:.1f} s, damping {float(notes['damping']):g}, output error "
            f"{error(q) / error(nearest):.3f} of round to nearest"
        )
    x = inputs(TOKENS, FEATURES)
    sums = jax.jit(hessian)
    first, seconds = measure(lambda: sums(x))
    rate = 2 * TOKENS * FEATURES**2 / seconds / 1e12
    print(f"hessian of {TOKENS}x{FEATURES}: {1e3 * seconds:.1f} ms, {rate:.0f} TFLOP/s")
    w = jax.random.normal(jax.random.key(3), RTN_SHAPE).astype(jnp.bfloat16)
    first, seconds = measure(lambda: qjax.quantize(w, spec, 0))
    rate = w.size / seconds / 1e9
    print(f"rtn {RTN_SHAPE}, checked: {rate:.0f} Gparam/s, first call {first:.1f} s")
    inside = jax.jit(lambda w: qjax.quantize(w, spec, 0))
    first, seconds = measure(lambda: inside(w))
    rate = w.size / seconds / 1e9
    print(
        f"rtn {RTN_SHAPE}, in jit: {rate:.0f} Gparam/s (bar {RTN_BAR}: {verdict(rate >= RTN_BAR)})"
    )


def verdict(held: bool) -> str:
    """How a bar is printed."""
    return "met" if held else "MISSED"


if __name__ == "__main__":
    main()
