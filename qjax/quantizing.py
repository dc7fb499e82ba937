"""quantize: one weight, one Spec, one QTensor."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax import blocks
from qjax.formats import FORMATS, split_planes
from qjax.qtensor import Activation, QTensor
from qjax.rounding import SCALE_METHODS
from qjax.scaling import Rounded
from qjax.spec import Spec


def quantize(
    w: jax.Array,
    spec: Spec | str,
    axis: int | Sequence[int],
    *,
    batch_axis: int | Sequence[int] = (),
) -> QTensor:
    """Rounds a weight to nearest in the format, blocks and scale dtype of `spec`.

    Symmetric integers: scale = max|w| / (2^(N-1) - 1), codes = clip(round(w / scale), -2^(N-1),
    2^(N-1) - 1). Codebooks and floats: scale = max|w| / largest value of the format, codes =
    nearest. Asymmetric: scale = (max - min) / (2^N - 1), offset = min. llama.cpp's types: its own
    rule, to the byte; MX and NVFP4: `qjax.microscaling`. `Spec.scale_method` "mse" searches for
    each block's clip. A scale is rounded to `spec.scale_dtype` before the first code is chosen
    (double-quantized scales excepted: as in QLoRA the codes come from the exact scales).

    Args:
      w: floating-point array of any shape.
      spec: a Spec or its string, such as "int4_g128".
      axis: the axis or axes that the matmul contracts. Groups run along the last of them and
        restart at each index of the others.
      batch_axis: axes of stacked weights (layers, experts); no block ever spans them.

    Returns:
      A QTensor of the shape and dtype of `w`. A block of zeros, or one whose scale would be below
      the smallest normal number, decodes to zeros.

    Raises:
      ValueError: if `w` is not floating point, holds NaN or Inf or values so large that float32
        cannot compute with them (under jit such blocks decode to NaN instead), or if an axis is
        out of range.

    Example:
      >>> q = qjax.quantize(jnp.ones((256, 64)), "int4_g128", axis=0)
      >>> q.qvalue.dtype.name, q.scale.shape, q.scale.dtype.name
      ('int4', (2, 64), 'bfloat16')
    """
    spec = Spec.parse(spec)
    if isinstance(w, QTensor):
        raise ValueError(f"{w!r} is quantized already; give quantize an array (qjax.dequantize)")
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize needs a floating-point array, got {w.dtype} of shape {w.shape}")
    contracted, batch = _axes(axis, w.ndim), _axes(batch_axis, w.ndim)
    if not contracted or len({*contracted, *batch}) < len(contracted) + len(batch):
        raise ValueError(
            f"axis {axis} and batch_axis {batch_axis} of shape {w.shape}: give at least one "
            "contracted axis, and none twice"
        )
    _check_ggml(spec, w.shape[contracted[-1]])
    q = _quantize(w, spec, contracted, batch)
    if not isinstance(w, Tracer) and w.size and _has_bad_scale(q):
        bad = int(_count_bad(w))
        what = f"{bad} NaN or Inf value(s)" if bad else f"values too large for {spec}"
        raise ValueError(
            f"the array of shape {w.shape} holds {what}; quantize needs finite weights"
        )
    return q


def _has_bad_scale(q: QTensor) -> bool:
    """Whether any block was not finite: its scale is NaN (of nested scales, the outermost)."""
    scale = q.scale
    while isinstance(scale, QTensor):
        scale = scale.scale
    return bool(_count_bad(scale))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(
    w: jax.Array, spec: Spec, contracted: tuple[int, ...], batch: tuple[int, ...]
) -> QTensor:
    block = block_of(spec, w.shape, contracted, batch)
    rounded = round_blocks(w.astype(jnp.float32), spec, block, batch)
    return hold(rounded, spec, block, contracted, batch, np.dtype(w.dtype))


def round_blocks(
    w: jax.Array, spec: Spec, block: blocks.Block, batch: tuple[int, ...] = ()
) -> Rounded:
    """Codes and scales of a float32 weight, by the scale method of `spec`."""
    whole = tuple(1 if a in batch else max(s, 1) for a, s in enumerate(w.shape))
    return SCALE_METHODS[spec.scale_method](w, spec, block, whole)


def hold(
    rounded: Rounded,
    spec: Spec,
    block: blocks.Block,
    contracted: tuple[int, ...],
    batch: tuple[int, ...],
    dtype: np.dtype,
) -> QTensor:
    """The QTensor of what a scale method chose, scales held as `spec.scale_spec` says."""

    def per_block(value: Any) -> Any:
        inner = spec.scale_spec
        if value is None or inner is None:
            assert not isinstance(value, Rounded)
            return value
        shape = value.codes.shape if isinstance(value, Rounded) else value.shape
        run = _run_block(shape, inner.block, contracted, batch)
        if not isinstance(value, Rounded):
            value = round_blocks(value, inner, run, batch)
        return hold(value, inner, run, contracted, batch, np.dtype(np.float32))

    return QTensor(
        qvalue=split_planes(FORMATS[spec.format], rounded.codes),
        scale=per_block(rounded.scale),
        zero_point=rounded.zero_point,
        offset=per_block(rounded.offset),
        activation=None if spec.activation is None else Activation(spec.activation),
        format=spec.format,
        block=blocks.trim(block),  # leading axes come and go under scan and vmap
        dtype=dtype,
    )


def block_of(
    spec: Spec, shape: Sequence[int], contracted: Sequence[int], batch: Sequence[int] = ()
) -> blocks.Block:
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


def _run_block(
    shape: Sequence[int], count: Any, contracted: Sequence[int], batch: Sequence[int]
) -> blocks.Block:
    """A block of up to `count` scales: first along the contracted axes, then the output axes.

    `()` stands for all of them.
    """
    count = math.prod(max(s, 1) for s in shape) if count == () else count
    block = [1] * len(shape)
    free = [a for a in range(len(shape)) if a not in contracted and a not in batch]
    for a in (*reversed(contracted), *reversed(free)):
        block[a] = max(1, min(shape[a], count))
        count //= block[a]
    return tuple(block)


def _check_ggml(spec: Spec, size: int) -> None:
    """llama.cpp's blocks are never ragged."""
    if spec.scale_method != "ggml":
        return
    sub = 1 if spec.scale_spec is None else spec.scale_spec.block
    assert isinstance(spec.block, int)
    assert isinstance(sub, int)
    length = spec.block * sub
    if size % length or not size:
        smaller = "q4_0, q5_0, q8_0 and iq4_nl hold 32, " if length > 32 else ""
        raise ValueError(
            f"{spec.format} blocks hold {length} neighbors along the contracted axis, and {size} "
            f"is no multiple of that; {smaller}int4_g{spec.block}, uint4_g{spec.block} and their "
            "like allow any length"
        )


def _axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -ndim <= operator.index(a) < ndim:
            raise ValueError(f"axis {a} is out of range for an array of {ndim} axes")
    return tuple(sorted(operator.index(a) % ndim for a in axes))


@jax.jit
def _count_bad(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x.astype(jnp.float32)))
