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
      note: called with every equation that met no box, its inputs and outputs; `None` to skip.
    """

    is_box: Callable[[Any], bool]
    rules: Mapping[str, Callable[[_compat.JaxprEqn, list[Any]], "list[Any] | Decline"]]
    open: Callable[[Any, _compat.JaxprEqn, str], jax.Array]
    slice_leading: Callable[[Any], Any]
    note: Callable[[_compat.JaxprEqn, list[Any], list[Any]], None] | None = None


def interpret(table: Table, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of `jaxpr` (closed) on `args`; both may hold boxes."""
    return _run(table, jaxpr, args, {})


def _run(table: Table, jaxpr: Any, args: Sequence[Any], jits: dict) -> list[Any]:
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        with _compat.equation_context(eqn):
            outputs = _step(table, eqn, inputs, jits)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


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
    """Enters the body. A carry stays boxed, as a constant, only if the body hands it on."""
    params = eqn.params
    body, _ = _compat.open_jaxpr(params["jaxpr"])
    num_consts, num_carry = _compat.scan_counts(params)
    consts, carry, xs = (
        inputs[:num_consts],
        inputs[num_consts:][:num_carry],
        inputs[num_consts + num_carry :],
    )
    fixed = {
        i
        for i in range(num_carry)
        if table.is_box(carry[i]) and body.outvars[i] is body.invars[num_consts + i]
    }
    start = [
        _open(table, v, eqn, "the scan body changes it")
        for i, v in enumerate(carry)
        if i not in fixed
    ]
    sliced = []
    for x in xs:
        cut = table.slice_leading(x) if table.is_box(x) else x
        sliced.append(
            _open(table, x, eqn, "scan iterates over a blocked axis") if cut is None else cut
        )

    def step(moving: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        rest = iter(moving)
        full = [carry[i] if i in fixed else next(rest) for i in range(num_carry)]
        outs = _run(table, params["jaxpr"], [*consts, *full, *x], jits)
        after = [
            _open(table, v, eqn, "the scan body changes it")
            for i, v in enumerate(outs[:num_carry])
            if i not in fixed
        ]
        return after, [_open(table, v, eqn, "a scan stacks it") for v in outs[num_carry:]]

    options = {k: params[k] for k in ("length", "reverse", "unroll") if k in params}
    end, ys = jax.lax.scan(step, start, sliced, **options)
    rest = iter(end)
    return [carry[i] if i in fixed else next(rest) for i in range(num_carry)] + list(ys)


_ENTER = {
    "jit": _jit,
    "pjit": _jit,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
}
