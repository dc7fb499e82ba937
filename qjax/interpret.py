"""Evaluates a jaxpr equation by equation with some values boxed. Knows nothing of quantization.

A box stands in for an array. A `Table` says what a primitive does when it meets one; without a
rule, or when the rule declines, the box is opened into the array that it stands for and the
equation runs as it was traced. An equation that meets no box is bound unchanged, whatever it is.
"""

import ast
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax

from qjax import _compat


class Decline(NamedTuple):
    """A rule's answer when it cannot carry a box: the boxes are opened, and this is why."""

    reason: str


class Thread:
    """A pytree of arrays that runs through an evaluation in program order, beside its values.

    Rules read and replace `value`. Calls, loops and branches take it in and hand it out, so that
    what a rule put there in one iteration is what the next one finds.

    Attributes:
      value: what it holds now; rules keep its structure, shapes and dtypes.
      split: (value, count) -> (value, which of its leaves have been given a leading axis of
        `count` shards), as it enters a shard_map; the other leaves stay equal on all of them.
      join: the value again, from what the shards hand out.
    """

    def __init__(
        self, value: Any, split: Callable[[Any, int], tuple[Any, Any]], join: Callable[[Any], Any]
    ) -> None:
        self.value, self.split, self.join = value, split, join


JointRule: TypeAlias = Callable[
    [Sequence[_compat.JaxprEqn], Sequence[list[Any]]], Sequence[list[Any] | None]
]


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
      thread: what the rules carry from equation to equation; `None` for nothing.
      joint: primitive name -> rule for several of its equations that share an operand, each with a
        box beside it. It takes the equations and their inputs, the first in program order first,
        and returns the outputs of each that it took, None for the others.
      early: primitives that may run before their turn, to bring the box of a later such equation.
      joins: whether a box is one that a joint rule may take; the others are not searched for mates.
      calls: name of a jitted function -> rule for a call of it that meets a box: (equation, inputs,
        *static arguments) -> outputs, or `Decline`, and the call is entered. See `call_name`.
    """

    is_box: Callable[[Any], bool]
    rules: Mapping[str, Callable[[_compat.JaxprEqn, list[Any]], "list[Any] | Decline"]]
    open: Callable[[Any, _compat.JaxprEqn, str], jax.Array]
    slice_leading: Callable[[Any], Any]
    shard: Callable[[Any, Any, Any], tuple[Any, Any] | None]
    note: Callable[[_compat.JaxprEqn, list[Any], list[Any]], None] | None = None
    thread: Thread | None = None
    joint: Mapping[str, JointRule] = MappingProxyType({})
    early: Collection[str] = ()
    joins: Callable[[Any], bool] = lambda box: False
    calls: Mapping[str, Callable[..., "list[Any] | Decline"]] = MappingProxyType({})


def call_name(name: str, *static: Any) -> str:
    """What a jitted function must be called for the rule `name` of `Table.calls`; `static` is what
    its body was traced with, Python literals.
    """
    return f"{name}{static!r}"


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
    done: set[int] = set()
    mates = _Mates(table, eqns) if table.joint else None

    def run(at: int) -> None:
        eqn = eqns[at]
        inputs = [_read(v, values) for v in eqn.invars]
        with _compat.equation_context(eqn):
            outputs = _step(table, eqn, inputs, jits)
        values.update(zip(eqn.outvars, outputs, strict=True))
        done.add(at)

    for at, eqn in enumerate(eqns):
        if at in done:
            continue
        if mates is not None and len(together := mates.of(at, values, run)) > 1:
            inputs = [[_read(v, values) for v in eqns[i].invars] for i in together]
            rule = table.joint[eqn.primitive.name]
            with _compat.equation_context(eqn):
                found = rule([eqns[i] for i in together], inputs)
            for i, outputs in zip(together, found, strict=True):
                if outputs is not None:
                    values.update(zip(eqns[i].outvars, outputs, strict=True))
                    done.add(i)
        if at not in done:
            run(at)


class _Mates:
    """Which equations share an operand with one of a joint primitive, and can run with it."""

    def __init__(self, table: Table, eqns: Sequence[_compat.JaxprEqn]) -> None:
        self._table, self._eqns = table, eqns
        self._readers: dict[Any, list[int]] = {}  # variable -> joint equations that read it
        self._makers: dict[Any, int] = {}  # variable -> the equation that may run early to make it
        for at, eqn in enumerate(eqns):
            if eqn.primitive.name in table.joint:
                for v in eqn.invars:
                    if not isinstance(v, _compat.Literal):
                        self._readers.setdefault(v, []).append(at)
            elif eqn.primitive.name in table.early:
                self._makers.update(dict.fromkeys(eqn.outvars, at))

    def of(self, at: int, values: Mapping[Any, Any], run: Callable[[int], None]) -> list[int]:
        """`at` and its mates; `run` has been called with what had to run before its turn."""
        eqn, is_box = self._eqns[at], self._table.is_box
        if eqn.primitive.name not in self._table.joint:
            return [at]
        known = [v for v in eqn.invars if not isinstance(v, _compat.Literal)]
        boxes = [values[v] for v in known if is_box(values[v])]
        shared = [v for v in known if not is_box(values[v])]
        if len(shared) != 1 or not boxes or not all(map(self._table.joins, boxes)):
            return [at]
        found = [at]
        for other in self._readers[shared[0]]:
            same = self._eqns[other].primitive is eqn.primitive
            if other <= at or not same or self._eqns[other].outvars[0] in values:
                continue
            before = self._before(self._eqns[other], values)
            if before is None:
                continue
            for i in before:
                if self._eqns[i].outvars[0] not in values:
                    run(i)
            if sum(is_box(_read(v, values)) for v in self._eqns[other].invars) == 1:
                found.append(other)
        return found

    def _before(self, eqn: _compat.JaxprEqn, values: Mapping[Any, Any]) -> list[int] | None:
        """What must run first, in order; None if that is more than moving values about."""
        order: list[int] = []
        for v in eqn.invars:
            if isinstance(v, _compat.Literal) or v in values:
                continue
            if v not in self._makers:
                return None
            inner = self._before(self._eqns[self._makers[v]], values)
            if inner is None:
                return None
            order += [*inner, self._makers[v]]
        return order


def _step(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    if not any(map(table.is_box, inputs)):
        outputs = _compat.bind(eqn, inputs)
        if table.note is not None:
            table.note(eqn, inputs, outputs)
        return outputs
    name = eqn.primitive.name
    if name in _ENTERED:
        return _ENTERED[name](table, eqn, inputs, jits)
    rule = table.rules.get(name)
    result = Decline(f"{name} has no rule for it") if rule is None else rule(eqn, inputs)
    if isinstance(result, Decline):
        return _compat.bind(eqn, [_open(table, v, eqn, result.reason) for v in inputs])
    return result


def _enter(table: Table, jaxpr: Any, args: Sequence[Any], held: Any, jits: dict) -> list[Any]:
    """The outputs of an inner jaxpr, and last what the thread holds after it."""
    if table.thread is None:
        return [*_run(table, jaxpr, args, jits), ()]
    table.thread.value = held
    outputs = _run(table, jaxpr, args, jits)
    held, table.thread.value = table.thread.value, None  # no tracer outlives its trace
    return [*outputs, held]


def _leave(table: Table, outputs: Sequence[Any]) -> list[Any]:
    """The outputs without their last, which the thread takes."""
    if table.thread is not None:
        table.thread.value = outputs[-1]
    return list(outputs[:-1])


def _held(table: Table) -> Any:
    return () if table.thread is None else table.thread.value


def _open(table: Table, value: Any, eqn: _compat.JaxprEqn, reason: str) -> Any:
    return table.open(value, eqn, reason) if table.is_box(value) else value


def _jit(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    """One function per inner jaxpr and structure of boxes: layers called n times lower once."""
    params = eqn.params
    name, parenthesis, static = params["name"].partition("(")
    if parenthesis and name in table.calls:
        outputs = table.calls[name](eqn, inputs, *ast.literal_eval(parenthesis + static))
        if not isinstance(outputs, Decline):
            return outputs
    inner = params["jaxpr"]
    key = (id(inner), jax.tree.structure(inputs))
    if key not in jits:

        def call(*args: Any) -> list[Any]:
            return _enter(table, inner, args[:-1], args[-1], jits)

        call.__name__ = params["name"]
        boxed = [table.is_box(v) for v in inputs]
        jits[key] = jax.jit(call, **_compat.jit_options(params, boxed))
    return _leave(table, jits[key](*inputs, _held(table)))


def _remat(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params = eqn.params

    def call(*args: Any) -> list[Any]:
        return _enter(table, params["jaxpr"], args[:-1], args[-1], jits)

    again = jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return _leave(table, again(*inputs, _held(table)))


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
        args = [*consts, *moving.join(state[:-1]), *x]
        *outs, held = _enter(table, params["jaxpr"], args, state[-1], jits)
        ys = [_open(table, v, eqn, "a scan stacks it") for v in outs[num_carry:]]
        return [*moving.part(outs[:num_carry]), held], ys

    options = {k: params[k] for k in ("length", "reverse", "unroll") if k in params}
    end, ys = jax.lax.scan(step, [*moving.part(carry), _held(table)], sliced, **options)
    return moving.join(_leave(table, end)) + list(ys)


def _while(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params = eqn.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, rest = inputs[:num_cond], inputs[num_cond:]
    body_consts, carry = rest[:num_body], rest[num_body:]
    body, _ = _compat.open_jaxpr(params["body_jaxpr"])
    moving = _Moving(table, eqn, carry, body.outvars, body.invars[num_body:])

    def cond(state: list[Any]) -> Any:
        args = [*cond_consts, *moving.join(state[:-1])]
        return _enter(table, params["cond_jaxpr"], args, state[-1], jits)[0]

    def step(state: list[Any]) -> list[Any]:
        args = [*body_consts, *moving.join(state[:-1])]
        *outs, held = _enter(table, params["body_jaxpr"], args, state[-1], jits)
        return [*moving.part(outs), held]

    end = jax.lax.while_loop(cond, step, [*moving.part(carry), _held(table)])
    return moving.join(_leave(table, end))


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

    held = _held(table)

    def plain(branch: Any) -> list[Any]:
        run = lambda *args: _enter(table, branch, args[:-1], args[-1], jits)[:-1]
        return [jax.tree.structure(v) for v in jax.eval_shape(run, *operands, held)]

    alike = [len(set(trees)) == 1 for trees in zip(*map(plain, branches), strict=True)]

    def enter(branch: Any) -> Callable[..., list[Any]]:
        def call(*args: Any) -> list[Any]:
            *outs, after = _enter(table, branch, args[:-1], args[-1], jits)
            reason = "the branches hold it differently"
            pairs = zip(outs, alike, strict=True)
            return [*(v if same else _open(table, v, eqn, reason) for v, same in pairs), after]

        return call

    return _leave(table, jax.lax.switch(index, [enter(b) for b in branches], *operands, held))


def _shard_map(table: Table, eqn: _compat.JaxprEqn, inputs: list[Any], jits: dict) -> list[Any]:
    params, values, specs = eqn.params, [], []
    for value, spec in zip(inputs, params["in_specs"], strict=True):
        entered = table.shard(value, spec, params["mesh"]) if table.is_box(value) else (value, spec)
        reason = "a shard of the shard_map would cut its blocks"
        entered = entered or (_open(table, value, eqn, reason), spec)
        values.append(entered[0])
        specs.append(entered[1])
    mesh, manual = params["mesh"], params["newly_manual_axes"]
    held, per_shard, thread = (), (), table.thread
    if thread is not None:
        held, per_shard = thread.split(thread.value, math.prod(mesh.shape[a] for a in manual))
    axes = tuple(a for a in mesh.axis_names if a in manual)
    spec = jax.sharding.PartitionSpec
    over = jax.tree.map(lambda own: spec(axes) if own else spec(), per_shard)
    held = jax.tree.map(lambda v, where: _compat.laid_out(v, mesh, where), held, over)

    def call(*args: Any) -> list[Any]:
        mine = jax.tree.map(lambda v, own: v[0] if own else v, args[-1], per_shard)
        *outs, after = _enter(table, params["jaxpr"], args[:-1], mine, jits)
        outs = [_open(table, v, eqn, "a shard_map returns it") for v in outs]
        return [*outs, jax.tree.map(lambda v, own: v[None] if own else v, after, per_shard)]

    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(*specs, over),
        out_specs=[*params["out_specs"], over],
        axis_names=manual,
        check_vma=params["check_vma"],
    )
    *outs, after = mapped(*values, held)
    if thread is not None:
        whole = jax.tree.map(lambda v: _compat.laid_out(v, mesh, spec()), after)
        thread.value = thread.join(whole)
    return outs


_ENTERED = {
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
