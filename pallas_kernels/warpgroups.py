"""What kernels of warpgroup products share."""

# jax 0.10, which is too old for the kernels, wants an index for `load`.
# pyright: reportCallIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def scales(ref: Any, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Of the rows (axis 0) or columns of a part of a product."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    return lax.broadcast_in_dim(plgpu.load(ref, layout=layout, optimized=False), shape, (axis,))


def write_strips(
    y: jax.Array, buffers: Any, member: Any, out: Any, row: Any, channels: Any
) -> None:
    """Writes the transpose of `y [channels, rows]` to `out [m, n]` from a row on, as strips of rows
    by way of the `buffers [members, count, strip, channels]` of a member in turns. TMA may still
    read the last ones: it is waited for before a buffer's next use.
    """
    _, count, strip, _ = buffers.shape
    for i, begin in enumerate(range(0, y.shape[1], strip)):
        plgpu.wait_smem_to_gmem(count - 1, wait_read_only=True)
        part = y[:, begin : begin + strip].astype(out.dtype)
        if part.dtype.itemsize == 4:  # what is narrower is transposed as it is stored
            part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        buffers.at[member, i % count].transpose((1, 0))[...] = part
        plgpu.commit_smem()
        where = pl.ds(row + begin, strip), channels
        plgpu.copy_smem_to_gmem(buffers.at[member, i % count], out.at[where])


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
