"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.block_scaled_matmul.problem import BLOCK, Problem
from pallas_kernels.frame import Device

GROUPS = 3  # warpgroups that multiply 64 rows each; the next one loads


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      bn: columns of a tile of 192 rows.
      steps: stages of 128 along k in shared memory.
      outs: strips of 64 rows by 128 bytes in which a warpgroup's results leave.
      width, minor: the order of tiles: strips of `width` along axis `minor`, back and forth.
      registers, load_registers: of a thread that multiplies, and of one that loads.
      blocks: one per multiprocessor.
    """

    bn: int = 128
    steps: int = 4
    outs: int = 2
    width: int = 8
    minor: int = 0
    registers: int = 160
    load_registers: int = 32
    blocks: int = 132


class Phase(NamedTuple):
    """Tiles of `bn` columns: `count` of them along n, from column `start` on."""

    bn: int
    start: int
    count: int


NARROW = 0.6  # what a tile of half the columns may cost, of a whole one; measured: 0.44 to 0.47


def phases(problem: Problem, config: Config) -> list[Phase]:
    """Whole tiles, and then narrow ones where those leave fewer multiprocessors without work.

    Not for the gradient of a weight, whose narrow tiles have not run on a device.
    """
    rows, wide = -(-problem.m // (64 * GROUPS)), config.bn
    if problem.b_rows:
        return [Phase(wide, 0, -(-problem.n // wide))]
    turns = lambda count: -(-rows * count // config.blocks)
    rest = lambda count: -(-max(0, problem.n - count * wide) // (wide // 2))
    cost = lambda count: (turns(count) + NARROW * turns(rest(count)), -count)
    whole = min(range(-(-problem.n // wide) + 1), key=cost)
    found = Phase(wide, 0, whole), Phase(wide // 2, whole * wide, rest(whole))
    return [phase for phase in found if phase.count]


def config(problem: Problem) -> Config:
    """Tiles in strips along m; of the gradient of a weight along n: 0.72 of cuBLASLt's speed in
    place of 0.63 at 8192 x 28672, the same at 8192 x 8192.
    """
    return Config(minor=int(problem.b_rows))


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
    return _run(problem, config(problem), a, a_scale, b, b_scale)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, so that XLA sees equal calls
def _run(problem: Problem, config: Config, *operands: jax.Array) -> jax.Array:
    from pallas_kernels.block_scaled_matmul import hopper_kernel  # needs a jax with Mosaic GPU

    return hopper_kernel.kernel(problem, config)(*operands)
