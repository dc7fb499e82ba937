"""quantized(fn): runs an unmodified function on quantized parameters. explain: what ran where."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from qjax import (
    _compat,
    ops,
    prepared_products,
    prepared_structural,
    sharding,
    structural,
    tracing,
)
from qjax.interpret import Decline, Table, interpret
from qjax.prepared import Prepared
from qjax.products import Conv, Dot, RaggedDot, is_rows_by_experts
from qjax.qtensor import Quantized, dequantize, is_qtensor


class Use(NamedTuple):
    """One use of one quantized parameter: what the model did with it, and how that ran."""

    path: str
    primitive: str
    shape: tuple[int, ...]
    spec: str
    how: str


class Explanation(NamedTuple):
    """What `explain` returns: the uses in program order; `str` prints them as a table."""

    uses: tuple[Use, ...]

    def __str__(self) -> str:
        rows = [("path", "primitive", "weight", "format", "how")]
        rows += [
            (u.path, u.primitive, "x".join(map(str, u.shape)), u.spec, u.how) for u in self.uses
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = [[*map(str.ljust, r[:4], widths), r[4]] for r in rows]
        return "\n".join("  ".join(line).rstrip() for line in lines)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """A quantized weight on its way through a jaxpr; `path` is set only while explaining."""

    tensor: Quantized
    path: str | None = dataclasses.field(metadata={"static": True})


Record: TypeAlias = Callable[[Box, _compat.JaxprEqn, str], None]


def quantized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with QTensors accepted wherever it takes arrays.

    `fn` is traced on arrays of the shapes and dtypes that the QTensors stand for, and the trace is
    run with each matmul and lookup on the quantized weight. The result composes with `jit`, `grad`,
    `jvp`, `vmap`, `pmap`, `scan` and `remat`; QTensors get no gradient. Called without QTensors it
    is `fn`.

    The bare callable traces `fn` on every call: wrap it in `jax.jit` to trace once.

    Args:
      fn: any function of pytrees, such as `model.apply`. Only arrays and QTensors are traced; other
        leaves keep their Python values.

    Returns:
      A function of the same signature.

    Raises:
      ValueError: if the leaves of a QTensor disagree with its format.

    Example:
      >>> w = jnp.eye(4)
      >>> apply = jax.jit(qjax.quantized(lambda params, x: x @ params["w"]))
      >>> apply({"w": qjax.quantize(w, "int8", axis=0)}, jnp.ones((1, 4))).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _evaluate(fn, args, kwargs, run_table(None), with_paths=False)

    return call


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `quantized(fn)(*args, **kwargs)` does with every QTensor, without computing anything.

    Args:
      fn: the function, not wrapped.
      *args, **kwargs: its arguments; arrays may be ShapeDtypeStructs.

    Returns:
      The uses in program order. `how` is the path a matmul or lookup took, or why the weight was
      dequantized.

    Example:
      >>> q = {"w": qjax.quantize(jnp.ones((128, 8)), "int8", axis=0)}
      >>> print(qjax.explain(lambda p, x: x @ p["w"], q, jnp.ones((1, 128))))
      path  primitive    weight  format  how
      w     dot_general  128x8   int8    dot on codes, scale after
    """
    seen: dict[tuple[Any, ...], Use] = {}

    def record(box: Box, eqn: _compat.JaxprEqn, how: str) -> None:
        use = Use(box.path or "", eqn.primitive.name, box.tensor.shape, box.tensor.format, how)
        seen.setdefault((id(eqn), use), use)

    jaxprs = []  # equations are told apart by identity: keep them alive
    leaves, tree = jax.tree.flatten((args, kwargs))
    dynamic = [i for i, leaf in enumerate(leaves) if tracing.is_array(leaf)]

    def run(values: list[Any]) -> Any:
        full = list(leaves)
        for i, v in zip(dynamic, values, strict=True):
            full[i] = v
        inner_args, inner_kwargs = jax.tree.unflatten(tree, full)
        return tracing.arrays_of(
            _evaluate(fn, inner_args, inner_kwargs, run_table(record), with_paths=True, keep=jaxprs)
        )

    jax.eval_shape(run, [leaves[i] for i in dynamic])
    return Explanation(tuple(seen.values()))


