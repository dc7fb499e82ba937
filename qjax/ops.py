"""Matmuls and lookups on QTensors."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import (
    activation,
    blocks,
    prepared_products,
    prepared_structural,
    rounded_products,
    structural,
)
from qjax.activation import Activation
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.prepared import Prepared
from qjax.products import Conv, Dot, Op, RaggedDot, on_output
from qjax.qtensor import QTensor, Quantized, dequantize
from qjax.spec import Spec


def linear(x: jax.Array, q: Quantized, op: Op, extra: tuple = ()) -> tuple[jax.Array, str]:
    """A matmul or convolution of an array and a weight, and the name of the path it took.

    A prepared weight runs on the kernel that `pallas_kernels.dispatch` chooses. Otherwise scales
    that are constant along the contraction are applied to the result; all others to the weight
    before it. An `Activation` brings x into the coordinates of the weight, and quantizes it.
    """
    if isinstance(q, Prepared):
        return _prepared_linear(x, q, op, extra)
    assert isinstance(q, QTensor)
    name = {Dot: "dot", RaggedDot: "ragged dot", Conv: "convolution"}[type(op)]
    if activation.changes_coordinates(q.activation):
        changed = _in_coordinates(x, q, op, extra)
        if changed is None:
            y = op(x, dequantize(q), extra, op.out_dtype)
            return lax.convert_element_type(y, op.out_dtype), f"dequantize in the graph, {name}"
        x, q = changed
        y, how = linear(x, q, op, extra)
        return y, f"x in the weight's coordinates, {how}"
    act = q.activation
    if act is not None and act.spec is not None and _static_fits(act, op):
        outliers = "" if act.threshold is None else f", outliers from {act.threshold:g} apart"
        outliers += f", {act.budget} at once" if _gathers(q, op) else ""
        how = f"{_rounding(act)} {name}, {_way(q, op)}{outliers}"
        return _dynamic_once(x, q, extra, op), how
    if _way(q, op) == "scales after":
        fmt = FORMATS[q.format]
        codes = fmt.decode(join_planes(fmt, q.qvalue), jnp.dtype(q.dtype))
        scale = op.place_weight_scale(_scale(q), q, x, extra)
        y = times(op(x, codes, extra, jnp.float32), scale)
        return lax.convert_element_type(y, op.out_dtype), f"{name} on codes, scale after"
    y = op(x, dequantize(q), extra, op.out_dtype)
    return lax.convert_element_type(y, op.out_dtype), f"dequantize in the graph, {name}"


def _in_coordinates(
    x: jax.Array, q: QTensor, op: Op, extra: tuple
) -> tuple[jax.Array, QTensor] | None:
    """Both in the coordinates in which q is held; None if they are not those of the matmul."""
    act = q.activation
    assert act is not None
    lead, axes = activation.weight_axes(act, q.ndim)
    stacked, features = op.stacked(len(lead)), op.features(axes)
    if stacked is None or features is None:
        return None
    leaves = activation.coordinates(act)
    rows = {n: op.per_row(v, x, extra) if lead else v for n, v in leaves.items()}
    x = activation.on_input(dataclasses.replace(act, **rows), x, stacked, features)
    return x, dataclasses.replace(q, activation=activation.quantizing(act))


def _static_fits(act: Activation, op: Op) -> bool:
    return act.scale is None or op.stacked(act.scale.ndim) is not None


def _way(q: QTensor, op: Op) -> str:
    """How a matmul on quantized activations comes by the scales of the weight."""
    if q.zero_point is None and q.offset is None:
        if _constant_along(q, op):
            return "scales after"
        if q.param_shape is None and isinstance(op, Dot) and op.out_sharding is None:
            return "scales per group"
    return "on dequantized weights"


def _constant_along(q: QTensor, op: Op) -> bool:
    """Whether one scale holds for all contracted elements of an output."""
    if q.param_shape is not None:
        return False
    block = structural.block_of(q)
    return all(block[a] >= q.shape[a] for a in op.contracted())


def _scale(q: QTensor) -> jax.Array:
    scale = dequantize(q.scale) if isinstance(q.scale, QTensor) else q.scale
    return lax.convert_element_type(scale, jnp.float32)


def times(y: jax.Array, scale: jax.Array) -> jax.Array:
    """`y * scale`, broadcast by lax: a model has hundreds of these, and jnp's cost a jit each."""
    return lax.mul(y, lax.broadcast_in_dim(scale, y.shape, range(y.ndim)))


