"""quantize: one weight, one Spec, one QTensor."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax import blocks
from qjax.formats import FORMATS, split_planes
from qjax.qtensor import Activation, QTensor
from qjax.rounding import SCALE_METHODS
from qjax.spec import Spec


def quantize(w: jax.Array, spec: Spec | str, axis: int | Sequence[int], *, batch_axis: int | Sequence[int] = ()) -> QTensor:
    """Rounds a weight to nearest in the format, blocks and scale dtype of `spec`.

    Symmetric integers: scale = max|w| / (2^(N-1) - 1), codes = clip(round(w / scale), -2^(N-1), 2^(N-1) - 1). NF4 and FP8:
    scale = max|w| / largest value of the format, codes = nearest. Asymmetric: scale = (max - min) / (2^N - 1), offset = min.
    A scale is rounded to `spec.scale_dtype` before the first code is chosen (double-quantized scales excepted: as in QLoRA the
    codes come from the exact scales).

    Args:
      w: floating-point array of any shape.
      spec: a Spec or its string, such as "int4_g128".
      axis: the axis or axes that the matmul contracts. Groups run along the last of them and restart at each index of the
        others.
      batch_axis: axes of stacked weights (layers, experts); no block ever spans them.

    Returns:
      A QTensor of the shape and dtype of `w`. A block of zeros, or one whose scale would be below the smallest normal number,
      decodes to zeros.

    Raises:
      ValueError: if `w` is not floating point or holds NaN or Inf (under jit such blocks decode to NaN instead), or if an axis is
        out of range.

    Example:
      >>> q = quantize(jnp.ones((256, 64)), "int4_g128", axis=0)
      >>> q.qvalue.dtype.name, q.scale.shape, q.scale.dtype.name
      ('int4', (2, 64), 'bfloat16')
    """
    spec = Spec.parse(spec)
    if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
        raise ValueError(f"quantize needs a floating-point array, got {jnp.result_type(w)} of shape {jnp.shape(w)}")
    contracted, batch = (_axes(a, jnp.ndim(w)) for a in (axis, batch_axis))
    if not contracted or set(contracted) & set(batch):
        raise ValueError(f"axis {axis} and batch_axis {batch_axis} of shape {jnp.shape(w)}: give at least one contracted axis, and none twice")
    q = _quantize(w, spec, contracted, batch)
    if not isinstance(w, jax.core.Tracer) and 0 not in q.shape:
        bad = int(_count_bad(q.scale.scale if isinstance(q.scale, QTensor) else q.scale))
        if bad:
            raise ValueError(f"the array of shape {jnp.shape(w)} holds {int(_count_bad(w))} NaN or Inf value(s); quantize needs finite weights")
    return q


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(w: jax.Array, spec: Spec, contracted: tuple[int, ...], batch: tuple[int, ...]) -> QTensor:
    block = block_of(spec, w.shape, contracted, batch)
    return _round(w.astype(jnp.float32), spec, block, contracted, batch, np.dtype(w.dtype))


def _round(w: jax.Array, spec: Spec, block: blocks.Block, contracted: tuple[int, ...], batch: tuple[int, ...], dtype: np.dtype) -> QTensor:
    whole = tuple(1 if a in batch else max(s, 1) for a, s in enumerate(w.shape))
    rounded = SCALE_METHODS[spec.scale_method](w, spec, block, whole)
    scale = rounded.scale
    if spec.scale_spec is not None:
        inner = _run_block(scale.shape, spec.scale_spec.block, contracted, batch)
        scale = _round(scale.astype(jnp.float32), spec.scale_spec, inner, contracted, batch, np.dtype(scale.dtype))
    activation = None if spec.activation is None else Activation(spec.activation)
    codes = split_planes(FORMATS[spec.format], rounded.codes)
    return QTensor(codes, scale, rounded.zero_point, rounded.offset, activation, spec.format, blocks.trim(block), dtype)


def block_of(spec: Spec, shape: Sequence[int], contracted: Sequence[int], batch: Sequence[int] = ()) -> blocks.Block:
    """The block, one length per axis, that `spec` means for a weight of `shape`."""
    block = [1] * len(shape)
    free = [a for a in range(len(shape)) if a not in contracted and a not in batch]
    if spec.block is None or spec.block == ():
        for a in (*contracted, *(free if spec.block == () else ())):
            block[a] = max(shape[a], 1)
    elif isinstance(spec.block, int):
        block[contracted[-1]] = min(spec.block, max(shape[contracted[-1]], 1))
    else:
        rows, columns = spec.block
        block[contracted[-1]] = min(rows, max(shape[contracted[-1]], 1))
        if free:
            block[free[-1]] = min(columns, max(shape[free[-1]], 1))
    return tuple(block)


def _run_block(shape: Sequence[int], count: int, contracted: Sequence[int], batch: Sequence[int]) -> blocks.Block:
    """A block of up to `count` scales: as many as fit along the contracted axes, then along the output axes."""
    block = [1] * len(shape)
    free = [a for a in range(len(shape)) if a not in contracted and a not in batch]
    for a in (*reversed(contracted), *reversed(free)):
        block[a] = max(1, min(shape[a], count))
        count //= block[a]
    return tuple(block)


def _axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -ndim <= operator.index(a) < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} axes")
    return tuple(sorted({operator.index(a) % ndim for a in axes}))


@jax.jit
def _count_bad(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))