def _evaluate(
    fn: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    table: Table,
    with_paths: bool,
    keep: list | None = None,
) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_qtensor)
    if not any(is_qtensor(v) for _, v in leaves):
        return fn(*args, **kwargs)
    for path, leaf in leaves:
        if is_qtensor(leaf):
            leaf.check(tracing.param_path(path[2:]))
    traced = tracing.trace(fn, [v for _, v in leaves], tree, dense_leaf)
    if keep is not None:
        keep.append(traced.jaxpr)
    frozen = iter(lax.stop_gradient([v for _, v in leaves if is_qtensor(v)]))
    boxes = [
        Box(next(frozen), tracing.param_path(p[2:]) if with_paths else None) if is_qtensor(v) else v
        for p, v in leaves
        if tracing.is_array(v) or is_qtensor(v)
    ]
    outputs = interpret(table, traced.jaxpr, boxes)
    return traced.rebuild([dequantize(v.tensor) if isinstance(v, Box) else v for v in outputs])


def dense_leaf(leaf: Any) -> Any:
    """What stands for a leaf of the parameters while a function is traced."""
    if not is_qtensor(leaf):
        return leaf
    if isinstance(leaf, Prepared):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.explicit_sharding())
    plane = leaf.qvalue[0] if isinstance(leaf.qvalue, tuple) else leaf.qvalue
    where = _compat.explicit_sharding(plane) if leaf.param_shape is None else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def run_table(record: Record | None) -> Table:
    """The rules by which boxed weights run; `record` is told what became of each."""

    def note(box: Box, eqn: _compat.JaxprEqn, how: str) -> None:
        if record is not None:
            record(box, eqn, how)

    def open_box(box: Box, eqn: _compat.JaxprEqn, reason: str) -> jax.Array:
        note(box, eqn, f"dequantized: {reason}")
        return dequantize(box.tensor)

    def slice_leading(box: Box) -> Box | None:
        by: Any = prepared_structural if isinstance(box.tensor, Prepared) else structural
        cut = by.slice_leading(box.tensor)
        return None if cut is None else dataclasses.replace(box, tensor=cut)

    def shard(box: Box, spec: Any, mesh: Any) -> tuple[Box, Box] | None:
        entered = sharding.shard_map_operand(box.tensor, spec, mesh)
        if entered is None:
            return None
        tensor, specs = entered
        return dataclasses.replace(box, tensor=tensor), dataclasses.replace(box, tensor=specs)

    rules = {name: functools.partial(carry, rule) for name, rule in STRUCTURAL.items()}
    rules |= {name: functools.partial(rule, note) for name, rule in COMPUTING.items()}
    joint = {"dot_general": functools.partial(_joint_dots, note)}
    is_box = lambda v: isinstance(v, Box)
    early = frozenset(STRUCTURAL)
    joins = lambda box: isinstance(box.tensor, Prepared)
    calls = {name: functools.partial(rule, note) for name, rule in CALLS.items()}
    return Table(
        is_box, rules, open_box, slice_leading, shard, None, None, joint, early, joins, calls
    )


def carry(
    rule: Callable[[dict[str, Any], list[Any]], Any], eqn: _compat.JaxprEqn, inputs: list[Any]
) -> list[Any] | Decline:
    """Runs a structural rule on the tensors inside boxes and boxes what comes out."""
    paths = [v.path for v in inputs if isinstance(v, Box)]
    path = (
        "+".join(dict.fromkeys(p for p in paths if p is not None)) if paths[0] is not None else None
    )
    held = [v.tensor if isinstance(v, Box) else v for v in inputs]
    name = eqn.primitive.name
    if any(isinstance(v, Prepared) for v in held) and name not in prepared_structural.ANY:
        if name not in prepared_structural.STRUCTURAL or not isinstance(held[0], Prepared):
            return Decline(f"{name} does not carry a prepared weight")
        rule = prepared_structural.STRUCTURAL[name]
    try:
        outputs = rule(eqn.params, held)
    except structural.CannotCarry as why:
        return Decline(str(why))
    return [
        Box(v, path) if is_qtensor(v) else v
        for v in (outputs if eqn.primitive.multiple_results else [outputs])
    ]