def _prepared_linear(x: jax.Array, p: Prepared, op: Op, extra: tuple) -> tuple[jax.Array, str]:
    reason = prepared_products.unfit(x, p, op)
    if reason is None and isinstance(op, RaggedDot):
        return prepared_products.experts(x, p, op, extra)
    if reason is not None or not isinstance(op, Dot):
        y = op(x, dequantize(p), extra, op.out_dtype)
        return lax.convert_element_type(y, op.out_dtype), f"dequantized in the call: {reason}"
    act = p.activation
    rounds = act is not None and act.spec is not None
    if rounds and rounded_products.serves(p):
        how = rounded_products.path(x, p, op)
    else:
        how = prepared_products.path(prepared_products.problem_of(x, p, op), p)
    if act is None or not rounds:
        return prepared_products.product(x, p, op, op.out_dtype), how
    return _dynamic(x, p, extra, op), f"{_rounding(act)}, {how}"


def _rounding(act: Activation) -> str:
    """What becomes of x, in words."""
    assert act.spec is not None
    tensor = "token" if act.spec.block is None else "tensor"
    scaled = "static" if act.scale is not None else tensor
    return f"{act.spec.format}_{scaled}"


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _dynamic(x: jax.Array, q: Any, extra: tuple, op: Op) -> jax.Array:
    """`x` rounded as the activation of q says, times q; sums in int32 for integers.

    Straight-through: the tangent of x is that of the product with `dequantize(q)`.
    """
    act, whole, outlier, everywhere = q.activation, x, None, None
    assert act is not None
    assert act.spec is not None
    if act.threshold is not None:
        outlier = jnp.any(jnp.abs(x) >= act.threshold, axis=op.rows(x), keepdims=True)
        everywhere = outlier | jnp.zeros_like(x, bool)  # sharded as x, where that is Explicit
        x = jnp.where(everywhere, jnp.zeros_like(x), x)
    x_codes, x_scale = _codes_of(x.astype(jnp.float32), act, op, extra)
    on_kernel = isinstance(q, Prepared)
    if on_kernel and rounded_products.serves(q):
        assert isinstance(op, Dot)
        beside = () if outlier is None else (whole, outlier)
        return rounded_products.product(x_codes, x_scale, *beside, p=q, dot=op)
    way = "on the kernel" if on_kernel else _way(q, op)
    if on_kernel:
        assert isinstance(op, Dot)
        x_codes = x_codes if x_codes.dtype == jnp.int8 else x_codes.astype(jnp.float32)
        y = prepared_products.product(x_codes, q, op, jnp.float32)
    elif way == "on dequantized weights":
        y = op(x_codes.astype(jnp.float32), dequantize(q).astype(jnp.float32), extra, jnp.float32)
    else:
        x_codes, codes, accumulator = _operands(x_codes, q)
        if way == "scales after":
            y = op(x_codes, codes, extra, accumulator).astype(jnp.float32)
            y = times(y, op.place_weight_scale(_scale(q), q, x, extra))
        else:
            assert isinstance(op, Dot)
            y = _grouped_dot(x_codes, codes, q, op, accumulator)
    y = times(y, op.place_x_scale(x_scale, x, q))
    if everywhere is not None:
        apart = jnp.where(everywhere, whole, jnp.zeros_like(whole))
        y = y + _outliers(apart.astype(jnp.float32), q, op, extra)
    return y.astype(op.out_dtype)


