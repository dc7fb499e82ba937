"""What kernels of warpgroup products share."""

# jax 0.10, which is too old for the kernels, wants an index for `load`.
# pyright: reportCallIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def scales(ref: Any, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Of the rows (axis 0) or columns of a part of a product."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return lax.broadcast_in_dim(plgpu.load(ref, layout=layout, optimized=False), shape, (axis,))


def by_turns(
    turns: Any,
    operand: Callable[[Any], Any],
    multiply: Callable[[Any, Any], None],
    finished: Callable[[Any], None],
) -> None:
    """Multiplies stages 0 to 2 turns, each one's operand made while the one before multiplies.

    Two stages a turn, so that the operands of two products have their own registers: with one set
    the compiler serializes the instructions of a product.
    """

    def turn(i: Any, one: Any, last: bool) -> Any:
        multiply(2 * i, one)
        other = operand(2 * i + 1)
        finished(2 * i)
        multiply(2 * i + 1, other)
        later = one if last else operand(2 * i + 2)
        finished(2 * i + 1)
        return later

    more = functools.partial(turn, last=False)
    held = lax.fori_loop(0, turns - 1, more, operand(jnp.int32(0)))
    turn(turns - 1, held, last=True)
