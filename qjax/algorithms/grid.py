"""Grid: the values that a QTensor's scales allow, for algorithms that choose codes one by one."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import blocks, quantizing
from qjax.formats import FORMATS, Format, split_planes
from qjax.qtensor import QTensor, dequantize
from qjax.scaling import reciprocal
from qjax.spec import Spec

AXIS = 0  # contracted, of a weight [in, out]


class Grid(NamedTuple):
    """How elements become codes and values; leaves broadcast against them, float32.

    codes = encode((x - offset) * inverse + zero_point), value = (decode(code) - zero_point) * scale
    + offset.
    """

    inverse: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    offset: jax.Array | None

    def codes(self, fmt: Format, x: jax.Array) -> jax.Array:
        """The codes, joined, that `quantize` would choose for `x`."""
        dtype = x.dtype
        x = x if self.offset is None else x - self.offset.astype(dtype)
        x = x * self.inverse.astype(dtype)
        if self.zero_point is not None:
            # an integer zero point moves codes after they are rounded, as in `rounding.minmax`
            x = jnp.round(x) + self.zero_point.astype(dtype)
        return fmt.encode(x.astype(jnp.float32))

    def values(self, fmt: Format, codes: jax.Array, dtype: np.dtype) -> jax.Array:
        x = fmt.decode(codes, dtype)
        x = x if self.zero_point is None else x - self.zero_point.astype(dtype)
        x = x * self.scale.astype(dtype)
        return x if self.offset is None else x + self.offset.astype(dtype)

    def rows(self, index: jax.Array | np.ndarray) -> "Grid":
        """The rows of blocks at `index`."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def nearest(
    w: jax.Array, spec: Spec, within: jax.Array | None = None
) -> tuple[QTensor, Grid, np.ndarray]:
    """A weight `[in, out]` rounded to nearest; its scales are those of `within`.

    Returns:
      The QTensor; its grid `[blocks of in, out]`; and to which of these blocks each row belongs.
    """
    block = quantizing.block_of(spec, w.shape, (AXIS,))
    ranges = w if within is None else within
    rounded = quantizing.round_blocks(ranges.astype(jnp.float32), spec, block)
    q = quantizing.hold(rounded, spec, block, (AXIS,), (), np.dtype(w.dtype))
    count = -(-w.shape[0] // block[0])

    def per_row(leaf: jax.Array | QTensor | None) -> jax.Array | None:
        if leaf is None:
            return None
        leaf = dequantize(leaf) if isinstance(leaf, QTensor) else leaf
        wide = blocks.expand(leaf.astype(jnp.float32), (count, w.shape[1]), (1, block[1]))
        return jnp.broadcast_to(wide, (count, w.shape[1]))

    scale = per_row(q.scale)
    assert scale is not None
    inverse = reciprocal(scale) if rounded.inverse is None else per_row(rounded.inverse)
    assert inverse is not None
    grid = Grid(inverse, scale, per_row(q.zero_point), per_row(q.offset))
    group = np.arange(w.shape[0]) // block[0]
    if within is not None:
        codes = grid.rows(group).codes(FORMATS[spec.format], w.astype(jnp.float32))
        q = dataclasses.replace(q, qvalue=split_planes(FORMATS[spec.format], codes))
    return q, grid, group
