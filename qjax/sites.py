"""find_sites: how a function uses each of its parameters, without running it."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qjax import _compat, tracing
from qjax.interpret import Decline, Table, interpret
from qjax.structural import CannotCarry, regroup


class Site(NamedTuple):
    """One use of one parameter in a matmul or a lookup; all axes count on the whole parameter.

    Attributes:
      path: the parameter's path, such as "params/layers_0/attention/q/kernel".
      primitive: "dot_general", "ragged_dot_general", "conv_general_dilated" or "gather".
      side: which operand the parameter is, 0 or 1.
      contract_axes: axes that are summed over (of a convolution kernel, all but the output's);
        empty for a lookup.
      batch_axes: axes that run in parallel with the other operand's (experts); for a lookup, the
        axes that are indexed.
      free_axes: the other axes: output channels; for a lookup, the axes of a row.
      stacked_axes: axes that a scan iterates over (layers).
      input_key: equal for sites that multiply the same value along the same axes, up to casts and
        structural operations.
    """

    path: str
    primitive: str
    side: int
    contract_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    free_axes: tuple[int, ...]
    stacked_axes: tuple[int, ...]
    input_key: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tagged:
    """A parameter on its way through a jaxpr: each axis of `value` holds these of its `axes`."""

    value: Any
    path: str = dataclasses.field(metadata={"static": True})
    axes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    stacked: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


def find_sites(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> dict[str, tuple[Site, ...]]:
    """Finds how `fn(params, *args, **kwargs)` uses each parameter: contracted axes, lookups.

    Nothing is computed: `fn` is traced once, and the trace is walked with every parameter tagged.

    Args:
      fn: any function of pytrees, such as `model.apply`.
      params: its first argument; the leaves may be arrays or ShapeDtypeStructs.
      *args, **kwargs: its other arguments; arrays may be ShapeDtypeStructs.

    Returns:
      The sites of each parameter that has any, by path, in program order. Parameters that no matmul
      and no lookup uses (biases, norms) are absent.

    Example:
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
      >>> sites = qjax.find_sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 8)))
      >>> sites["w"][0].contract_axes, list(sites)
      ((0,), ['w'])
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(((params, *args), kwargs))
    values = [v for _, v in leaves]
    jaxpr = tracing.trace(fn, values, tree, lambda v: v).jaxpr
    num_params = len(jax.tree.leaves(params))
    paths = [
        tracing.param_path(p[2:]) if i < num_params else None
        for i, (p, v) in enumerate(leaves)
        if tracing.is_array(v)
    ]
    by_path: dict[str, list[Site]] = {}
    for site in walk(jaxpr, [v for v in values if tracing.is_array(v)], paths).values():
        by_path.setdefault(site.path, []).append(site)
    return {path: tuple(found) for path, found in by_path.items()}


def walk(
    jaxpr: Any, values: Sequence[Any], paths: Sequence[str | None]
) -> dict[tuple[int, str], Site]:
    """The sites in a closed jaxpr, in program order, by the `id` of their equation and their path.

    `values` are its arguments; those that are parameters have a path.
    """
    finder = _Finder()

    def run(arrays: list[Any]) -> None:
        boxes = [
            v if path is None else _Tagged(v, path, tuple((a,) for a in range(v.ndim)))
            for path, v in zip(paths, arrays, strict=True)
        ]
        interpret(finder.table(), jaxpr, boxes)

    jax.eval_shape(run, list(values))
    return finder.found


