"""Moments of an optimizer in low precision: codes of the parameter's shape, a scale per block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import blocks
from qjax.formats import FORMATS, split_planes
from qjax.qtensor import QTensor, dequantize
from qjax.training import casting


def run_of(shape: tuple[int, ...], count: int) -> blocks.Block:
    """A block of at most `count` neighbors: along the last axis, then as many whole rows as fit.

    Where the last axis divides `count` or `count` divides it, these are the blocks that a flattened
    array has. The array keeps its shape, so any sharding of it serves the codes.
    """
    block = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        block[axis] = max(1, min(shape[axis], count))
        if block[axis] < shape[axis]:
            break
        count //= block[axis]
    return tuple(block)


def hold(
    x: jax.Array, format: str, count: int, key: jax.Array | None = None, positive: bool = False
) -> QTensor:
    """A moment in codes: scale = max|x| of each block / largest value, codes nearest to x / scale.

    Args:
      x: float32, any shape.
      format: a row of `FORMATS` of one plane.
      count: elements of a block.
      key: round stochastically, so that the mean over keys is x; floating-point formats only.
      positive: keep what is not zero from becoming zero: such a second moment would divide by
        epsilon alone.
    """
    fmt, block = FORMATS[format], run_of(x.shape, count)
    top = blocks.largest(x, block)
    # below the smallest amax 1 / scale is not finite; such a block is held as zeros
    inverse = jnp.where(top < casting.SMALLEST, 0.0, fmt.max / top)
    scaled = blocks.apply(jnp.multiply, x, block, inverse)
    if key is not None:
        scaled = casting.stochastic(scaled, fmt, key)
    if positive:
        least = float(jnp.finfo(fmt.storage).smallest_subnormal)
        scaled = jnp.where(x > 0, jnp.maximum(scaled, least), scaled)
    scale = top / fmt.max
    codes = split_planes(fmt, fmt.encode(scaled))
    held = (codes, scale, None, None, None, format, blocks.trim(block), np.dtype(np.float32))
    return QTensor(*held)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RankOne:
    """A second moment in 4 bits under scales of rank one (Li et al., arXiv:2309.01507).

    v[i, j] = (codes[i, j] + 1) / 16 * min(tops[0][i], tops[1][j]): linear codes without a zero, and
    the largest value of each row and column; of each index of every axis where there are more.

    Attributes:
      codes: uint4, of the parameter's shape.
      tops: by axis: float32, the largest value at each of its indices, other axes of length 1.
    """

    codes: Any
    tops: tuple[Any, ...]


def hold_rank_one(v: jax.Array) -> RankOne:
    """A non-negative float32 array of at least two axes, rounded to nearest."""
    others = lambda axis: tuple(a for a in range(v.ndim) if a != axis)
    tops = tuple(jnp.max(v, axis=others(axis), keepdims=True) for axis in range(v.ndim))
    scale = _least(tops, v.shape)
    ratio = jnp.where(scale > 0, v / scale, 0.0)
    codes = jnp.clip(jnp.round(ratio * 16) - 1, 0, 15)
    return RankOne(codes.astype(jnp.uint4), tops)


def opened(held: Any) -> jax.Array:
    """The float32 array that a moment stands for; an array passes through."""
    if isinstance(held, RankOne):
        share = (held.codes.astype(jnp.float32) + 1) * (1 / 16)
        return share * _least(held.tops, held.codes.shape)
    return dequantize(held) if isinstance(held, QTensor) else held


def is_held(leaf: Any) -> bool:
    """Whether a leaf is a moment in codes."""
    return isinstance(leaf, (QTensor, RankOne))


def _least(tops: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    least = jnp.broadcast_to(tops[0], shape)
    for top in tops[1:]:
        least = jnp.minimum(least, jnp.broadcast_to(top, shape))
    return least
