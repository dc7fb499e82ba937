"""Evaluates a jaxpr equation by equation with some values boxed. Knows nothing of quantization.

A box stands in for an array. A `Table` says what a primitive does when it meets one; without a
rule, or when the rule declines, the box is opened into the array that it stands for and the
equation runs as it was traced. An equation that meets no box is bound unchanged, whatever it is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from qjax import _compat


class Decline(NamedTuple):
    """A rule's answer when it cannot carry a box: the boxes are opened, and this is why."""

    reason: str


class Table(NamedTuple):
    """What one interpretation does with boxes.

    Attributes:
      is_box: whether a value is a box. Boxes are pytrees: they pass through jit, scan and remat as
        their leaves do.
      rules: primitive name -> rule. A rule takes the equation and its inputs and returns the
        outputs, boxes or arrays, or `Decline`.
      open: (box, equation, reason) -> the array that the box stands for.
      slice_leading: box -> the box as a scan sees it when it iterates over the leading axis, or
        None if that axis cannot be cut.
      shard: (box, PartitionSpec, mesh) -> (box, the PartitionSpecs of its leaves) as it enters a
        shard_map, or None if the shards cut it where it cannot be cut.
      note: called with every equation that met no box, its inputs and outputs; `None` to skip.
    """

    is_box: Callable[[Any], bool]
    rules: Mapping[str, Callable[[_compat.JaxprEqn, list[Any]], "list[Any] | Decline"]]
    open: Callable[[Any, _compat.JaxprEqn, str], jax.Array]
    slice_leading: Callable[[Any], Any]
    shard: Callable[[Any, Any, Any], tuple[Any, Any] | None]
    note: Callable[[_compat.JaxprEqn, list[Any], list[Any]], None] | None = None


