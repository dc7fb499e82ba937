"""Matmuls and convolutions with a QTensor, as data: which axes meet, and where scales go."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks
from qjax.qtensor import QTensor, Quantized

Axes = tuple[int, ...]


class Dot(NamedTuple):
    """A `lax.dot_general` with a QTensor on side 0 or 1; hashable."""

    dimension_numbers: Any
    weight_side: int
    precision: Any
    out_dtype: np.dtype
    out_sharding: Any = None

    def axes(self, side: int) -> tuple[Axes, Axes]:
        """(contracted, batch) axes of the operand on `side`."""
        contract, batch = self.dimension_numbers
        return tuple(contract[side]), tuple(batch[side])

    def contracted(self) -> Axes:
        return self.axes(self.weight_side)[0]

    def features(self, axes: Axes) -> Axes | None:
        """The axes of x that these contracted axes of the weight meet; None if there are others."""
        w, x = self.contracted(), self.axes(1 - self.weight_side)[0]
        return tuple(x[w.index(a)] for a in axes) if set(axes) == set(w) else None

    def stacked(self, count: int) -> Axes | None:
        """The axes of x that run in parallel with the first `count` of the weight, if all do."""
        w, x = self.axes(self.weight_side)[1], self.axes(1 - self.weight_side)[1]
        return tuple(x[w.index(a)] for a in range(count)) if set(range(count)) <= set(w) else None

    def rows(self, x: jax.Array) -> Axes:
        """The axes of x that are neither contracted nor parallel."""
        contracted, batch = self.axes(1 - self.weight_side)
        return tuple(a for a in range(x.ndim) if a not in contracted and a not in batch)

    def per_row(self, leaf: jax.Array, x: jax.Array, extra: tuple) -> jax.Array:
        return leaf

    def __call__(self, x: jax.Array, w: jax.Array, extra: tuple, preferred: Any) -> jax.Array:
        operands = (w, x) if self.weight_side == 0 else (x, w)
        return lax.dot_general(
            *operands,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=preferred,
            out_sharding=self.out_sharding,
        )

    def token(self, x: jax.Array) -> blocks.Block:
        contracted, _ = self.axes(1 - self.weight_side)
        return tuple(s if a in contracted else 1 for a, s in enumerate(x.shape))

    def place_weight_scale(self, scale: jax.Array, q: QTensor, x: jax.Array, extra: tuple) -> Any:
        return on_output(scale, q.shape, q.block, self, self.weight_side, x.ndim)

    def place_x_scale(self, scale: jax.Array, x: jax.Array, q: Quantized) -> jax.Array:
        return on_output(scale, x.shape, self.token(x), self, 1 - self.weight_side, q.ndim)


class RaggedDot(NamedTuple):
    """`lax.ragged_dot`: rows `[m, k]` by experts `[g, k, n]`; `extra` holds the group sizes."""

    precision: Any
    out_dtype: np.dtype

    def contracted(self) -> Axes:
        return (1,)

    def features(self, axes: Axes) -> Axes | None:
        return (1,) if axes == (1,) else None

    def stacked(self, count: int) -> Axes | None:
        return (0,) * count if count < 2 else None

    def rows(self, x: jax.Array) -> Axes:
        return (0,)

    def per_row(self, leaf: jax.Array, x: jax.Array, extra: tuple) -> jax.Array:
        """What every row of x sees of `leaf` `[experts, ...]`."""
        ends = jnp.cumsum(extra[0])
        rows = jnp.arange(x.shape[0], dtype=ends.dtype)
        expert = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
        return jnp.take(leaf, expert, axis=0, mode="clip")

    def __call__(self, x: jax.Array, w: jax.Array, extra: tuple, preferred: Any) -> jax.Array:
        return lax.ragged_dot(
            x, w, extra[0], precision=self.precision, preferred_element_type=preferred
        )

    def token(self, x: jax.Array) -> blocks.Block:
        return (1, x.shape[1])

    def place_weight_scale(self, scale: jax.Array, q: QTensor, x: jax.Array, extra: tuple) -> Any:
        groups, _, n = q.shape
        return self.per_row(blocks.expand(scale, (groups, 1, n), q.block)[:, 0], x, extra)

    def place_x_scale(self, scale: jax.Array, x: jax.Array, q: Quantized) -> jax.Array:
        return scale


def is_rows_by_experts(params: Mapping[str, Any]) -> bool:
    """Whether a `ragged_dot_general` is one of rows `[m, k]` by experts `[g, k, n]`."""
    plain = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    return params["ragged_dot_dimension_numbers"] == plain and not params["group_offset"]


class Conv(NamedTuple):
    """A `lax.conv_general_dilated` whose kernel is a QTensor; a token is one of the batch."""

    dimension_numbers: lax.ConvDimensionNumbers
    options: tuple[tuple[str, Any], ...]
    out_dtype: np.dtype

    def contracted(self) -> Axes:
        return tuple(sorted(self.dimension_numbers.rhs_spec[1:]))

    def features(self, axes: Axes) -> Axes | None:
        channels = axes == (self.dimension_numbers.rhs_spec[1],)
        whole = dict(self.options)["feature_group_count"] == 1
        return (self.dimension_numbers.lhs_spec[1],) if channels and whole else None

    def stacked(self, count: int) -> Axes | None:
        return None if count else ()

    def rows(self, x: jax.Array) -> Axes:
        return tuple(a for a in range(x.ndim) if a != self.dimension_numbers.lhs_spec[1])

    def per_row(self, leaf: jax.Array, x: jax.Array, extra: tuple) -> jax.Array:
        return leaf

    def __call__(self, x: jax.Array, w: jax.Array, extra: tuple, preferred: Any) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            dimension_numbers=self.dimension_numbers,
            preferred_element_type=preferred,
            **dict(self.options),
        )

    def token(self, x: jax.Array) -> blocks.Block:
        batch = self.dimension_numbers.lhs_spec[0]
        return tuple(1 if a == batch else s for a, s in enumerate(x.shape))

    def place_weight_scale(self, scale: jax.Array, q: QTensor, x: jax.Array, extra: tuple) -> Any:
        out = self.dimension_numbers.rhs_spec[0]
        full = [s if a == out else 1 for a, s in enumerate(q.shape)]
        flat = blocks.expand(scale, full, q.block).reshape(-1)
        return self._along(flat, self.dimension_numbers.out_spec[1], x.ndim)

    def place_x_scale(self, scale: jax.Array, x: jax.Array, q: Quantized) -> jax.Array:
        return self._along(scale.reshape(-1), self.dimension_numbers.out_spec[0], x.ndim)

    @staticmethod
    def _along(flat: jax.Array, axis: int, ndim: int) -> jax.Array:
        return flat.reshape([-1 if a == axis else 1 for a in range(ndim)])


Op = Dot | RaggedDot | Conv


def on_output(
    scale: jax.Array,
    shape: Sequence[int],
    block: blocks.Block,
    dot: Dot,
    side: int,
    other_ndim: int,
    groups: Axes = (),
) -> jax.Array:
    """Per-block scales of the operand on `side`, shaped to broadcast against the result of `dot`.

    The batch axes of the result are followed by the axes `groups` of the operand; along its other
    contracted axes it must have one block.
    """
    contracted, batch = dot.axes(side)
    rest = [a for a in contracted if a not in groups]
    free = [a for a in range(len(shape)) if a not in contracted and a not in batch]
    scale = blocks.expand(scale, [1 if a in contracted else s for a, s in enumerate(shape)], block)
    order = (*batch, *groups, *free)
    if list(order) != sorted(order):
        scale = lax.transpose(scale, (*order, *rest))
        order = tuple(range(len(order)))
    sizes = [scale.shape[a] for a in order]
    first = len(batch) + len(groups)
    ones = (1,) * (other_ndim - len(contracted) - len(batch))
    after = (*sizes[first:], *ones) if side == 0 else (*ones, *sizes[first:])
    return lax.reshape(scale, (*sizes[:first], *after))