@_dynamic.defjvp
def _dynamic_jvp(op: Op, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    x, q, extra = primals
    tangent = op(tangents[0], dequantize(q), extra, op.out_dtype).astype(op.out_dtype)
    return _dynamic(x, q, extra, op), tangent


@functools.partial(jax.jit, static_argnums=3)
def _dynamic_once(x: jax.Array, q: QTensor, extra: tuple, op: Op) -> jax.Array:
    """`_dynamic`, traced and lowered once for all uses of its shapes: a model has hundreds."""
    return _dynamic(x, q, extra, op)


def _outliers(x: jax.Array, q: Quantized, op: Op, extra: tuple) -> jax.Array:
    """The product with x, zero but for its outlier features, in float32."""
    if not (isinstance(q, QTensor) and _gathers(q, op)):
        return op(x, dequantize(q).astype(jnp.float32), extra, jnp.float32)
    assert isinstance(op, Dot)
    assert q.activation is not None
    assert q.activation.budget is not None
    (w_axis,), (x_axis,) = op.contracted(), op.axes(1 - op.weight_side)[0]
    fmt, size, budget = FORMATS[q.format], x.shape[x_axis], q.activation.budget
    codes = join_planes(fmt, q.qvalue)
    found = jnp.any(x != 0, axis=op.rows(x))

    def of(x: jax.Array, codes: jax.Array) -> jax.Array:
        return op(x, fmt.decode(codes, jnp.dtype(jnp.float32)), extra, jnp.float32)

    def gathered() -> jax.Array:
        (at,) = jnp.nonzero(found, size=budget, fill_value=size)
        columns = jnp.take(x, at, axis=x_axis, mode="fill", fill_value=0)
        return of(columns, jnp.take(codes, at, axis=w_axis, mode="clip"))

    y = lax.cond(jnp.sum(found) <= budget, gathered, lambda: of(x, codes))
    return times(y, op.place_weight_scale(_scale(q), q, x, extra))


def _gathers(q: QTensor, op: Op) -> bool:
    """Whether outlier features are gathered: where there is one row of codes to each."""
    act = q.activation
    return (
        act is not None
        and act.budget is not None
        and isinstance(op, Dot)
        and op.out_sharding is None
        and _way(q, op) == "scales after"
        and len(op.contracted()) == 1
        and not op.axes(op.weight_side)[1]
        and act.budget < q.shape[op.contracted()[0]]
    )


def _codes_of(x: jax.Array, act: Activation, op: Op, extra: tuple) -> tuple[Any, jax.Array]:
    """Codes of x, and their scale, which broadcasts against x."""
    spec, token = act.spec, op.token(x)
    assert spec is not None
    fmt = FORMATS[spec.format]
    if act.scale is None:
        return _rounded(x, spec, token if spec.block is None else x.shape)
    axes = op.stacked(act.scale.ndim)
    assert axes is not None
    scale = op.per_row(act.scale, x, extra) if axes else act.scale
    scale = jnp.moveaxis(scale, range(len(axes)), np.argsort(np.argsort(axes)).tolist())
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    scale = scale.astype(jnp.float32).reshape(shape)
    codes = split_planes(fmt, fmt.encode(x / scale))
    within = tuple(a for a, b in enumerate(token) if b > 1)
    lost = jnp.any(jnp.isnan(x), axis=within, keepdims=True)  # no integer code says NaN
    return codes, jnp.where(lost, jnp.nan, jnp.broadcast_to(scale, lost.shape))


@functools.partial(jax.jit, static_argnums=(1, 2))  # a model has hundreds: traced and lowered once
def _rounded(x: jax.Array, spec: Spec, block: blocks.Block) -> tuple[Any, jax.Array]:
    """As `quantize`, but the scale is max|x| * (1 / largest code): XLA fuses a product for free."""
    fmt = FORMATS[spec.format]
    top = blocks.largest(x, block)
    inverse = fmt.max / jnp.where(top < fmt.max * _TINY, jnp.inf, top)
    codes = blocks.apply(lambda v, s: fmt.encode(v * s), x, block, inverse)
    return split_planes(fmt, codes), jnp.where(jnp.isfinite(top), top * (1 / fmt.max), jnp.nan)


_TINY = float(jnp.finfo(jnp.float32).tiny)


def _operands(x_codes: Any, q: QTensor) -> tuple[Any, jax.Array, Any]:
    """Codes of x and of q in dtypes that a matmul takes, and the dtype of its sums."""
    fmt = FORMATS[q.format]
    codes = join_planes(fmt, q.qvalue)
    integers = jnp.issubdtype(x_codes.dtype, jnp.integer)
    if integers and fmt.integer and fmt.min >= -128 and fmt.max <= 127:
        return x_codes, fmt.decode(codes, jnp.dtype(jnp.int8)), jnp.int32
    if not integers and jnp.issubdtype(codes.dtype, jnp.floating):
        return x_codes, codes, jnp.float32  # both FP8: what the device multiplies
    return x_codes.astype(jnp.float32), fmt.decode(codes, jnp.dtype(jnp.float32)), jnp.float32


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
    y = dot._replace(dimension_numbers=numbers)(x, w, (), accumulator).astype(jnp.float32)
    groups = tuple(wa for wa in w_contract if wa in cut)
    y = times(y, on_output(_scale(q), q.shape, q.block, dot, side, x.ndim - len(groups), groups))
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
    q: Quantized, indices: jax.Array, dims: lax.GatherDimensionNumbers, slice_sizes: Any, mode: Any
) -> tuple[jax.Array, str]:
    """Looks up rows of codes and dequantizes only those."""
    if isinstance(q, Prepared):
        rows = prepared_structural.take(q, indices, dims, slice_sizes, mode)
        return rows, f"look up codes, dequantize rows, on {q.layout}"
    assert isinstance(q, QTensor)
    rows = structural.take(q, indices, dims, slice_sizes, mode)
    return dequantize(rows), "look up codes, dequantize rows"
