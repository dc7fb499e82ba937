"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.frame import Device
from pallas_kernels.row_scaled_matmul.problem import Problem
from pallas_kernels.sharded import BLOCK

ROWS, COLUMNS = 256, 128  # of a tile


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      steps: stages of 128 along k in shared memory.
      outs: strips of 64 rows by 128 bytes in which a warpgroup's results leave.
      width, minor: the order of tiles: strips of `width` along axis `minor`, back and forth.
      registers, load_registers: of a thread that multiplies, and of one that loads.
      blocks: one per multiprocessor.
    """

    steps: int = 4
    outs: int = 2
    width: int = 8
    minor: int = 0
    registers: int = 208
    load_registers: int = 88
    blocks: int = 132


def supports(problem: Problem, device: Device) -> str | None:
    """Multiples of 128, results in bfloat16 or float32, on an H100 or H200 with jax 0.11."""
    reason = hopper.missing(device)
    if reason is not None:
        return reason
    sizes = problem.m, problem.n, problem.k
    if any(size % BLOCK for size in sizes):
        return f"m, n, k = {sizes} must be multiples of {BLOCK}"
    if problem.out not in ("bfloat16", "float32"):
        return f"the result is {problem.out}, it gives bfloat16 or float32"
    return None


def run(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, problem: Problem
) -> jax.Array:
    """`[m, n]`."""
    return _run(problem, Config(), a, a_scale, b, b_scale)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, so that XLA sees equal calls
def _run(problem: Problem, config: Config, *operands: jax.Array) -> jax.Array:
    from pallas_kernels.row_scaled_matmul import hopper_kernel  # needs a jax with Mosaic GPU

    return hopper_kernel.kernel(problem, config)(*operands)
