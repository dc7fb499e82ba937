"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.frame import Device
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul.hopper_layout import per_channel

CHANNELS = 128  # of a tile; each of two warpgroups has 64
LEAST_ROWS = 129  # with fewer a product in bfloat16, which can split k, is as fast
COLUMNS = 64  # of the second operand that are loaded at once
DEEP = 128  # of k in a stage
STRIP = 64  # rows of x whose results are written at once
SHARED_MEMORY = 232448 - 2048  # bytes of a block, less what barriers take
MULTIPROCESSORS = 132


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: of x in a tile.
      steps: stages of 128 along k in shared memory.
      width: tiles along m, after which the next channels come.
      blocks: at most one per multiprocessor.
    """

    rows: int = 256
    steps: int = 4
    width: int = 8
    blocks: int = MULTIPROCESSORS


def supports(problem: Problem, device: Device) -> str | None:
    """M > 16, int8 weights with scales per channel in `hopper8`, on an H100 or H200, jax 0.11."""
    weight, reason = problem.weight, hopper.missing_alone(device)
    if reason is not None:
        return reason
    if problem.layout != "hopper8" or weight.code != "int8" or not per_channel(weight):
        return (
            f"{weight} in layout {problem.layout}: it takes int8 in hopper8 with one scale per "
            "channel that lies apart, so k of no group's size"
        )
    if problem.m < LEAST_ROWS:
        return f"x has {problem.m} rows, it takes {LEAST_ROWS} or more"
    if weight.n % 8:
        return f"n = {weight.n} is no multiple of 8, so that rows are not aligned"
    if problem.out not in ("bfloat16", "float32"):
        return f"the result is {problem.out}, it gives bfloat16 or float32"
    return None


def shared_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a block: stages, results on their way out, the second operand."""
    rows, size = config.rows, 2 if problem.out == "bfloat16" else 4
    second = 2 * COLUMNS * (rows + CHANNELS) if problem.outliers else 0
    return config.steps * DEEP * (rows + CHANNELS) + 2 * CHANNELS * min(STRIP, rows) * size + second


def fits(problem: Problem, config: Config) -> str | None:
    """None, or why the config cannot run the problem."""
    c = config
    if c.rows not in (32, 64, 128, 256):
        return f"tiles have 32, 64, 128 or 256 rows, not {c.rows}"
    if c.steps < 2:
        return "a turn takes two stages"
    if shared_bytes(problem, c) > SHARED_MEMORY:
        return f"needs {shared_bytes(problem, c)} bytes of shared memory"
    return None


def choose_config(problem: Problem) -> Config:
    """The fewest rounds of the chip, weighed by the time of a tile, as it was measured."""
    tiles = -(-problem.weight.n // CHANNELS)
    rounds = lambda rows: -(-tiles * -(-problem.m // rows) // MULTIPROCESSORS)
    rows = min((256, 128, 64, 32), key=lambda rows: rounds(rows) * (rows + 64))
    config = Config(rows, 6)
    while shared_bytes(problem, config) > SHARED_MEMORY:
        config = config._replace(steps=config.steps - 1)
    return config


def run(
    x: jax.Array,
    x_scale: jax.Array,
    arrays: dict[str, jax.Array],
    *outliers: jax.Array,
    problem: Problem,
) -> jax.Array:
    """`[m, n]`."""
    return launch(problem, choose_config(problem), x, x_scale, arrays, *outliers)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once for the layers of a model
def launch(
    problem: Problem,
    config: Config,
    x: jax.Array,
    x_scale: jax.Array,
    arrays: dict[str, jax.Array],
    *outliers: jax.Array,
) -> jax.Array:
    """`[m, n]`, cut as the config says."""
    from pallas_kernels.int8_matmul import hopper_kernel  # needs a jax with Mosaic GPU

    reason = fits(problem, config)
    if reason is not None:
        raise ValueError(f"{config} cannot run {problem}: {reason}")
    second = []
    if outliers:
        columns, at = outliers
        fill = -columns.shape[1] % COLUMNS
        codes = _rows_of(arrays["codes"], jnp.pad(at, (0, fill)), problem)
        second = [jnp.pad(columns.astype(jnp.bfloat16), ((0, 0), (0, fill))), codes]
    return hopper_kernel.kernel(problem, config)(x, x_scale, arrays, *second)


def _rows_of(words: jax.Array, at: jax.Array, problem: Problem) -> jax.Array:
    """Rows `at` of the codes, as they lie in `hopper8`: bfloat16 `[n, len(at)]`."""
    held = jax.lax.bitcast_convert_type(words, jnp.uint8)
    # tile of n and of k, quarter, place, word, e, half of the channels
    held = held.reshape(words.shape[0], words.shape[1], 4, 32, 4, 2, 2)
    k = jnp.clip(at, 0, problem.weight.k - 1)[:, None]
    c = k // 8 % 4
    place = 8 * c + (jnp.arange(8)[None] ^ 2 * c)
    found = held[:, k // 128, k // 32 % 4, place, k // 2 % 4, k % 2]  # tile of n, at, r, half
    codes = found.transpose(0, 3, 2, 1).reshape(-1, at.size)
    return (codes.astype(jnp.int16) - 128).astype(jnp.bfloat16)