def interpret(table: Table, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of `jaxpr` (closed) on `args`; both may hold boxes."""
    return _run(table, jaxpr, args, {})


def interpret_equations(
    table: Table, eqns: Sequence[_compat.JaxprEqn], values: Mapping[Any, Any]
) -> dict[Any, Any]:
    """The values of all variables after some equations, from those before; both may hold boxes."""
    after = dict(values)
    _equations(table, eqns, after, {})
    return after


def _run(table: Table, jaxpr: Any, args: Sequence[Any], jits: dict) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    values: dict[Any, Any] = {}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    _equations(table, jaxpr.eqns, values, jits)
    return [_read(v, values) for v in jaxpr.outvars]


def _read(atom: Any, values: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, _compat.Literal) else values[atom]


def _equations(
    table: Table, eqns: Sequence[_compat.JaxprEqn], values: dict[Any, Any], jits: dict
) -> None:
    for eqn in eqns:
        inputs = [_read(v, values) for v in eqn.invars]
        with _compat.equation_context(eqn):
            outputs = _step(table, eqn, inputs, jits)
        values.update(zip(eqn.outvars, outputs, strict=True))


def _step(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    if not any(map(table.is_box, inputs)):
        outputs = _compat.bind(eqn, inputs)
        if table.note is not None:
            table.note(eqn, inputs, outputs)
        return outputs
    name = eqn.primitive.name
    if name in _ENTER:
        return _ENTER[name](table, eqn, inputs, jits)
    rule = table.rules.get(name)
    result = Decline(f"{name} has no rule for it") if rule is None else rule(eqn, inputs)
    if isinstance(result, Decline):
        return _compat.bind(eqn, [_open(table, v, eqn, result.reason) for v in inputs])
    return result


def _open(table: Table, value: Any, eqn: _compat.JaxprEqn, reason: str) -> Any:
    return table.open(value, eqn, reason) if table.is_box(value) else value


def _jit(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    """One function per inner jaxpr and structure of boxes: layers called n times lower once."""
    params = eqn.params
    inner = params["jaxpr"]
    key = (id(inner), jax.tree.structure(inputs))
    if key not in jits:

        def call(*args: Any) -> list[Any]:
            return _run(table, inner, args, jits)

        call.__name__ = params["name"]
        boxed = [table.is_box(v) for v in inputs]
        jits[key] = jax.jit(call, **_compat.jit_options(params, boxed))
    return jits[key](*inputs)


def _remat(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params = eqn.params

    def call(*args: Any) -> list[Any]:
        return _run(table, params["jaxpr"], args, jits)

    return jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])(*inputs)


def _scan(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params = eqn.params
    body, _ = _compat.open_jaxpr(params["jaxpr"])
    num_consts, num_carry = _compat.scan_counts(params)
    consts, rest = inputs[:num_consts], inputs[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]
    moving = _Moving(table, eqn, carry, body.outvars, body.invars[num_consts:])
    sliced = []
    for x in xs:
        cut = table.slice_leading(x) if table.is_box(x) else x
        reason = "scan iterates over a blocked axis"
        sliced.append(_open(table, x, eqn, reason) if cut is None else cut)

    def step(state: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = _run(table, params["jaxpr"], [*consts, *moving.join(state), *x], jits)
        ys = [_open(table, v, eqn, "a scan stacks it") for v in outs[num_carry:]]
        return moving.part(outs[:num_carry]), ys

    options = {k: params[k] for k in ("length", "reverse", "unroll") if k in params}
    end, ys = jax.lax.scan(step, moving.part(carry), sliced, **options)
    return moving.join(end) + list(ys)


def _while(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, rest = inputs[:num_cond], inputs[num_cond:]
    body_consts, carry = rest[:num_body], rest[num_body:]
    body, _ = _compat.open_jaxpr(params["body_jaxpr"])
    moving = _Moving(table, eqn, carry, body.outvars, body.invars[num_body:])

    def cond(state: list[Any]) -> Any:
        return _run(table, params["cond_jaxpr"], [*cond_consts, *moving.join(state)], jits)[0]

    def step(state: list[Any]) -> list[Any]:
        args = [*body_consts, *moving.join(state)]
        return moving.part(_run(table, params["body_jaxpr"], args, jits))

    return moving.join(jax.lax.while_loop(cond, step, moving.part(carry)))


class _Moving:
    """The carries of a loop that change: a boxed one that the body hands on is a constant."""

    def __init__(
        self,
        table: Table,
        eqn: _compat.JaxprEqn,
        carry: Sequence[Any],
        outvars: Sequence[Any],
        invars: Sequence[Any],
    ) -> None:
        handed_on = [out is var for out, var in zip(outvars[: len(carry)], invars, strict=False)]
        self._fixed = [table.is_box(v) and kept for v, kept in zip(carry, handed_on, strict=True)]
        self._carry, self._table, self._eqn = carry, table, eqn

    def part(self, values: Sequence[Any]) -> list[Any]:
        """The values that change, opened."""
        pairs = zip(values, self._fixed, strict=True)
        reason = "the loop changes it"
        return [_open(self._table, v, self._eqn, reason) for v, fixed in pairs if not fixed]

    def join(self, state: Sequence[Any]) -> list[Any]:
        """All carries, those that change from `state`."""
        rest = iter(state)
        pairs = zip(self._carry, self._fixed, strict=True)
        return [v if fixed else next(rest) for v, fixed in pairs]


def _cond(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    """Enters all branches. An output stays boxed only if all of them return it held alike."""
    index, *operands = inputs
    branches = eqn.params["branches"]
    index = _open(table, index, eqn, "it chooses a branch")

    def plain(branch: Any) -> list[Any]:
        outs = jax.eval_shape(lambda *args: _run(table, branch, args, jits), *operands)
        return [jax.tree.structure(v) for v in outs]

    alike = [len(set(trees)) == 1 for trees in zip(*map(plain, branches), strict=True)]

    def enter(branch: Any) -> Callable[..., list[Any]]:
        def call(*args: Any) -> list[Any]:
            outs = zip(_run(table, branch, args, jits), alike, strict=True)
            reason = "the branches hold it differently"
            return [v if same else _open(table, v, eqn, reason) for v, same in outs]

        return call

    return list(jax.lax.switch(index, [enter(b) for b in branches], *operands))


def _shard_map(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params, values, specs = eqn.params, [], []
    for value, spec in zip(inputs, params["in_specs"], strict=True):
        entered = table.shard(value, spec, params["mesh"]) if table.is_box(value) else (value, spec)
        reason = "a shard of the shard_map would cut its blocks"
        entered = entered or (_open(table, value, eqn, reason), spec)
        values.append(entered[0])
        specs.append(entered[1])

    def call(*args: Any) -> list[Any]:
        outs = _run(table, params["jaxpr"], args, jits)
        return [_open(table, v, eqn, "a shard_map returns it") for v in outs]

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    return list(mapped(*values))


_ENTER = {
    "jit": _jit,
    "pjit": _jit,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
