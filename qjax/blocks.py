"""Block-wise views of arrays: how one scale stands for many elements.

A block is one length per axis, right-aligned: `(128, 1)` on `[..., in, out]` means that 128
neighbors along `in` share a scale. The last block of an axis may be ragged.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qjax import _compat

Block = tuple[int, ...]


def align(block: Sequence[int], ndim: int) -> Block:
    """`block` with one entry for each of `ndim` axes: leading ones come and go with the axes."""
    extra = len(block) - ndim
    if extra > 0 and any(b != 1 for b in block[:extra]):
        raise ValueError(f"the block {tuple(block)} spans axes that {ndim} axes do not have")
    return (1,) * -extra + tuple(block)[max(extra, 0) :]


def trim(block: Sequence[int]) -> Block:
    """`block` without its leading ones: what a QTensor stores, whatever is stacked in front."""
    first = next((i for i, b in enumerate(block) if b != 1), len(block))
    return tuple(block[first:])


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """The shape of what holds one value per block: ceil(shape / block)."""
    return tuple(-(-s // b) for s, b in zip(shape, align(block, len(shape)), strict=True))


def split(x: jax.Array, block: Sequence[int]) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Views `x` with every blocked axis cut in two, (number of blocks, block).

    Returns the view, the axes that run within blocks, and the shape that a per-block array needs to
    broadcast against it. Ragged axes are padded with their last element, a member of the last
    block, so that its minimum and maximum stay what they are.
    """
    block = align(block, x.ndim)
    for axis, b in enumerate(block):
        if missing := -x.shape[axis] % b if b < x.shape[axis] else 0:
            last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)
            shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
            x = jnp.concatenate([x, jnp.broadcast_to(last, shape)], axis=axis)
    view, within, keep = [], [], []
    for size, b in zip(x.shape, block, strict=True):
        if b == 1:
            view.append(size)
            keep.append(size)
        elif b >= size:
            within.append(len(view))
            view.append(size)
            keep.append(1)
        else:
            within.append(len(view) + 1)
            view += [size // b, b]
            keep += [size // b, 1]
    return x.reshape(view), tuple(within), tuple(keep)


def apply(
    function: Callable[..., jax.Array], x: jax.Array, block: Sequence[int], *per_block: jax.Array
) -> jax.Array:
    """`function(x, *per_block)` elementwise: a per-block value stands for its block's elements."""
    shape, block = x.shape, align(block, x.ndim)
    pieces = zip(shape, block, _compat.explicit_shards(x), strict=True)
    if all(b == 1 or b >= s or (s % n == 0 and s // n % b == 0) for s, b, n in pieces):
        view, _, keep = split(x, block)
        return function(view, *(p.reshape(keep) for p in per_block)).reshape(shape)
    return function(x, *(expand(p, shape, block) for p in per_block))


def expand(per_block: jax.Array, shape: Sequence[int], block: Sequence[int]) -> jax.Array:
    """Repeats each per-block value over its block and crops to `shape`.

    Axes of one block stay of length 1.
    """
    for axis, (size, b) in enumerate(zip(shape, align(block, len(shape)), strict=True)):
        if 1 < b < size:
            before, after = per_block.shape[: axis + 1], per_block.shape[axis + 1 :]
            wide = jnp.broadcast_to(jnp.expand_dims(per_block, axis + 1), (*before, b, *after))
            repeated = wide.reshape(*before[:-1], before[-1] * b, *after)  # Explicit axes allow it
            per_block = jax.lax.slice_in_dim(repeated, 0, size, axis=axis)
    return per_block


def extremes(x: jax.Array, block: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest element of each block; NaN where a block holds NaN.

    XLA:CPU drops NaN from vectorized minima and maxima (seen on jax 0.10 to 0.12) but not from
    sums, and a sum costs half of replacing NaN first. A block whose sum goes beyond float32 in both
    directions may also give NaN.
    """
    block = align(block, x.ndim)
    run = (*map(_run, block[:-1]), *block[-1:])
    if run != block:
        rest = tuple(b // r for b, r in zip(block, run, strict=True))
        low, high = jax.lax.optimization_barrier(extremes(x, run))
        return extremes(low, rest)[0], extremes(high, rest)[1]
    view, within, _ = split(x, block)
    low, high, total = (f(view, axis=within) for f in (jnp.min, jnp.max, jnp.sum))
    low, high = (jnp.where(jnp.isnan(total), jnp.nan, v) for v in (low, high))
    shape = scale_shape(x.shape, block)
    return low.reshape(shape), high.reshape(shape)


def largest(x: jax.Array, block: Sequence[int]) -> jax.Array:
    """The largest magnitude of each block; NaN where a block holds NaN.

    Strided axes are folded by elementwise maxima, which XLA:CPU runs at the speed of memory and
    which keep NaN; along the last axis a sum finds it. The sum takes magnitudes: of x itself it
    compiles more slowly where x is a transpose.
    """
    block = align(block, x.ndim)
    run = (*map(_run, block[:-1]), *[1] * (x.ndim > 0))
    if any(r > 1 for r in run):
        view, within, _ = split(x, run)
        for axis in within:
            view = _fold(view, axis)
        rest = tuple(b // r for b, r in zip(block, run, strict=True))
        return largest(view.reshape(scale_shape(x.shape, run)), rest)
    view, within, _ = split(x, block)
    magnitude = jnp.abs(view)
    top, total = jnp.max(magnitude, axis=within), jnp.sum(magnitude, axis=within)
    return jnp.where(jnp.isnan(total), jnp.nan, top).reshape(scale_shape(x.shape, block))


def totals(x: jax.Array, block: Sequence[int]) -> jax.Array:
    """The sum of each block."""
    block = align(block, x.ndim)
    padding = [(0, -s % b if b < s else 0) for s, b in zip(x.shape, block, strict=True)]
    view, within, _ = split(jnp.pad(x, padding), block)
    return jnp.sum(view, axis=within).reshape(scale_shape(x.shape, block))


def _fold(x: jax.Array, axis: int) -> jax.Array:
    """The largest magnitude along an axis, which stays with length 1: eight parts at a time.

    The barriers keep XLA from nesting the steps in one loop: compiled for a GPU, five of them are
    the code of eight to the fifth slices.
    """
    while (length := x.shape[axis]) > 1:
        part = -(-length // 8)
        starts = (min(i, length - part) for i in range(0, length, part))
        parts = (jax.lax.slice_in_dim(x, i, i + part, axis=axis) for i in starts)
        x = jax.lax.optimization_barrier(functools.reduce(jnp.maximum, map(jnp.abs, parts)))
    return x


def _run(length: int) -> int:
    """How many of `length` elements of a strided axis to reduce at once.

    XLA:CPU reduces a few hundred strided elements ten times as fast as thousands (measured on jax
    0.10.2), if it is kept from merging the steps.
    """
    return next((r for r in range(min(length, 256), 1, -1) if length % r == 0), length)
