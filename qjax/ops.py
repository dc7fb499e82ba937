"""Matmuls and lookups on QTensors."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks, structural
from qjax.formats import FORMATS, join_planes
from qjax.qtensor import QTensor, check, dequantize
from qjax.rounding import SCALE_METHODS
from qjax.spec import Spec


class Dot(NamedTuple):
    """A `lax.dot_general` with a QTensor on one side; hashable."""

    dimension_numbers: Any
    weight_side: int
    precision: Any
    out_dtype: np.dtype

    @property
    def weight_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(contracted, batch) axes of the weight."""
        contract, batch = self.dimension_numbers
        return tuple(contract[self.weight_side]), tuple(batch[self.weight_side])

    @property
    def other_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(contracted, batch) axes of the other operand."""
        contract, batch = self.dimension_numbers
        return tuple(contract[1 - self.weight_side]), tuple(batch[1 - self.weight_side])

    def __call__(self, x: jax.Array, w: jax.Array, preferred: Any) -> jax.Array:
        operands = (w, x) if self.weight_side == 0 else (x, w)
        return lax.dot_general(
            *operands,
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=preferred,
        )


def dot_general(x: jax.Array, q: QTensor, dot: Dot) -> tuple[jax.Array, str]:
    """`lax.dot_general` of an array and a QTensor, and the name of the path it took.

    Scales that are constant along the contraction are applied to the result; all others to the
    weight before it. An `Activation` quantizes x while it runs.
    """
    check(q)
    if q.activation is not None:
        spec = q.activation.spec
        return _dynamic_dot(x, q, dot, spec), f"{spec}_token dot" + (
            ", scales after" if _constant_along(q, dot) else " per group"
        )
    if _constant_along(q, dot) and q.zero_point is None and q.offset is None:
        fmt = FORMATS[q.format]
        codes = fmt.decode(join_planes(fmt, q.qvalue), jnp.dtype(q.dtype))
        y = dot(x, codes, jnp.float32) * _on_output(_scale(q), q, dot, x.ndim)
        return y.astype(dot.out_dtype), "dot on codes, scale after"
    return dot(x, dequantize(q), dot.out_dtype).astype(
        dot.out_dtype
    ), "dequantize in the graph, dot"


def _scale(q: QTensor) -> jax.Array:
    scale = dequantize(q.scale) if isinstance(q.scale, QTensor) else q.scale
    return scale.astype(jnp.float32)


def _constant_along(q: QTensor, dot: Dot) -> bool:
    """Whether one scale holds for all contracted elements of an output."""
    block = structural.block_of(q) if q.param_shape is None else ()
    return bool(block) and all(block[a] >= q.shape[a] for a in dot.weight_axes[0])


def _on_output(
    per_block: jax.Array, q: QTensor, dot: Dot, x_ndim: int, groups: tuple[int, ...] = ()
) -> jax.Array:
    """Scales shaped to broadcast against the result of `dot`, whose batch axes are followed by the
    axes `groups` of q.

    Along its other contracted axes q must have one block.
    """
    contracted, batch = dot.weight_axes
    rest = [a for a in contracted if a not in groups]
    free = [a for a in range(q.ndim) if a not in contracted and a not in batch]
    full = blocks.expand(
        per_block, [1 if a in contracted else s for a, s in enumerate(q.shape)], q.block
    )
    moved = lax.transpose(full, (*batch, *groups, *free, *rest))
    first = len(batch) + len(groups)
    return _place(
        moved.shape[:first],
        moved.shape[first : first + len(free)],
        moved,
        dot.weight_side,
        x_ndim - len(contracted) - len(batch),
    )


def _place(
    batch: tuple[int, ...], free: tuple[int, ...], scale: jax.Array, side: int, other_free: int
) -> jax.Array:
    ones = (1,) * other_free
    return scale.reshape((*batch, *free, *ones) if side == 0 else (*batch, *ones, *free))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _dynamic_dot(x: jax.Array, q: QTensor, dot: Dot, spec: Spec) -> jax.Array:
    """`x` rounded per token to `spec`, times the codes; accumulated in int32 for integers and
    float32 for FP8.

    Straight-through: the tangent of x is `t @ dequantize(q)`.
    """
    contracted, batch = dot.other_axes
    block = tuple(s if a in contracted else 1 for a, s in enumerate(x.shape))
    rounded = SCALE_METHODS[spec.scale_method](x.astype(jnp.float32), spec, block, block)
    fmt = FORMATS[q.format]
    codes = join_planes(fmt, q.qvalue)
    x_free = [a for a in range(x.ndim) if a not in contracted and a not in batch]
    x_scale = lax.transpose(rounded.scale.astype(jnp.float32), (*batch, *x_free, *contracted))
    x_scale = _place(
        tuple(x.shape[a] for a in batch),
        tuple(x.shape[a] for a in x_free),
        x_scale,
        1 - dot.weight_side,
        q.ndim - len(contracted) - len(batch),
    )
    if spec.format.startswith("int"):
        accumulator, weight = jnp.int32, fmt.decode(codes, jnp.dtype(jnp.int8))
    else:
        accumulator, weight = jnp.float32, codes
    x_codes = rounded.codes.astype(FORMATS[spec.format].storage)
    if _constant_along(q, dot):
        y = dot(x_codes, weight, accumulator).astype(jnp.float32) * _on_output(
            _scale(q), q, dot, x.ndim
        )
    else:
        y = _grouped_dot(x_codes, weight, q, dot, accumulator)
    return (y * x_scale).astype(dot.out_dtype)


@_dynamic_dot.defjvp
def _dynamic_dot_jvp(
    dot: Dot, spec: Spec, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    x, q = primals
    return _dynamic_dot(x, q, dot, spec), dot(tangents[0], dequantize(q), dot.out_dtype).astype(
        dot.out_dtype
    )


def _grouped_dot(x: jax.Array, w: jax.Array, q: QTensor, dot: Dot, accumulator: Any) -> jax.Array:
    """One dot per group of the contraction, each scaled, then summed: sum_g (x_g @ codes_g) *
    scale_g.

    Every blocked contracted axis is cut in two, (groups, block), padded with zeros where ragged;
    its groups become a batch axis.
    """
    block, pairs = (
        structural.block_of(q),
        list(zip(dot.weight_axes[0], dot.other_axes[0], strict=True)),
    )
    grouped = {wa: block[wa] for wa, _ in pairs if block[wa] < q.shape[wa]}
    w, w_at = _cut_axes(w, grouped)
    x, x_at = _cut_axes(x, {xa: grouped[wa] for wa, xa in pairs if wa in grouped})
    contract = [(w_at[wa] + (wa in grouped), x_at[xa] + (wa in grouped)) for wa, xa in pairs]
    batch = list(
        zip(
            (w_at[a] for a in dot.weight_axes[1]), (x_at[a] for a in dot.other_axes[1]), strict=True
        )
    )
    batch += [(w_at[wa], x_at[xa]) for wa, xa in pairs if wa in grouped]
    order = (lambda p: p) if dot.weight_side == 0 else (lambda p: p[::-1])
    numbers = tuple(order(tuple(zip(*p, strict=True)) or ((), ())) for p in (contract, batch))
    y = dot._replace(dimension_numbers=numbers)(x, w, accumulator).astype(jnp.float32)
    groups = tuple(wa for wa, _ in pairs if wa in grouped)
    y = y * _on_output(_scale(q), q, dot, x.ndim - len(groups), groups)
    first = len(dot.weight_axes[1])
    return y.sum(range(first, first + len(groups)))


def _cut_axes(x: jax.Array, block: dict[int, int]) -> tuple[jax.Array, list[int]]:
    """Cuts each axis in `block` into (groups, block); also returns where every old axis begins in
    the new shape.
    """
    x = jnp.pad(x, [(0, -s % block.get(a, 1)) for a, s in enumerate(x.shape)])
    shape, at = [], []
    for a, s in enumerate(x.shape):
        at.append(len(shape))
        shape += [s // block[a], block[a]] if a in block else [s]
    return x.reshape(shape), at


def take(
    q: QTensor, indices: jax.Array, dims: lax.GatherDimensionNumbers, slice_sizes: Any, mode: Any
) -> tuple[jax.Array, str]:
    """Looks up rows of codes and dequantizes only those."""
    check(q)
    return dequantize(
        structural.take(q, indices, dims, slice_sizes, mode)
    ), "look up codes, dequantize rows"
