"""Launches the Hopper kernels on small problems, for tools that watch them.

Quantized matmuls of every kind of weight, m on both sides of 16, the kernels between the matmuls of
a decode step, int8 by int8 and those of FP8 training; or one quantized matmul (m k n format) as a
model runs it.

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform    # so that each array is an allocation
    compute-sanitizer --tool memcheck python experiments/smoke_kernels.py
    compute-sanitizer --tool racecheck python experiments/smoke_kernels.py training
    ncu -k regex:quantized_matmul -c 1 python experiments/smoke_kernels.py 64 8192 8192 int4

"""

import sys

import ceilings
import decode_kernels
import fp8_kernels
import int8_kernels
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
    """Once; scales are near 1. Without a config as `supports` would have it run."""
    layout = decode.layout_of(weight)
    problem = Problem(m, weight, layout, "bfloat16", "bfloat16")
    arrays = {
        name: ceilings.random_words(i, v.shape) & 0x001F001F | (0 if name == "zero" else 0x3F803F80)
        for i, (name, v) in enumerate(LAYOUTS[layout].shapes(weight).items())
    }
    arrays["codes"] = ceilings.random_words(9, arrays["codes"].shape)
    x = jnp.ones((m, weight.k), jnp.bfloat16)
    if config is not None:
        y = mosaic_wgmma.launch(problem, config, (weight.n,), x, [arrays])
    else:
        y = (mosaic_gpu if m <= mosaic_gpu.MAX_ROWS else mosaic_wgmma).run(x, arrays, problem)
    jax.block_until_ready(y)
    print(m, weight, config or "", flush=True)


def matmuls() -> None:
    """Of every kind of weight."""
    small = [w for w, _ in decode.CHECKS.values() if w.k * w.n <= LARGEST]
    for i, weight in enumerate(small):
        for m in (3, 16):
            launch(m, weight, None)
        problem = Problem(70, weight, decode.layout_of(weight), "bfloat16", "bfloat16")
        fits = [c for c in WIDE if mosaic_wgmma.fits(problem, c) is None]
        for config in dict.fromkeys((*fits, *fits)[i % len(fits) :][:2]):
            launch(70, weight, config)


def training() -> None:
    """Casts, maxima and products."""
    for measure, small, _ in fp8_kernels.OPS.values():
        for problem in small:
            print(fp8_kernels.text(measure(problem, False)), flush=True)


def integers() -> None:
    """int8 by int8, outlier columns and none."""
    for problem in int8_kernels.problems.SMALL + int8_kernels.problems.TALL:
        print(problem, int8_kernels.check(problem), flush=True)


KINDS = {
    "matmuls": matmuls,
    "decoding": decode_kernels.check,
    "integers": integers,
    "training": training,
}


def main() -> None:
    """All, some kinds, or one matmul."""
    asked = sys.argv[1:]
    if asked and asked[0] not in KINDS:
        m, k, n = map(int, asked[:3])
        launch(m, decode.FORMATS[asked[3]][0](k, n), None)
        return
    for kind in asked or KINDS:
        KINDS[kind]()


if __name__ == "__main__":
    main()