def _slice(params: dict[str, Any], inputs: list[Any]) -> Any:
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        raise structural.CannotCarry("the slice has strides")
    return structural.static_slice(inputs[0], params["start_indices"], params["limit_indices"])


def _dynamic_slice(params: dict[str, Any], inputs: list[Any]) -> Any:
    if not is_qtensor(inputs[0]):
        raise structural.CannotCarry("it is an index")
    return structural.dynamic_slice(inputs[0], inputs[1:], params["slice_sizes"])


def _split(params: dict[str, Any], inputs: list[Any]) -> list[Any]:
    (x,), axis, outputs, at = inputs, params["axis"], [], 0
    for size in params["sizes"]:
        start, limit = [0] * x.ndim, list(x.shape)
        start[axis], limit[axis] = at, at + size
        outputs.append(structural.static_slice(x, start, limit))
        at += size
    return outputs


def _constrain(params: dict[str, Any], inputs: list[Any]) -> Any:
    """Lays codes and scales out as the model lays out its weight."""
    (q,), where = inputs, params.get("sharding", params.get("dst_sharding"))
    if not isinstance(where, NamedSharding):
        raise structural.CannotCarry("its sharding constraint is no NamedSharding")
    try:
        specs = sharding.leaf_specs(q, where.spec, where.mesh)
    except ValueError as why:
        raise structural.CannotCarry(str(why)) from why
    move = jax.sharding.reshard if "dst_sharding" in params else lax.with_sharding_constraint
    return jax.tree.map(lambda v, spec: move(v, NamedSharding(where.mesh, spec)), q, specs)


def _reshape(params: dict[str, Any], inputs: list[Any]) -> Any:
    if params.get("dimensions") is not None:
        raise structural.CannotCarry("the reshape permutes axes")
    return structural.reshape(inputs[0], params["new_sizes"])


# Primitives that move a weight without computing: primitive -> (equation parameters, inputs) ->
# outputs.
STRUCTURAL: Mapping[str, Callable[[dict[str, Any], list[Any]], Any]] = {
    "convert_element_type": lambda p, v: structural.convert(v[0], p["new_dtype"]),
    "transpose": lambda p, v: structural.transpose(v[0], p["permutation"]),
    "reshape": _reshape,
    "squeeze": lambda p, v: structural.squeeze(v[0], p["dimensions"]),
    "broadcast_in_dim": lambda p, v: structural.broadcast_in_dim(
        v[0], p["shape"], p["broadcast_dimensions"]
    ),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "concatenate": lambda p, v: structural.concatenate(v, p["dimension"]),
    "pvary": lambda p, v: jax.tree.map(lambda leaf: lax.pcast(leaf, p["axes"], to="varying"), v[0]),
    "sharding_constraint": _constrain,
    "reshard": _constrain,
    "stop_gradient": lambda p, v: v[0],
    "copy": lambda p, v: v[0],
    "copy_p": lambda p, v: v[0],
    "optimization_barrier": lambda p, v: list(lax.optimization_barrier(tuple(v))),
}


