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
      bm, bn: a tile of the result; `groups` warpgroups share its rows.
      part: columns of a warpgroup's product.
      groups: warpgroups that multiply.
      steps: stages of 128 along k in shared memory.
      outs: strips of 64 rows by 128 bytes in which a warpgroup's results leave.
      cluster: blocks along n that share a by multicast.
      width, minor: the order of tiles: strips of `width` along axis `minor`, back and forth.
      registers, load_registers: of a thread that multiplies, and of one that loads.
      blocks: one per multiprocessor.
    """

    bm: int = 192
    bn: int = 128
    part: int = 128
    groups: int = 3
    steps: int = 4
    outs: int = 2
    cluster: int = 2
    width: int = 8
    minor: int = 0
    registers: int = 152
    load_registers: int = 56
    blocks: int = 132


TRIO = Config()
WIDE = Config(bm=128, bn=256, groups=2, registers=208, load_registers=88)
COST = {TRIO: 1.0, WIDE: 1.1}  # of an element, measured


def choose_config(problem: Problem) -> Config:
    """`TRIO` for the gradient of a weight; else what costs less after each other."""
    if problem.b_rows:
        return TRIO
    return min(COST, key=lambda config: COST[config] * elements_in_turn(problem, config))


def elements_in_turn(problem: Problem, config: Config) -> int:
    """Of the tiles that the busiest multiprocessor makes one after the other."""
    columns = config.bn * config.cluster
    tiles = -(-problem.m // config.bm) * -(-problem.n // columns)
    return -(-tiles // (config.blocks // config.cluster)) * config.bm * config.bn


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
