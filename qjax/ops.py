"""Matmuls and lookups on QTensors."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks, structural
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.qtensor import QTensor, check, dequantize
from qjax.rounding import SCALE_METHODS
from qjax.spec import Spec

Axes = tuple[int, ...]


class Dot(NamedTuple):
    """A `lax.dot_general` with a QTensor on side 0 or 1; hashable."""

    dimension_numbers: Any
    weight_side: int
    precision: Any
    out_dtype: np.dtype

    def axes(self, side: int) -> tuple[Axes, Axes]:
        """(contracted, batch) axes of the operand on `side`."""
        contract, batch = self.dimension_numbers
        return tuple(contract[side]), tuple(batch[side])

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
    constant = _constant_along(q, dot)
    if q.activation is not None:
        spec = q.activation.spec
        how = "scales after" if constant else "scales per group"
        return _dynamic_dot(x, q, dot, spec), f"{spec}_token dot, {how}"
    if constant and q.zero_point is None and q.offset is None:
        fmt = FORMATS[q.format]
        y = dot(x, fmt.decode(join_planes(fmt, q.qvalue), jnp.dtype(q.dtype)), jnp.float32)
        return (y * _weight_scale(q, dot, x.ndim)).astype(
            dot.out_dtype
        ), "dot on codes, scale after"
    y = dot(x, dequantize(q), dot.out_dtype)
    return y.astype(dot.out_dtype), "dequantize in the graph, dot"


def _constant_along(q: QTensor, dot: Dot) -> bool:
    """Whether one scale holds for all contracted elements of an output."""
    if q.param_shape is not None:
        return False
    block = structural.block_of(q)
    return all(block[a] >= q.shape[a] for a in dot.axes(dot.weight_side)[0])


def _weight_scale(q: QTensor, dot: Dot, x_ndim: int, groups: Axes = ()) -> jax.Array:
    scale = dequantize(q.scale) if isinstance(q.scale, QTensor) else q.scale
    scale = scale.astype(jnp.float32)
    return _on_output(scale, q.shape, q.block, dot, dot.weight_side, x_ndim, groups)


def _on_output(
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
    scale = lax.transpose(scale, (*batch, *groups, *free, *rest))
    first = len(batch) + len(groups)
    ones = (1,) * (other_ndim - len(contracted) - len(batch))
    own = scale.shape[first : first + len(free)]
    after = (*own, *ones) if side == 0 else (*ones, *own)
    return scale.reshape((*scale.shape[:first], *after))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _dynamic_dot(x: jax.Array, q: QTensor, dot: Dot, spec: Spec) -> jax.Array:
    """`x` rounded per token to `spec`, times the codes of q; sums in int32 for integers.

    Straight-through: the tangent of x is `t @ dequantize(q)`.
    """
    side = 1 - dot.weight_side
    contracted, _ = dot.axes(side)
    token = tuple(s if a in contracted else 1 for a, s in enumerate(x.shape))
    rounded = SCALE_METHODS[spec.scale_method](x.astype(jnp.float32), spec, token, token)
    x_scale: Any = rounded.scale
    x_codes: Any = split_planes(FORMATS[spec.format], rounded.codes)
    codes = join_planes(FORMATS[q.format], q.qvalue)
    accumulator = jnp.float32
    if spec.format.startswith("int"):
        accumulator, codes = jnp.int32, FORMATS[q.format].decode(codes, jnp.dtype(jnp.int8))
    if _constant_along(q, dot):
        y = dot(x_codes, codes, accumulator).astype(jnp.float32) * _weight_scale(q, dot, x.ndim)
    else:
        y = _grouped_dot(x_codes, codes, q, dot, accumulator)
    scale = _on_output(x_scale, x.shape, token, dot, side, q.ndim)
    return (y * scale).astype(dot.out_dtype)


@_dynamic_dot.defjvp
def _dynamic_dot_jvp(
    dot: Dot, spec: Spec, primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    x, q = primals
    tangent = dot(tangents[0], dequantize(q), dot.out_dtype).astype(dot.out_dtype)
    return _dynamic_dot(x, q, dot, spec), tangent


def _grouped_dot(x: Any, w: jax.Array, q: QTensor, dot: Dot, accumulator: Any) -> jax.Array:
    """One dot per group of the contraction, each scaled, then summed.

    sum_g (x_g @ codes_g) * scale_g: every blocked contracted axis is cut in two, (groups, block),
    padded with zeros where ragged; its groups become a batch axis.
    """
    block, side = structural.block_of(q), dot.weight_side
    (w_contract, w_batch), (x_contract, x_batch) = dot.axes(side), dot.axes(1 - side)
    pairs = list(zip(w_contract, x_contract, strict=True))
    cut = {wa: block[wa] for wa in w_contract if block[wa] < q.shape[wa]}
    w, w_at = _cut_axes(w, cut)
    x, x_at = _cut_axes(x, {xa: cut[wa] for wa, xa in pairs if wa in cut})
    contract = [(w_at[wa] + (wa in cut), x_at[xa] + (wa in cut)) for wa, xa in pairs]
    batch = [(w_at[wa], x_at[xa]) for wa, xa in zip(w_batch, x_batch, strict=True)]
    batch += [(w_at[wa], x_at[xa]) for wa, xa in pairs if wa in cut]
    sides = [tuple(zip(*p, strict=True)) or ((), ()) for p in (contract, batch)]
    numbers = tuple(s if side == 0 else s[::-1] for s in sides)
    y = dot._replace(dimension_numbers=numbers)(x, w, accumulator).astype(jnp.float32)
    groups = tuple(wa for wa in w_contract if wa in cut)
    y = y * _weight_scale(q, dot, x.ndim - len(groups), groups)
    return y.sum(range(len(w_batch), len(w_batch) + len(groups)))


def _cut_axes(x: jax.Array, block: dict[int, int]) -> tuple[jax.Array, list[int]]:
    """Cuts each axis in `block` in two, (groups, block); also where each old axis now begins."""
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
    rows = structural.take(q, indices, dims, slice_sizes, mode)
    return dequantize(rows), "look up codes, dequantize rows"