def _dot_general(note: Record, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    if all(isinstance(v, Box) for v in inputs):
        return Decline("both operands of the matmul are quantized weights")
    x, box, dot = _dot(eqn, inputs)
    y, how = ops.linear(x, box.tensor, dot)
    note(box, eqn, how)
    return [y]


def _dot(eqn: _compat.JaxprEqn, inputs: list[Any]) -> tuple[Any, Box, Dot]:
    """The other operand, the weight, and how they are multiplied."""
    side = 0 if isinstance(inputs[0], Box) else 1
    params = eqn.params
    numbers, where = params["dimension_numbers"], params["out_sharding"]
    dot = Dot(numbers, side, params["precision"], _dtype(eqn), where)
    return inputs[1 - side], inputs[side], dot


def _joint_dots(
    note: Record, eqns: Sequence[_compat.JaxprEqn], inputs: Sequence[list[Any]]
) -> list[list[Any] | None]:
    """Products of one x with prepared weights that are alike but for their channels."""
    dots = [_dot(eqn, held) for eqn, held in zip(eqns, inputs, strict=True)]
    taken = prepared_products.alike(dots[0][0], [(box.tensor, dot) for _, box, dot in dots])
    if len(taken) < 2:
        return [None] * len(eqns)
    boxes = [dots[i][1] for i in taken]
    ys, how, is_one = prepared_products.joined(
        dots[0][0], [(dots[i][1].tensor, dots[i][2]) for i in taken]
    )
    out: list[list[Any] | None] = [None] * len(eqns)
    for i, box, y in zip(taken, boxes, ys, strict=True):
        others = ", ".join(b.path or "" for b in boxes if b is not box)
        note(box, eqns[i], f"{how}, in one launch with {others}" if is_one else how)
        out[i] = [y]
    return out


def _normed_products(
    note: Record, eqn: _compat.JaxprEqn, inputs: list[Any], epsilon: float, gate: str | None
) -> list[Any] | Decline:
    """The sum of x and y, its RMSNorm by each weight, and what a gate makes of two."""
    x, y, scale, *boxes = inputs
    if [isinstance(v, Box) for v in inputs] != [False] * 3 + [True] * len(boxes):
        return Decline("it is not the kernels alone that are quantized")
    done = prepared_products.normed(x, y, scale, epsilon, [b.tensor for b in boxes], gate)
    if done is None:
        return Decline("they have no launch of their own")
    outputs, how = done
    for box in boxes:
        others = ", ".join(b.path or "" for b in boxes if b is not box)
        note(box, eqn, f"{how}, in one launch with {others}" if others else how)
    return outputs


def _ragged_dot(note: Record, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    x, box, group_sizes = inputs
    params = eqn.params
    if not is_rows_by_experts(params):
        return Decline("the ragged dot is not rows by experts")
    if params["out_sharding"] is not None:
        return Decline("the ragged dot has an out_sharding")
    if not isinstance(box, Box) or isinstance(x, Box) or isinstance(group_sizes, Box):
        return Decline("it is not the experts of the ragged dot")
    op = RaggedDot(params["precision"], _dtype(eqn))
    y, how = ops.linear(x, box.tensor, op, (group_sizes,))
    note(box, eqn, how)
    return [y]


def _conv(note: Record, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    x, box = inputs
    if not isinstance(box, Box) or isinstance(x, Box):
        return Decline("it is not the kernel of the convolution")
    if eqn.params["out_sharding"] is not None:
        return Decline("the convolution has an out_sharding")
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    names += ("feature_group_count", "batch_group_count")
    options = tuple((n, eqn.params[n]) for n in names)
    y, how = ops.linear(x, box.tensor, Conv(eqn.params["dimension_numbers"], options, _dtype(eqn)))
    note(box, eqn, how)
    return [y]


def _dtype(eqn: _compat.JaxprEqn) -> np.dtype:
    (output,) = eqn.outvars
    return np.dtype(output.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _gather(note: Record, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    box, indices = inputs
    params = eqn.params
    if not isinstance(box, Box):
        return Decline("it is an index")
    try:
        rows, how = ops.take(
            box.tensor, indices, params["dimension_numbers"], params["slice_sizes"], params["mode"]
        )
    except structural.CannotCarry as why:
        return Decline(str(why))
    note(box, eqn, how)
    return [rows]


# Primitives that compute on quantized operands: primitive -> (note, equation, inputs) -> outputs or
# Decline.
COMPUTING: Mapping[str, Callable[[Record, _compat.JaxprEqn, list[Any]], list[Any] | Decline]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}

# Functions that are run as a whole where they meet quantized operands: name -> (note, equation,
# inputs, *static arguments) -> outputs or Decline.
CALLS: Mapping[str, Callable[..., list[Any] | Decline]] = {"normed_products": _normed_products}