class ValueNumbers:
    """Numbers the values of one walk, so that equal inputs are known as equal."""

    def __init__(self) -> None:
        self._keys: dict[int, tuple[Callable[[], Any], str]] = {}
        self._count = 0
        self._numbers: dict[Any, str] = {}

    def key(self, value: Any) -> str:
        """Equal for the same value, up to casts and equal structural operations."""
        alive, key = self._keys.get(id(value), (lambda: None, ""))
        if alive() is value:  # otherwise the id has passed to another value
            return key
        self._count += 1
        return self._set(value, f"x{self._count}")

    def note(self, eqn: _compat.JaxprEqn, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Gives the result of the same structural operation on the same value the same key."""
        if eqn.primitive.name not in MOVES or len(outputs) != 1:
            return
        number = (eqn.primitive.name, str(eqn.params), *(self.key(v) for v in inputs))
        if eqn.primitive.name == "convert_element_type":
            key = self.key(inputs[0])
        else:
            key = self._numbers.setdefault(number, self.key(outputs[0]))
        self._set(outputs[0], key)

    def _set(self, value: Any, key: str) -> str:
        """Remembers a key; weakly, so that no tracer outlives its trace."""
        alive = weakref.ref(value) if isinstance(value, _compat.Tracer) else lambda: value
        self._keys[id(value)] = (alive, key)
        return key


class _Finder:
    """Collects sites during one walk."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], Site] = {}
        self._values = ValueNumbers()

    def table(self) -> Table:
        rules = {name: functools.partial(self._move, move) for name, move in MOVES.items()}
        rules |= {
            "dot_general": self._dot_general,
            "ragged_dot_general": self._ragged_dot,
            "conv_general_dilated": self._conv,
            "gather": self._gather,
            "optimization_barrier": self._barrier,
        }
        return Table(
            lambda v: isinstance(v, _Tagged),
            rules,
            lambda box, eqn, why: box.value,
            _slice_leading,
            lambda box, spec, mesh: (box, dataclasses.replace(box, value=spec)),
            self._values.note,
        )

    def _key_of(self, value: Any) -> str:
        return value.path if isinstance(value, _Tagged) else self._values.key(value)

    def _move(
        self, move: Callable[..., Any], eqn: _compat.JaxprEqn, inputs: list[Any]
    ) -> list[Any] | Decline:
        box = inputs[0]
        if not isinstance(box, _Tagged):
            return Decline("it is an index")
        try:
            axes = move(eqn.params, box.value.shape, box.axes)
        except CannotCarry as why:
            return Decline(str(why))
        outputs = _compat.bind(eqn, [v.value if isinstance(v, _Tagged) else v for v in inputs])
        return [dataclasses.replace(box, value=v, axes=tuple(axes)) for v in outputs]

    def _barrier(self, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any]:
        outputs = _compat.bind(eqn, [v.value if isinstance(v, _Tagged) else v for v in inputs])
        pairs = zip(inputs, outputs, strict=True)
        return [dataclasses.replace(v, value=o) if isinstance(v, _Tagged) else o for v, o in pairs]

    def _dot_general(self, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
        contract, batch = eqn.params["dimension_numbers"]
        for side, box in enumerate(inputs):
            if isinstance(box, _Tagged):
                key = f"{self._key_of(inputs[1 - side])}{contract[1 - side]}{batch[1 - side]}"
                self._add(eqn, box, side, _axes(box, contract[side]), _axes(box, batch[side]), key)
        return Decline("recorded")

    def _ragged_dot(self, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
        dims = eqn.params["ragged_dot_dimension_numbers"]
        contract, batch = dims.dot_dimension_numbers
        box, groups = inputs[1], (*batch[1], *dims.rhs_group_dimensions)
        if isinstance(box, _Tagged):
            key = self._key_of(inputs[0])
            self._add(eqn, box, 1, _axes(box, contract[1]), _axes(box, groups), key)
        return Decline("recorded")

    def _conv(self, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
        box = inputs[1]
        if isinstance(box, _Tagged):
            contracted = eqn.params["dimension_numbers"].rhs_spec[1:]
            self._add(eqn, box, 1, _axes(box, contracted), (), self._key_of(inputs[0]))
        return Decline("recorded")

    def _gather(self, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
        box, indices = inputs
        if not isinstance(box, _Tagged):
            return Decline("it is an index")
        sizes = zip(eqn.params["slice_sizes"], box.value.shape, strict=True)
        looked_up = tuple(a for a, (taken, size) in enumerate(sizes) if taken != size)
        self._add(eqn, box, 0, (), _axes(box, looked_up), self._values.key(indices))
        return Decline("recorded")

    def _add(
        self,
        eqn: _compat.JaxprEqn,
        box: _Tagged,
        side: int,
        contract: tuple[int, ...],
        batch: tuple[int, ...],
        key: str,
    ) -> None:
        seen = {a for axes in box.axes for a in axes}
        free = tuple(sorted(seen - set(contract) - set(batch)))
        site = Site(box.path, eqn.primitive.name, side, contract, batch, free, box.stacked, key)
        self.found.setdefault((id(eqn), box.path), site)


def _axes(box: _Tagged, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({a for d in dims for a in box.axes[d]}))


def _slice_leading(box: _Tagged) -> _Tagged:
    return dataclasses.replace(box, axes=box.axes[1:], stacked=(*box.stacked, *box.axes[0]))


def _reshape_axes(
    params: Mapping[str, Any], shape: Sequence[int], axes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    if params.get("dimensions") is not None:
        raise CannotCarry("the reshape permutes axes")
    new = params["new_sizes"]
    result: list[tuple[int, ...]] = [()] * len(new)
    for before, after in regroup(shape, new):
        for a in after:
            result[a] = tuple(x for b in before for x in axes[b])
    return result


def _broadcast_axes(
    params: Mapping[str, Any], shape: Sequence[int], axes: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    result: list[tuple[int, ...]] = [()] * len(params["shape"])
    for d, a in zip(params["broadcast_dimensions"], axes, strict=True):
        result[d] = a
    return result


_same: Callable[..., Any] = lambda params, shape, axes: axes

# How structural primitives move axes: primitive -> (parameters, shape, axes) -> axes of each
# output.
MOVES: Mapping[str, Callable[..., Any]] = {
    "transpose": lambda p, shape, axes: [axes[i] for i in p["permutation"]],
    "reshape": _reshape_axes,
    "squeeze": lambda p, shape, axes: [a for i, a in enumerate(axes) if i not in p["dimensions"]],
    "broadcast_in_dim": _broadcast_axes,
    **dict.fromkeys(
        (
            "convert_element_type",
            "slice",
            "dynamic_slice",
            "split",
            "stop_gradient",
            "copy",
            "copy_p",
            "pvary",
            "sharding_constraint",
            "reshard",
        ),
        _same,
    ),
}
