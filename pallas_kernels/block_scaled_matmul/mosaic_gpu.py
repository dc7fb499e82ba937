"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem
from pallas_kernels.frame import Device


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      bm, bn: a tile of the result; two warpgroups share its rows.
      part: columns of a warpgroup's product.
      steps: stages of 128 along k in shared memory.
      outs: strips of 64 rows by 128 bytes in which a warpgroup's results leave.
      cluster: blocks along m that share b by multicast.
      width, minor: the order of tiles: strips of `width` along axis `minor`, back and forth.
      registers, load_registers: of a thread that multiplies, and of one that loads.
      blocks: one per multiprocessor.
    """

    bm: int = 128
    bn: int = 256
    part: int = 128
    steps: int = 4
    outs: int = 2
    cluster: int = 2
    width: int = 8
    minor: int = 0
    registers: int = 208
    load_registers: int = 88
    blocks: int = 132


WIDE = Config()
NARROW = Config(bn=192, part=192, registers=232, load_registers=40)


def choose_config(problem: Problem) -> Config:
    """`NARROW` for the gradient of a weight; else what takes fewer columns after each other."""
    if problem.b_rows:
        return NARROW
    return min((WIDE, NARROW), key=lambda config: columns_in_turn(problem, config))


def columns_in_turn(problem: Problem, config: Config) -> int:
    """Columns of the tiles that the busiest multiprocessor makes one after the other."""
    rows = config.bm * config.cluster
    tiles = -(-problem.m // rows) * -(-problem.n // config.bn)
    return -(-tiles // (config.blocks // config.cluster)) * config.bn


def supports(problem: Problem, device: Device) -> str | None:
    """Multiples of 128, results in bfloat16 or float32, on an H100 or H200 with jax 0.11."""
    reason = hopper.missing(device)
    if reason is not None:
        return reason
    if problem.m % BLOCK or problem.n % BLOCK:
        return f"m = {problem.m} and n = {problem.n} must be multiples of {BLOCK}"
    if problem.out not in ("bfloat16", "float32"):
        return f"the result is {problem.out}, it gives bfloat16 or float32"
    return None


def run(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, problem: Problem
) -> jax.Array:
    """`[m, n]`."""
    return _run(problem, choose_config(problem), a, a_scale, b, b_scale)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, so that XLA sees equal calls
def _run(problem: Problem, config: Config, *operands: jax.Array) -> jax.Array:
    from pallas_kernels.block_scaled_matmul import hopper_kernel  # needs a jax with Mosaic GPU

    return hopper_kernel.kernel(problem, config)(*operands)
