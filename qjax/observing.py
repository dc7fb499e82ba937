"""Runs a jaxpr and collects, for tagged parameters, statistics of what they are multiplied with.

Nothing is differentiated here, so `jit` and `remat` are evaluated in line; loops and branches hand
the statistics of their bodies out, stacked for a weight that is itself stacked along the loop and
summed for one that every iteration uses. An equation that meets no tagged parameter is bound
unchanged.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax import _compat, token_masks
from qjax.algorithms.base import Stats
from qjax.operands import Masks, Operand, operands
from qjax.sites import MOVES, ValueNumbers
from qjax.statistics import add, empty, reduced
from qjax.structural import CannotCarry
from qjax.tagged import (
    Axes,
    Tagged,
    Values,
    array_of,
    arrays_of,
    carried_on,
    in_loop,
    in_shards,
    slice_of,
    starts_of,
)
from qjax.token_masks import Mask


class Use(NamedTuple):
    """One use of a parameter: which total it reads, and what the leading axes of that are."""

    path: str
    name: str
    loops: tuple[Axes | None, ...]
    lead: tuple[Axes, ...]


_INLINE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}


class Observer:
    """One walk through a function.

    Args:
      needs: by path, the fields of Stats that are wanted; the parameters not named are no concern.
      shapes: by path, the shape of the parameter.
    """

    def __init__(self, needs: Mapping[str, frozenset[str]], shapes: Mapping[str, Axes]) -> None:
        self._needs, self._shapes = needs, shapes
        self._values = ValueNumbers()
        self._equations: dict[int, int] = {}
        self._scopes: list[dict[str, Stats]] = [{}]
        self._names: dict[Any, str] = {}
        self._uses: dict[tuple[str, str], Use] = {}
        self._stacked: dict[tuple[str, int], bool] = {}
        self._depth = 0
        self._entries = self._entered = 0

    def tagged(self, path: str, value: Any) -> Any:
        """`value` tagged as the parameter of that path, if statistics are wanted for it."""
        if path not in self._needs:
            return value
        return Tagged(value, path, tuple((a,) for a in range(value.ndim)))

    def run(self, jaxpr: Any, args: Sequence[Any], masks: Sequence[Mask]) -> tuple[Values, Masks]:
        """The outputs of a closed jaxpr, and their masks."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        values: dict[Any, Any] = {}
        values.update(zip(jaxpr.constvars, ((c, None) for c in consts), strict=True))
        values.update(zip(jaxpr.invars, zip(args, masks, strict=True), strict=True))
        read = lambda v: (v.val, None) if isinstance(v, _compat.Literal) else values[v]
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            with _compat.equation_context(eqn):
                outputs = self.step(eqn, [v for v, _ in inputs], [m for _, m in inputs])
            values.update(zip(eqn.outvars, zip(*outputs, strict=True), strict=True))
        outputs = [read(v) for v in jaxpr.outvars]
        return [v for v, _ in outputs], [m for _, m in outputs]

    def totals(self) -> dict[str, Stats]:
        """By path, what was collected; weights with the same input have the same object."""
        found: dict[str, Stats] = {}
        made: dict[Any, Stats] = {}
        for use in self._uses.values():
            dims = [
                *(a for d, a in enumerate(use.loops) if self._stacked[use.name, d]),
                *use.lead,
            ]
            key = (use.name, tuple(dims), self._shapes[use.path] if any(dims) else None)
            if key not in made:
                made[key] = _on_lead_axes(self._scopes[0][use.name], dims, self._shapes[use.path])
            total = made[key]
            before = found.get(use.path)
            if before is not None and _lead(before) != _lead(total):
                raise ValueError(
                    f"{use.path}: one use stacks {_lead(before)} of it and another {_lead(total)}, "
                    "so their statistics do not add up; quantize it without an algorithm"
                )
            found[use.path] = total if before is None else add(before, total)
        return found

    # --- equations

    def step(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        """One equation."""
        name, tagged = eqn.primitive.name, any(isinstance(v, Tagged) for v in inputs)
        if name in _INLINE and (tagged or any(m is not None for m in masks)):
            return self.run(eqn.params[_INLINE[name]], inputs, masks)
        if not tagged:
            return self.bound(eqn, inputs, masks)
        if name in MOVES and isinstance(inputs[0], Tagged):
            moved = self._move(eqn, inputs)
            if moved is not None:
                return moved, [None] * len(moved)
        if name == "optimization_barrier":
            outputs = _compat.bind(eqn, arrays_of(inputs))
            again = [
                dataclasses.replace(v, value=o) if isinstance(v, Tagged) else o
                for v, o in zip(inputs, outputs, strict=True)
            ]
            return again, masks
        return self.use(eqn, inputs, masks)

    def use(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        """An equation that takes a tagged parameter and does not merely move it."""
        if eqn.primitive.name in _ENTER:
            return _ENTER[eqn.primitive.name](self, eqn, inputs, masks)
        self.observe(eqn, inputs, masks)
        return self.bound(eqn, arrays_of(inputs), masks)

    def observe(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> None:
        """Collects what one equation tells; of a matmul the weight's shape is enough."""
        if eqn.primitive.name in _ENTER:
            self.use(eqn, inputs, masks)
        for site in operands(eqn, inputs, masks):
            self._collect(eqn, site)

    def bound(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        """An equation bound as it was traced, with the masks of its outputs."""
        outputs = _compat.bind(eqn, inputs)
        self._values.note(eqn, inputs, outputs)
        return outputs, token_masks.follow(eqn, inputs, masks, outputs)

    def _move(self, eqn: _compat.JaxprEqn, inputs: Values) -> Values | None:
        box = inputs[0]
        try:
            axes = MOVES[eqn.primitive.name](eqn.params, box.value.shape, box.axes)
        except CannotCarry:
            return None
        outputs = self.move(eqn, inputs)
        starts = starts_of(eqn, box, outputs)
        return [
            dataclasses.replace(box, value=v, axes=tuple(axes), starts=s)
            for v, s in zip(outputs, starts, strict=True)
        ]

    def move(self, eqn: _compat.JaxprEqn, inputs: Values) -> Values:
        """The outputs of a structural operation on a parameter."""
        return _compat.bind(eqn, arrays_of(inputs))

    # --- statistics

    def key(self, site: "Operand") -> Any:
        """Equal for operands that have the same statistics."""
        needs = self._needs[site.box.path]
        return (self._values.key(site.x), site.signature(self._shapes[site.box.path]), needs)

    def _collect(self, eqn: _compat.JaxprEqn, site: "Operand") -> None:
        path = site.box.path
        number = self._equations.setdefault(id(eqn), len(self._equations))
        key = (*self.key(site), self._entries)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"{path}@{number}"
            self._emit(name, site.totals(self._shapes[path], self._needs[path]))
        use = Use(path, name, site.box.loops, site.lead)
        self._uses.setdefault((path, name), use)

    def _emit(self, name: str, total: Stats) -> None:
        scope = self._scopes[-1]
        scope[name] = add(scope[name], total) if name in scope else total

    @contextlib.contextmanager
    def _scope(self) -> Iterator[dict[str, Stats]]:
        """Collects what the body of a loop or branch emits."""
        self._scopes.append({})
        self._entered += 1
        outer, self._entries = self._entries, self._entered
        try:
            yield self._scopes[-1]
        finally:
            self._scopes.pop()
            self._entries = outer

    @contextlib.contextmanager
    def _loop(self) -> Iterator[int]:
        self._depth += 1
        try:
            yield self._depth - 1
        finally:
            self._depth -= 1

    # --- loops and branches

    def _scan(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        params = eqn.params
        num_consts, num_carry = _compat.scan_counts(params)
        body, _ = _compat.open_jaxpr(params["jaxpr"])
        first_x = num_consts + num_carry
        fixed = carried_on(
            inputs[num_consts:first_x], body.outvars, body.invars[num_consts:first_x]
        )
        outer = [in_loop(v, None) for v in inputs[:num_consts]]
        carried = [
            in_loop(v, None) if f else array_of(v)
            for v, f in zip(inputs[num_consts:first_x], fixed, strict=True)
        ]
        carry_masks = masks[num_consts:first_x]
        xs, x_masks = inputs[first_x:], masks[first_x:]

        def step(state: Values, x: tuple[Values, Masks]) -> Any:
            sliced, sliced_masks = x
            rest = iter(state)
            carry = [v if f else next(rest) for v, f in zip(carried, fixed, strict=True)]
            boxes = [slice_of(v, s) for v, s in zip(xs, sliced, strict=True)]
            cut = [
                s if s is not None else (None if m is None else m[0])
                for m, s in zip(x_masks, sliced_masks, strict=True)
            ]
            with self._scope() as emitted:
                outs, out_masks = self.run(
                    params["jaxpr"],
                    [*outer, *carry, *boxes],
                    [*masks[:num_consts], *carry_masks, *cut],
                )
            outs = arrays_of(outs)
            moving = [v for v, f in zip(outs[:num_carry], fixed, strict=True) if not f]
            return moving, outs[num_carry:], out_masks[num_carry:], emitted

        state = [v for v, f in zip(carried, fixed, strict=True) if not f]
        long = [None if m is None or m.shape[0] == 1 else m for m in x_masks]
        arrays = (arrays_of(xs), long)
        with self._loop() as depth:
            one = jax.tree.map(
                lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype),
                jax.tree.map(jnp.asarray, arrays),
            )
            shapes = jax.eval_shape(step, state, one)[3]
            stacked = {n for n in shapes if self._is_stacked(n, depth)}
            start = {n: empty(shapes[n]) for n in shapes if n not in stacked}

            def whole(state: Any, x: Any) -> Any:
                moving, ys, y_masks, emitted = step(state[0], x)
                summed = {n: add(state[1][n], emitted[n]) for n in start}
                return (moving, summed), (ys, y_masks, {n: emitted[n] for n in stacked})

            options = {k: params[k] for k in ("length", "reverse", "unroll") if k in params}
            (end, summed), (ys, y_masks, stacks) = lax.scan(
                whole, (state, start), arrays, **options
            )
        for name, total in (summed | stacks).items():
            self._emit(name, total)
        rest = iter(end)
        kept = inputs[num_consts:first_x]
        final = [v if f else next(rest) for v, f in zip(kept, fixed, strict=True)]
        return [*final, *ys], [*carry_masks, *y_masks]

    def _is_stacked(self, name: str, depth: int) -> bool:
        users = [u for u in self._uses.values() if u.name == name]
        found = any(u.loops[depth] is not None for u in users)
        self._stacked[name, depth] = found
        return found

    def _while(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        params = eqn.params
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        first = num_cond + num_body
        body, _ = _compat.open_jaxpr(params["body_jaxpr"])
        fixed = carried_on(inputs[first:], body.outvars, body.invars[num_body:])
        outer = [in_loop(v, None) for v in inputs[num_cond:first]]
        carried = [
            in_loop(v, None) if f else array_of(v)
            for v, f in zip(inputs[first:], fixed, strict=True)
        ]

        def carry(state: Values) -> Values:
            rest = iter(state)
            return [v if f else next(rest) for v, f in zip(carried, fixed, strict=True)]

        def step(state: Values) -> tuple[Values, dict[str, Stats]]:
            with self._scope() as emitted:
                args = [*outer, *carry(state)]
                outs, _ = self.run(params["body_jaxpr"], args, masks[num_cond:])
            return [array_of(v) for v, f in zip(outs, fixed, strict=True) if not f], emitted

        def proceed(state: Any) -> Any:
            args = [*arrays_of(inputs[:num_cond]), *arrays_of(carry(state[0]))]
            return self.run(params["cond_jaxpr"], args, [None] * len(args))[0][0]

        def whole(state: Any) -> Any:
            moving, emitted = step(state[0])
            return moving, {n: add(state[1][n], emitted[n]) for n in state[1]}

        state = [v for v, f in zip(carried, fixed, strict=True) if not f]
        with self._loop() as depth:
            shapes = jax.eval_shape(step, state)[1]
            for name in shapes:
                self._stacked[name, depth] = False
            end, summed = lax.while_loop(proceed, whole, (state, empty(shapes)))
        for name, total in summed.items():
            self._emit(name, total)
        rest = iter(end)
        final = [v if f else next(rest) for v, f in zip(inputs[first:], fixed, strict=True)]
        return final, masks[first:]

    def _cond(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        index, *operands = inputs
        plain = arrays_of(operands)

        def enter(branch: Any) -> Callable[..., Any]:
            def call(*values: Any) -> Any:
                boxes = [
                    dataclasses.replace(v, value=new) if isinstance(v, Tagged) else new
                    for v, new in zip(operands, values, strict=True)
                ]
                with self._scope() as emitted:
                    outs, _ = self.run(branch, boxes, masks[1:])
                return arrays_of(outs), emitted

            return call

        calls = [enter(branch) for branch in eqn.params["branches"]]
        shapes: dict[str, Any] = {}
        for call in calls:
            shapes |= jax.eval_shape(call, *plain)[1]

        def complete(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*values: Any) -> Any:
                outs, emitted = call(*values)
                return outs, empty(shapes) | emitted

            return run

        outs, emitted = lax.switch(array_of(index), [complete(c) for c in calls], *plain)
        for name, total in emitted.items():
            self._emit(name, total)
        return list(outs), token_masks.follow(eqn, [array_of(index), *plain], masks, outs)

    def _shard_map(
        self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks
    ) -> tuple[Values, Masks]:
        """Every shard observes its own tokens of whole features, and they are summed."""
        params, names = eqn.params, tuple(sorted(eqn.params["newly_manual_axes"]))
        boxes = [
            in_shards(v, spec) if isinstance(v, Tagged) else None
            for v, spec in zip(inputs, params["in_specs"], strict=True)
        ]
        held = [(i, m) for i, m in enumerate(masks) if m is not None]
        mask_specs = [_mask_spec(m, params["in_specs"][i]) for i, m in held]

        def call(values: Values, kept: list[Any]) -> Any:
            inside: Masks = [None] * len(values)
            for (i, _), m in zip(held, kept, strict=True):
                inside[i] = m
            args = [
                v if box is None else dataclasses.replace(box, value=v)
                for v, box in zip(values, boxes, strict=True)
            ]
            with self._scope() as emitted:
                outs, _ = self.run(params["jaxpr"], args, inside)
            checked = params["check_vma"]
            return arrays_of(outs), {n: _over_shards(t, names, checked) for n, t in emitted.items()}

        outs, emitted = jax.shard_map(
            call,
            mesh=params["mesh"],
            in_specs=(list(params["in_specs"]), mask_specs),
            out_specs=(list(params["out_specs"]), PartitionSpec()),
            axis_names=params["newly_manual_axes"],
            check_vma=params["check_vma"],
        )(arrays_of(inputs), [m for _, m in held])
        for name, total in emitted.items():
            self._emit(name, total)
        return list(outs), token_masks.follow(eqn, arrays_of(inputs), masks, outs)


_ENTER: Mapping[str, Callable[..., tuple[Values, Masks]]] = {
    "shard_map": Observer._shard_map,
    "scan": Observer._scan,
    "while": Observer._while,
    "cond": Observer._cond,
}


def _mask_spec(mask: jax.Array, spec: Any) -> PartitionSpec:
    entries = [*spec, *[None] * (mask.ndim - len(spec))]
    return PartitionSpec(*(e if s != 1 else None for e, s in zip(entries, mask.shape, strict=True)))


def _over_shards(total: Stats, names: tuple[str, ...], checked: bool) -> Stats:
    """Totals over all shards; replicas count again, which no mean and no ratio notices."""
    if total.samples is not None:
        raise ValueError("samples cannot be kept inside a shard_map; use an algorithm without them")

    def over(name: str, v: jax.Array) -> jax.Array:
        alike = tuple(n for n in names if n not in _compat.varying_axes(v)) if checked else ()
        v = lax.pcast(v, alike, to="varying") if alike else v
        return lax.pmax(v, names) if name == "max_abs" else lax.psum(v, names)

    fields = {f.name: getattr(total, f.name) for f in dataclasses.fields(Stats)}
    return Stats(**{n: over(n, v) for n, v in fields.items() if v is not None})


def _lead(total: Stats) -> Axes:
    assert total.count is not None
    return total.count.shape


def _on_lead_axes(total: Stats, dims: Sequence[Axes | None], shape: Axes) -> Stats:
    """Totals whose leading axes hold `dims`, on the parameter's axes in rising order; what no axis
    of the parameter stands for is summed.
    """
    for d in reversed([d for d, axes in enumerate(dims) if axes is None]):
        total = reduced(total, d)
    axes = [a for group in dims if group is not None for a in group]
    sizes = [shape[a] for a in axes]
    count = sum(group is not None for group in dims)
    if count == len(axes) and axes == sorted(axes):
        return total
    order = sorted(range(len(axes)), key=lambda i: axes[i])

    def place(leaf: jax.Array) -> jax.Array:
        split = leaf.reshape(*sizes, *leaf.shape[count:])
        return lax.transpose(split, (*order, *range(len(axes), split.ndim)))

    return jax.tree.map(place, total)
