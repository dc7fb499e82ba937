"""Hopper through Pallas Mosaic GPU: what it supports, and how the work is cut."""

import functools
from typing import NamedTuple

import jax

from pallas_kernels import hopper
from pallas_kernels.amax.problem import BLOCK, Problem
from pallas_kernels.frame import Device


class Config(NamedTuple):
    """How the work is cut.

    Attributes:
      tiles: of a block, one below the other.
      steps: tiles in shared memory.
    """

    tiles: int = 4
    steps: int = 2


PARTS = 16  # of the maxima of a column: XLA takes the largest of so many where it needs it
LONGEST = 16  # tiles of a block


def config(problem: Problem) -> Config:
    """As few tiles a block as leave no more than PARTS of a column, where LONGEST can."""
    lines = problem.rows // BLOCK
    few = (t for t in range(1, LONGEST + 1) if lines % t == 0 and lines // t <= PARTS)
    return Config(tiles=next(few, Config().tiles))


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16 in multiples of 128, on an H100 or H200 with jax 0.11."""
    return hopper.missing_tiles(device, problem.rows, problem.columns, problem.x)


def run(x: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """What `op.amax` returns."""
    return _run(problem, config(problem), x)


@functools.partial(jax.jit, static_argnums=(0, 1))  # traced once, so that XLA sees equal calls
def _run(problem: Problem, config: Config, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.amax import hopper_kernel  # needs a jax with Mosaic GPU

    return hopper_kernel.kernel(problem, config)(x)
