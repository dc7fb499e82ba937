"""The train table: parameters in boxes, and matmuls that meet one run in its recipe."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _compat, products, run, sharding, structural
from qjax.interpret import Decline, Table, Thread
from qjax.qtensor import QTensor
from qjax.training import kernels
from qjax.training.matmul import Dot, Held, RaggedDot, matmul
from qjax.training.recipes import Use

Casts = tuple[QTensor | None, QTensor | None]  # for the output, and for the gradient of x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter on its way through a jaxpr.

    `value` is what the model sees, and takes the gradient; where a matmul runs on `casts` nothing
    reads it. `layers` are the indices of the scans that it was cut by, outermost first.
    """

    value: Any
    casts: dict[str, Casts]
    layers: tuple[Any, ...]
    path: str = dataclasses.field(metadata={"static": True})


Record = Callable[[Weight, _compat.JaxprEqn, str], None]


def table(uses: Mapping[tuple[int, str], Use], thread: Thread, record: Record) -> Table:
    """The table for one jaxpr, whose `uses` are known by equation and path.

    The thread is that of `threading`.
    """

    def open_box(box: Weight, eqn: _compat.JaxprEqn, reason: str) -> jax.Array:
        use = uses.get((id(eqn), box.path))
        record(box, eqn, f"dense: {use.why if use is not None and use.why else reason}")
        return box.value

    rules = {name: functools.partial(_carry, name) for name in run.STRUCTURAL}
    rules |= {
        "concatenate": lambda eqn, inputs: Decline("it is joined with other arrays"),
        "optimization_barrier": _barrier,
        "dot_general": functools.partial(_dot_general, uses, thread, record),
        "ragged_dot_general": functools.partial(_ragged_dot, uses, thread, record),
    }
    is_box = lambda v: isinstance(v, Weight)
    return Table(is_box, rules, open_box, _slice_leading, _shard, thread=thread)


def _move(casts: Casts, move: Callable[[QTensor], Any]) -> Casts:
    def one(q: QTensor | None) -> QTensor | None:
        try:
            return None if q is None else move(q)
        except structural.CannotCarry:
            return None  # it is cast again where it is used

    first = one(casts[0])
    return first, first if casts[1] is casts[0] else one(casts[1])


def _carry(name: str, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    box, *rest = inputs
    if not isinstance(box, Weight) or any(isinstance(v, Weight) for v in rest):
        return Decline("it is an index")
    if name == "convert_element_type" and not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return Decline("it is converted to integers")
    values = _compat.bind(eqn, [box.value, *rest])
    outputs = []
    for i, value in enumerate(values):

        def move(q: QTensor, i: int = i) -> QTensor:
            moved: Any = run.STRUCTURAL[name](eqn.params, [q, *rest])
            return moved[i] if eqn.primitive.multiple_results else moved

        casts = {key: _move(pair, move) for key, pair in box.casts.items()}
        outputs.append(dataclasses.replace(box, value=value, casts=casts))
    return outputs


def _barrier(eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any]:
    values = _compat.bind(eqn, [v.value if isinstance(v, Weight) else v for v in inputs])
    pairs = zip(inputs, values, strict=True)
    return [dataclasses.replace(b, value=v) if isinstance(b, Weight) else v for b, v in pairs]


def _slice_leading(box: Weight) -> Weight:
    length = box.value.shape[0]
    wide = [jnp.broadcast_to(i, (length,)) for i in box.layers]
    casts = {}
    for key, pair in box.casts.items():
        cut = [None if q is None else structural.slice_leading(q) for q in pair]
        casts[key] = (cut[0], cut[0] if pair[1] is pair[0] else cut[1])
    layers = (*wide, jnp.arange(length, dtype=jnp.int32))
    return dataclasses.replace(box, casts=casts, layers=layers)


def _shard(box: Weight, spec: Any, mesh: Any) -> tuple[Weight, Weight]:
    casts, specs = {}, {}
    for key, pair in box.casts.items():
        entered = [None if q is None else sharding.shard_map_operand(q, spec, mesh) for q in pair]
        casts[key] = tuple(None if e is None else e[0] for e in entered)
        specs[key] = tuple(None if e is None else e[1] for e in entered)
    everywhere = tuple(jax.sharding.PartitionSpec() for _ in box.layers)
    entry = dataclasses.replace(box, value=spec, casts=specs, layers=everywhere)
    return dataclasses.replace(box, casts=casts), entry


def _dot_general(
    uses: Mapping[tuple[int, str], Use],
    thread: Thread,
    record: Record,
    eqn: _compat.JaxprEqn,
    inputs: list[Any],
) -> list[Any] | Decline:
    if all(isinstance(v, Weight) for v in inputs):
        return Decline("both operands of the matmul are parameters")
    side = 0 if isinstance(inputs[0], Weight) else 1
    x, box, params = inputs[1 - side], inputs[side], eqn.params
    op = Dot(
        params["dimension_numbers"],
        side,
        x.ndim,
        box.value.ndim,
        _dtype(eqn),
        params["out_sharding"],
        _compat.explicit_sharding(x),
        _compat.explicit_sharding(box.value),
    )
    return _run(uses, thread, record, eqn, op, x, box, ())


def _ragged_dot(
    uses: Mapping[tuple[int, str], Use],
    thread: Thread,
    record: Record,
    eqn: _compat.JaxprEqn,
    inputs: list[Any],
) -> list[Any] | Decline:
    x, box, sizes = inputs
    if not products.is_rows_by_experts(eqn.params):
        return Decline("the ragged dot is not rows by experts")
    if not isinstance(box, Weight) or isinstance(x, Weight):
        return Decline("it is not the experts of the ragged dot")
    return _run(uses, thread, record, eqn, RaggedDot(_dtype(eqn)), x, box, (sizes,))


def _run(
    uses: Mapping[tuple[int, str], Use],
    thread: Thread,
    record: Record,
    eqn: _compat.JaxprEqn,
    op: Dot | RaggedDot,
    x: jax.Array,
    box: Weight,
    extra: tuple,
) -> list[Any] | Decline:
    use = uses.get((id(eqn), box.path))
    if use is None or use.recipe is None:
        return Decline("its recipe keeps it")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return Decline(f"the other operand is {x.dtype}")
    state = dict(thread.value)
    casts = box.casts.get(use.key, (None, None))
    amax = {n: v[box.layers] for n, v in state["amax"].get(use.key, {}).items()}
    held = Held(casts, amax, box.layers, state["noise"], extra)
    product: Any = matmul(op, use.recipe, x, box.value, held, state["seen"].get(use.key))
    y, seen = product
    if seen is not None:
        state["seen"] = state["seen"] | {use.key: seen}
    if state["noise"] is not None:
        state["noise"] = state["noise"] + jnp.array([0, 1], jnp.uint32)
    thread.value = state
    again = ", the weight cast at the use" if None in casts else ""
    by = kernels.note(x, use.recipe.output[0], op.contracted()[0])
    record(box, eqn, f"{use.recipe.name}{again}{by}")
    return [y]


def _dtype(eqn: _compat.JaxprEqn) -> np.dtype:
    (output,) = eqn.outvars
    return np.dtype(output.aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
