"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.cast_fp8.problem import Problem
from pallas_kernels.frame import Device


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      tiles: of a block, one below the other.
    """

    tiles: int = 1


def config(problem: Problem) -> Config:
    """Two tiles where transposed codes are written: 256 neighbors of each row, not 128."""
    return Config(tiles=1 + problem.turned)


LINE = 256  # of a row; TMA takes no longer one
LONGEST = 65536  # row: 3 bytes per element fit shared memory


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16 in multiples of 128, on an H100 or H200 with jax 0.11."""
    reason = hopper.missing_tiles(device, problem.rows, problem.columns, problem.x)
    if reason is not None or problem.scales != "row":
        return reason
    if problem.columns % LINE or problem.columns > LONGEST:
        return f"rows of {problem.columns} must be of multiples of {LINE} up to {LONGEST}"
    return None


def run(x: jax.Array, *inverses: jax.Array, problem: Problem) -> tuple[jax.Array, ...]:
    """What `op.cast_fp8` returns."""
    return _run(problem, config(problem), x, *inverses)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, so that XLA sees equal calls
def _run(problem: Problem, config: Config, *operands: jax.Array) -> tuple[jax.Array, ...]:
    from pallas_kernels.cast_fp8 import hopper_kernel, rows_kernel  # need a jax with Mosaic GPU

    if problem.scales == "row":
        return rows_kernel.kernel(problem)(*operands)
    return hopper_kernel.kernel(problem, config)(*operands)
