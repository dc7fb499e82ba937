"""Moments of an optimizer in low precision: codes of the parameter's shape, a scale per block."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Hold(NamedTuple):
    """How a moment is held, in two steps: the second may see the moment computed anew.

    Attributes:
      measure: moment -> what its scales are made from.
      write: (moment, what was measured, key) -> what holds it.
    """

    measure: Callable[[jax.Array], Any]
    write: Callable[[jax.Array, Any, jax.Array], Any]


FLOAT = Hold(lambda x: (), lambda x, top, key: x)


def blocked(format: str, count: int, stochastic: bool = False, positive: bool = False) -> Hold:
    """Codes nearest to x / scale, scale = max|x| of each block / largest value.

    Args:
      format: a row of `FORMATS` of one plane.
      count: elements of a block.
      stochastic: round such that the mean over keys is x; floating-point formats only.
      positive: keep what is not zero from becoming zero: such a second moment would divide by
        epsilon alone.
    """
    fmt = FORMATS[format]

    def measure(x: jax.Array) -> jax.Array:
        return blocks.largest(x, run_of(x.shape, count))

    def write(x: jax.Array, top: jax.Array, key: jax.Array) -> QTensor:
        block = run_of(x.shape, count)
        # below the smallest amax 1 / scale is not finite; such a block is held as zeros
        inverse = jnp.where(top < casting.SMALLEST, 0.0, fmt.max / top)
        scaled = blocks.apply(jnp.multiply, x, block, inverse)
        if stochastic:
            scaled = casting.stochastic(scaled, fmt, key)
        if positive:
            least = float(jnp.finfo(fmt.storage).smallest_subnormal)
            scaled = jnp.where(x > 0, jnp.maximum(scaled, least), scaled)
        scale = top / fmt.max
        codes = split_planes(fmt, fmt.encode(scaled))
        held = (codes, scale, None, None, None, format, blocks.trim(block), np.dtype(np.float32))
        return QTensor(*held)

    return Hold(measure, write)


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


def _largest_of_axes(v: jax.Array) -> tuple[jax.Array, ...]:
    others = lambda axis: tuple(a for a in range(v.ndim) if a != axis)
    return tuple(jnp.max(v, axis=others(axis), keepdims=True) for axis in range(v.ndim))


def _rank_one(v: jax.Array, tops: tuple[jax.Array, ...], key: jax.Array) -> RankOne:
    scale = _least(tops, v.shape)
    ratio = jnp.where(scale > 0, v / scale, 0.0)
    codes = jnp.clip(jnp.round(ratio * 16) - 1, 0, 15)
    return RankOne(codes.astype(jnp.uint4), tops)


RANK_ONE = Hold(_largest_of_axes, _rank_one)  # non-negative, of two axes or more; to nearest


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
