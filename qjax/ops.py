"""Matmuls and lookups on QTensors."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.dispatch import choose
from pallas_kernels.quantized_matmul.op import joined_matmul, joins, quantized_matmul
from pallas_kernels.quantized_matmul.partition import part as check_part
from pallas_kernels.quantized_matmul.problem import Problem
from qjax import _compat, activation, blocks, prepared, structural
from qjax.activation import Activation
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.prepared import Prepared
from qjax.qtensor import QTensor, Quantized, dequantize
from qjax.spec import Spec

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
        return _on_output(scale, q.shape, q.block, self, self.weight_side, x.ndim)

    def place_x_scale(self, scale: jax.Array, x: jax.Array, q: Quantized) -> jax.Array:
        return _on_output(scale, x.shape, self.token(x), self, 1 - self.weight_side, q.ndim)


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
    order = (*batch, *groups, *free)
    if list(order) != sorted(order):
        scale = lax.transpose(scale, (*order, *rest))
        order = tuple(range(len(order)))
    sizes = [scale.shape[a] for a in order]
    first = len(batch) + len(groups)
    ones = (1,) * (other_ndim - len(contracted) - len(batch))
    after = (*sizes[first:], *ones) if side == 0 else (*ones, *sizes[first:])
    return lax.reshape(scale, (*sizes[:first], *after))


def _prepared_linear(x: jax.Array, p: Prepared, op: Op, extra: tuple) -> tuple[jax.Array, str]:
    reason = _unfit(x, p, op)
    if reason is None and isinstance(op, RaggedDot):
        return _prepared_experts(x, p, op, extra)
    if reason is not None or not isinstance(op, Dot):
        y = op(x, dequantize(p), extra, op.out_dtype)
        return lax.convert_element_type(y, op.out_dtype), f"dequantized in the call: {reason}"
    how = _path(_problem(x, p, op), p)
    if p.activation is not None and p.activation.spec is not None:
        return _dynamic(x, p, extra, op), f"{_rounding(p.activation)}, {how}"
    return _prepared_dot(x, p, op, op.out_dtype), how


def alike(x: jax.Array, products: Sequence[tuple[Quantized, Dot]]) -> list[int]:
    """Which of these products with x can be one op with the first: prepared weights without layers
    that differ in their channels only.
    """

    def kind(q: Quantized, dot: Dot) -> Any:
        if not isinstance(q, Prepared) or q.lead or q.activation is not None:
            return None
        if _unfit(x, q, dot) is not None or _out_sharding(x, q, dot) is not None:
            return None
        weight = q.local().weight._replace(n=0)
        return q.layout, weight, _order(x, q, dot), dot.out_dtype

    kinds = [kind(q, dot) for q, dot in products]
    return [i for i, k in enumerate(kinds) if k is not None and k == kinds[0]]


def joined(x: jax.Array, products: Sequence[tuple[Any, Dot]]) -> tuple[list[jax.Array], str, bool]:
    """Products that are `alike`, the name of their path, and whether they are one launch."""
    parts = [(p.local(), dot) for p, dot in products]
    problems = [_problem(x, p, dot) for p, dot in parts]
    first, dot = parts[0]
    ys = joined_matmul(
        _as_rows(x, first, dot),
        [p.operands() for p, _ in parts],
        [p.weight for p, _ in parts],
        first.layout,
        out=dot.out_dtype,
    )
    shaped = [_as_result(y, x, p, dot) for y, (p, dot) in zip(ys, parts, strict=True)]
    return shaped, _path(problems[0], first), joins(problems) is None


def _unfit(x: jax.Array, p: Prepared, op: Op) -> str | None:
    """Why a prepared weight cannot be multiplied as it lies."""
    lead = len(p.lead)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the other operand is {x.dtype}"
    if isinstance(op, RaggedDot):
        if p.activation is not None or p.explicit_sharding() is not None or lead != 1:
            return "kernels run experts of plain activations on Auto mesh axes only"
        return None if p.k_axes == (0,) else "it was prepared for another contraction"
    if not isinstance(op, Dot):
        return "kernels run plain matmuls only"
    contracted, batch = op.axes(op.weight_side)
    if any(a >= lead for a in batch):
        return "the matmul runs in parallel over an axis that was prepared as k or n"
    if sorted(contracted) != sorted(lead + a for a in p.k_axes):
        return "it was prepared for another contraction"
    return None


def _problem(x: jax.Array, p: Prepared, dot: Dot) -> Problem:
    """What the kernel is asked for, of one layer."""
    weight, lead = p.local().weight, math.prod(p.lead)
    spec = None if p.activation is None else p.activation.spec
    dtype = x.dtype if spec is None else "int8" if spec.format == "int8" else "float32"
    m = math.prod(x.shape) // max(weight.k * lead, 1)
    return Problem(m, weight, p.layout, jnp.dtype(dtype).name, jnp.dtype(dot.out_dtype).name)


def _path(problem: Problem, p: Prepared) -> str:
    """The implementation and the layout; and what of the weight is packed anew in every call."""
    opened = ", its quantized scales opened in the call" if p.nested else ""
    return f"{choose('quantized_matmul', problem)} on {p.layout}{opened}"


def _prepared_experts(
    x: jax.Array, p: Prepared, op: RaggedDot, extra: tuple
) -> tuple[jax.Array, str]:
    """Rows `[m, k]` by the experts that they belong to; rows beyond the last group are zeros.

    With fewer rows than experts each row is multiplied with its own expert's arrays; else each
    expert that has rows is multiplied with all of them, and its own are kept.
    """
    (sizes,), p = extra, p.local()
    (m, _), (experts,), arrays = x.shape, p.lead, p.operands()
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(m, dtype=ends.dtype)
    owner = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
    one = lambda x, held: quantized_matmul(x, held, p.weight, p.layout, out=op.out_dtype)
    if m < experts:

        def row(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            cut = lambda v: lax.dynamic_index_in_dim(v, pair[1], keepdims=False)
            y = one(pair[0][None], jax.tree.map(cut, arrays))[0]
            return jnp.where(pair[1] < experts, y, jnp.zeros_like(y))

        y = lax.map(row, (x, owner))
    else:

        def step(y: jax.Array, expert: Any) -> tuple[jax.Array, None]:
            number, size, held = expert
            run = lambda: jnp.where((owner == number)[:, None], one(x, held), y)
            return lax.cond(size > 0, run, lambda: y), None

        start = jnp.zeros((m, p.weight.n), op.out_dtype)
        y, _ = lax.scan(step, start, (jnp.arange(experts, dtype=jnp.int32), sizes, arrays))
    order = [p.n_axes.index(a) for a in sorted(p.n_axes)]
    y = lax.transpose(y.reshape(m, *(p.inner[a] for a in p.n_axes)), [0, *(1 + a for a in order)])
    problem = Problem(
        1 if m < experts else m, p.weight, p.layout, x.dtype.name, np.dtype(op.out_dtype).name
    )
    by = "row by row" if m < experts else "expert by expert"
    return y, f"{_path(problem, p)}, {by}"


def _rounding(act: Activation) -> str:
    """What becomes of x, in words."""
    assert act.spec is not None
    tensor = "token" if act.spec.block is None else "tensor"
    scaled = "static" if act.scale is not None else tensor
    return f"{act.spec.format}_{scaled}"


def _prepared_dot(x: jax.Array, p: Prepared, dot: Dot, out: Any) -> jax.Array:
    """`dot` on the kernel: x as `[*layers, m, k]`, and the result's axes back where they belong.

    An axis of layers that x does not have is mapped over with all of x.
    """

    def run(x: jax.Array, p: Prepared) -> jax.Array:
        of_w, weight = _meets(p, dot), p.weight
        call: Any = lambda x, arrays: quantized_matmul(x, arrays, weight, p.layout, out=out)
        for a in reversed(range(len(p.lead))):
            call = jax.vmap(call, (0 if a in of_w else None, 0))
        return _as_result(call(_as_rows(x, p, dot), p.operands()), x, p, dot)

    where = _out_sharding(x, p, dot)
    if where is None:
        return run(x, p.local())
    _check_cut(x, p, dot)
    under_auto: Any = jax.sharding.auto_axes(run, out_sharding=where)
    return under_auto(x, p.local())


def _meets(p: Prepared, dot: Dot) -> dict[int, int]:
    """The axis of x that each contracted or parallel axis of the weight meets."""
    (w_contract, w_batch), (x_contract, x_batch) = (
        dot.axes(side) for side in (dot.weight_side, 1 - dot.weight_side)
    )
    return dict(zip((*w_contract, *w_batch), (*x_contract, *x_batch), strict=True))


def _order(x: jax.Array, p: Prepared, dot: Dot) -> tuple[Axes, Axes, Axes]:
    """The axes of x that are layers, rows and k."""
    of_w, lead = _meets(p, dot), len(p.lead)
    layers = tuple(of_w[a] for a in range(lead) if a in of_w)
    return layers, dot.rows(x), tuple(of_w[lead + a] for a in p.k_axes)


def _as_rows(x: jax.Array, p: Prepared, dot: Dot) -> jax.Array:
    """`[*layers, m, k]`."""
    layers, rows, k = _order(x, p, dot)
    sizes = [x.shape[a] for a in layers]
    m = math.prod(x.shape[a] for a in rows)
    return lax.transpose(x, [*layers, *rows, *k]).reshape(*sizes, m, p.weight.k)


def _as_result(y: jax.Array, x: jax.Array, p: Prepared, dot: Dot) -> jax.Array:
    """`[*lead, m, n]` as `dot` orders its result."""
    side, of_w, lead = dot.weight_side, _meets(p, dot), len(p.lead)
    rows = [x.shape[a] for a in dot.rows(x)]
    y = y.reshape(*p.lead, *rows, *(p.inner[a] for a in p.n_axes))
    first = lead + len(rows)
    channels = [a for a in range(lead) if a not in of_w]
    channels += [first + p.n_axes.index(a) for a in sorted(p.n_axes)]
    middle = list(range(lead, first))
    after = [*channels, *middle] if side == 0 else [*middle, *channels]
    return lax.transpose(y, [*dot.axes(side)[1], *after])


def _check_cut(x: jax.Array, p: Prepared, dot: Dot) -> None:
    """Raises ValueError if Explicit mesh axes cut k or n elsewhere than between tiles."""
    of_x, (k, n) = _compat.explicit_shards(x), p.explicit_cut()
    of_k = math.prod(of_x[a] for a in _order(x, p, dot)[2])
    check_part(_problem(x, p, dot), max(k, of_k), n)


def _out_sharding(x: jax.Array, p: Prepared, dot: Dot) -> Any:
    """The sharding of the result where the mesh has Explicit axes: kernels run under Auto ones."""
    of_x, of_p = _compat.explicit_sharding(x), p.explicit_sharding()
    if of_x is None and of_p is None:
        return None
    if dot.out_sharding is not None:
        return dot.out_sharding
    parts = []
    for side, v, where in ((dot.weight_side, p, of_p), (1 - dot.weight_side, x, of_x)):
        spec = [None] * v.ndim if where is None else [*where.spec, *[None] * v.ndim]
        contracted, batch = dot.axes(side)
        free = [spec[a] for a in range(v.ndim) if a not in (*contracted, *batch)]
        parts.append(([spec[a] for a in batch], free))
    layers = [a or b for a, b in zip(parts[0][0], parts[1][0], strict=True)]
    frees = parts if dot.weight_side == 0 else parts[::-1]
    mesh = (of_x or of_p).mesh  # pyright: ignore[reportOptionalMemberAccess]
    return NamedSharding(mesh, PartitionSpec(*layers, *frees[0][1], *frees[1][1]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _dynamic(x: jax.Array, q: Any, extra: tuple, op: Op) -> jax.Array:
    """`x` rounded as the activation of q says, times q; sums in int32 for integers.

    Straight-through: the tangent of x is that of the product with `dequantize(q)`.
    """
    act, apart = q.activation, None
    assert act is not None
    assert act.spec is not None
    if act.threshold is not None:
        outlier = jnp.any(jnp.abs(x) >= act.threshold, axis=op.rows(x), keepdims=True)
        outlier = jnp.broadcast_to(outlier, x.shape)
        apart, x = (
            jnp.where(outlier, x, jnp.zeros_like(x)),
            jnp.where(outlier, jnp.zeros_like(x), x),
        )
    x_codes, x_scale = _codes_of(x.astype(jnp.float32), act, op, extra)
    on_kernel = isinstance(q, Prepared)
    way = "on the kernel" if on_kernel else _way(q, op)
    if on_kernel:
        assert isinstance(op, Dot)
        x_codes = x_codes if x_codes.dtype == jnp.int8 else x_codes.astype(jnp.float32)
        y = _prepared_dot(x_codes, q, op, jnp.float32)
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
    if apart is not None:
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
    y = times(y, _on_output(_scale(q), q.shape, q.block, dot, side, x.ndim - len(groups), groups))
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
        rows = prepared.take(q, indices, dims, slice_sizes, mode)
        return rows, f"look up codes, dequantize rows, on {q.layout}"
    assert isinstance(q, QTensor)
    rows = structural.take(q, indices, dims, slice_sizes, mode)
    return dequantize(rows), "look up codes, dequantize rows"
