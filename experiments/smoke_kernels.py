"""Launches the Hopper kernels of quantized matmuls on random weights, for tools that watch it.

Small problems of every kind of weight, m on both sides of 16; or one problem of int4, g = 128.

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform    # so that each array is an allocation
    compute-sanitizer --tool memcheck python experiments/smoke_kernels.py
    ncu -k regex:quantized_matmul -c 1 python experiments/smoke_kernels.py 64 8192 8192    # m k n

"""

import sys

import ceilings
import jax
import jax.numpy as jnp
import tune_kernels as decode

from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.mosaic_wgmma import Config
from pallas_kernels.quantized_matmul.problem import Problem, Weight

LARGEST = 600_000  # numbers of a weight that is small
WIDE = [
    Config(32, 2, 4),
    Config(64, 2, 4, 2, channels=64, teams=2),
    Config(32, 1, 4, channels=128, teams=2),
    Config(128, 1, 3, 1, 2),
]


def launch(m: int, weight: Weight, config: Config | None) -> None:
    """Once; scales are near 1."""
    layout = decode.layout_of(weight)
    problem = Problem(m, weight, layout, "bfloat16", "bfloat16")
    arrays = {
        name: ceilings.random_words(i, v.shape) & 0x001F001F | (0 if name == "zero" else 0x3F803F80)
        for i, (name, v) in enumerate(LAYOUTS[layout].shapes(weight).items())
    }
    arrays["codes"] = ceilings.random_words(9, arrays["codes"].shape)
    x = jnp.ones((m, weight.k), jnp.bfloat16)
    if m <= mosaic_gpu.MAX_ROWS:
        narrow = max(mosaic_gpu.configs(m, weight))[1]
        y = mosaic_gpu.launch(problem, narrow, (weight.n,), x, [arrays])
    else:
        wide = config or min(mosaic_wgmma.configs(problem))[1]
        y = mosaic_wgmma.launch(problem, wide, (weight.n,), x, [arrays])
    jax.block_until_ready(y)
    print(m, weight, config or "", flush=True)


def main() -> None:
    """All, or what is asked for."""
    if len(sys.argv) > 1:
        m, k, n = map(int, sys.argv[1:])
        launch(m, Weight(k, n, 128, "int4", "bfloat16"), None)
        return
    small = [w for w, _ in decode.CHECKS.values() if w.k * w.n <= LARGEST]
    for i, weight in enumerate(small):
        for m in (3, 16):
            launch(m, weight, None)
        problem = Problem(70, weight, decode.layout_of(weight), "bfloat16", "bfloat16")
        fits = [c for c in WIDE if mosaic_wgmma.fits(problem, c) is None]
        for config in (fits[i % len(fits)], fits[(i + 1) % len(fits)]):
            launch(70, weight, config)


if __name__ == "__main__":
    main()
