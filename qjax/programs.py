"""A function as one flat list of equations, with a marker before each use of a weight.

What `quantize_sequential` walks: jits and remats are in line, scans over layers are unrolled, and
the equations between two markers are a stretch that runs as one jitted function. Stretches that are
alike, as those of equal layers are, share it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from qjax import _compat
from qjax.algorithms.base import Stats
from qjax.interpret import Table, interpret_equations
from qjax.observing import Observer
from qjax.operands import Masks, operands
from qjax.statistics import add, empty
from qjax.tagged import Tagged, Values
from qjax.token_masks import Mask

_marker = Primitive("qjax_marker")  # takes what an observation needs, returns nothing
_marker.multiple_results = True
_marker.def_abstract_eval(lambda *avals, **params: [])

_LOOPS = ("scan", "while", "cond", "shard_map")


class Unit(NamedTuple):
    """What is quantized at once: a parameter, or one layer of it where its scan is unrolled."""

    path: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


class Marker(NamedTuple):
    """A use of weights: before which equation, of which units, and from what it is observed.

    `group` is equal for uses of the same input. `tags` has an entry for each input of the equation:
    a weight, whose value is a shape where that is enough, or None. `atoms` are the inputs that are
    not such weights, then the masks of those that are `masked`.
    """

    index: int
    units: tuple[Unit, ...]
    group: str
    eqn: _compat.JaxprEqn
    tags: tuple[Tagged | None, ...]
    masked: tuple[bool, ...]
    atoms: tuple[Any, ...]


class Source(NamedTuple):
    """Where an input of a program comes from: "param" (path), "layer" (Unit), "index" (layer),
    "batch" (position) or "const" (value).
    """

    kind: str
    what: Any


class Program(NamedTuple):
    """A flat function.

    `markers` are in order, and stand at the equation before which they are observed.
    """

    eqns: tuple[_compat.JaxprEqn, ...]
    sources: Mapping[Any, Source]
    markers: tuple[Marker, ...]


@dataclasses.dataclass(frozen=True)
class _Later:
    """A moved weight that is not made before it is used, since by then it may be in codes."""

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Any]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def _made(value: Any) -> Any:
    """The array of a value that may be tagged and may be made later."""
    value = value.value if isinstance(value, Tagged) else value
    return value.make() if isinstance(value, _Later) else value


def _whole(path: str, value: Any) -> Tagged:
    return Tagged(value, path, tuple((a,) for a in range(value.ndim)))


def unrolled(
    jaxpr: Any, paths: Sequence[str | None], needs: Mapping[str, frozenset[str]]
) -> dict[str, int]:
    """The parameters whose every use is a scan over their leading axis, and the lengths of it.

    `paths` has the path of each input of the jaxpr that is a parameter.
    """
    planner = _Planner(needs, {})

    def walk(*values: Any) -> None:
        boxes = [
            v if p is None else planner.tagged(p, v) for p, v in zip(paths, values, strict=True)
        ]
        planner.run(jaxpr, boxes, [None] * len(boxes))

    jax.eval_shape(walk, *_inputs(jaxpr))
    return planner.unrolled()


def _inputs(jaxpr: Any) -> list[jax.ShapeDtypeStruct]:
    avals = [v.aval for v in _compat.open_jaxpr(jaxpr)[0].invars]
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]


def flatten(
    jaxpr: Any,
    paths: Sequence[str | None],
    needs: Mapping[str, frozenset[str]],
    masks: Callable[[list[Any]], list[Mask]],
) -> Program:
    """The program of a closed jaxpr whose inputs are parameters, then the arrays of a batch.

    Args:
      jaxpr: of the function.
      paths: of the parameters, None for each array of the batch.
      needs: by path, the fields of Stats wanted; these weights are marked.
      masks: arrays of the batch -> their masks.
    """
    lengths = unrolled(jaxpr, paths, needs)
    avals = _inputs(jaxpr)
    by_path = {p: a for p, a in zip(paths, avals, strict=True) if p is not None}
    layers = [Unit(path, i) for path, n in lengths.items() for i in range(n)]
    slices = [
        jax.ShapeDtypeStruct(by_path[u.path].shape[1:], by_path[u.path].dtype) for u in layers
    ]
    indices = [jax.ShapeDtypeStruct((), jnp.int32)] * max(lengths.values(), default=0)
    count = sum(p is not None for p in paths)
    units = {str(u): u for u in (*layers, *map(Unit, by_path))}
    all_needs = {str(u): needs[u.path] for u in units.values() if u.path in needs}
    shapes = {p: a.shape for p, a in by_path.items()}
    shapes |= {str(u): s.shape for u, s in zip(layers, slices, strict=True)}

    def flat(values: list[Any], parts: list[Any], numbers: list[Any]) -> list[Any]:
        named = {str(u): v for u, v in zip(layers, parts, strict=True)}
        walk = _Flattener(all_needs, shapes, lengths, named, numbers)
        tagged = [v if p is None else walk.tagged(p, v) for p, v in zip(paths, values, strict=True)]
        none: Masks = [None] * count
        outs, _ = walk.run(jaxpr, tagged, [*none, *masks(values[count:])])
        return list(map(_made, outs))

    made = jax.make_jaxpr(flat)(avals, slices, indices)
    inner, consts = _compat.open_jaxpr(made)
    origin = [
        *(Source("param", p) for p in paths if p is not None),
        *(Source("batch", i) for i in range(len(paths) - count)),
        *(Source("layer", u) for u in layers),
        *(Source("index", i) for i in range(len(indices))),
    ]
    sources = dict(zip(inner.invars, origin, strict=True))
    sources |= {v: Source("const", c) for v, c in zip(inner.constvars, consts, strict=True)}
    eqns, markers = [], []
    for eqn in inner.eqns:
        if eqn.primitive is _marker:
            at = len(eqns)
            of = tuple(units[name] for name in eqn.params["units"])
            group, use, tags, masked = (eqn.params[n] for n in ("group", "eqn", "tags", "masked"))
            markers.append(Marker(at, of, group, use, tags, masked, tuple(eqn.invars)))
        else:
            eqns.append(eqn)
    return Program(tuple(eqns), sources, tuple(markers))


class _Planner(Observer):
    """Finds the parameters that only scans take, and those whole along their leading axis."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._scans: list[tuple[dict[str, int], set[str]]] = []

    def use(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        direct: dict[str, int] = {}
        others = {v.path for v in inputs if isinstance(v, Tagged)}
        if eqn.primitive.name == "scan":
            first = sum(_compat.scan_counts(eqn.params))
            for v in inputs[first:]:
                if isinstance(v, Tagged) and v.whole:
                    direct[v.path] = v.value.shape[0]
            others = {v.path for v in inputs[:first] if isinstance(v, Tagged)} | (
                others - direct.keys()
            )
        self._scans.append((direct, others))
        outputs = _compat.bind(eqn, [v.value if isinstance(v, Tagged) else v for v in inputs])
        return outputs, [None] * len(outputs)

    def unrolled(self) -> dict[str, int]:
        bad: set[str] = set()
        while True:
            worse = set(bad)
            for direct, others in self._scans:
                if others or worse & direct.keys():
                    worse |= others | direct.keys()
            if worse == bad:
                return {p: n for d, _ in self._scans for p, n in d.items() if p not in bad}
            bad = worse


class _Flattener(Observer):
    """Evaluates everything in line, and binds a marker before each use of a tagged parameter."""

    def __init__(
        self,
        needs: Mapping[str, frozenset[str]],
        shapes: Mapping[str, Any],
        lengths: Mapping[str, int],
        layers: Mapping[str, Any],
        indices: Sequence[Any],
    ) -> None:
        super().__init__(needs, shapes)
        self._lengths, self._layers, self._indices = lengths, layers, indices
        self._groups: dict[Any, str] = {}

    def step(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        """Weights pass an optimization barrier."""
        if eqn.primitive.name == "optimization_barrier":
            rest = [v for v in inputs if not isinstance(v, Tagged)]
            passed = iter(lax.optimization_barrier(rest) if rest else [])
            return [v if isinstance(v, Tagged) else next(passed) for v in inputs], masks
        return super().step(eqn, inputs, masks)

    def move(self, eqn: _compat.JaxprEqn, inputs: Values) -> Values:
        """The outputs of a structural operation on a weight, made when they are used."""

        def later(i: int) -> Callable[[], Any]:
            return lambda: _compat.bind(eqn, list(map(_made, inputs)))[i]

        avals: list[Any] = [v.aval for v in eqn.outvars]
        return [_Later(a.shape, a.dtype, later(i)) for i, a in enumerate(avals)]

    def use(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        name, boxes = eqn.primitive.name, [v for v in inputs if isinstance(v, Tagged)]
        if name == "scan" and all(v.path in self._lengths for v in boxes):
            return self._unroll(eqn, inputs, masks)
        sites = operands(eqn, inputs, masks)
        if name in _LOOPS or sites:
            key = self.key(sites[0]) if len(sites) == 1 else ("whole", len(self._groups))
            group = self._groups.setdefault(key, f"g{len(self._groups)}")
            self._mark(eqn, inputs, masks, group, values=len(sites) != 1)
        return self.bound(eqn, list(map(_made, inputs)), masks)

    def _mark(
        self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks, group: str, values: bool
    ) -> None:
        """Binds a marker; it gets the `values` of weights where an observation reads them."""
        boxes = [v for v in inputs if isinstance(v, Tagged)]
        shape = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)
        tags = [
            dataclasses.replace(v, value=None if values else shape(v.value))
            if isinstance(v, Tagged)
            else None
            for v in inputs
        ]
        _marker.bind(
            *(_made(v) for v in inputs if values or not isinstance(v, Tagged)),
            *(m for m in masks if m is not None),
            units=tuple(dict.fromkeys(v.path for v in boxes)),
            group=group,
            eqn=eqn,
            tags=tuple(tags),
            masked=tuple(m is not None for m in masks),
        )

    def _unroll(self, eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> tuple[Values, Masks]:
        params = eqn.params
        num_consts, num_carry = _compat.scan_counts(params)
        first = num_consts + num_carry
        carry, carry_masks = inputs[num_consts:first], masks[num_consts:first]
        xs, x_masks = inputs[first:], masks[first:]
        length = params["length"]
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        rows: dict[int, tuple[Values, Masks]] = {}
        for i in order:
            parts = [self._layer(x, i) for x in xs]
            part_masks = [self._mask(m, i) for m in x_masks]
            outs, out_masks = self.run(
                params["jaxpr"],
                [*inputs[:num_consts], *carry, *parts],
                [*masks[:num_consts], *carry_masks, *part_masks],
            )
            outs = list(map(_made, outs))
            carry, carry_masks = outs[:num_carry], out_masks[:num_carry]
            rows[i] = outs[num_carry:], out_masks[num_carry:]
        outputs = [rows[i][0] for i in range(length)]
        ys = [jnp.stack(column) for column in zip(*outputs, strict=True)]
        return [*carry, *ys], [*carry_masks, *[None] * len(ys)]

    def _layer(self, x: Any, i: int) -> Any:
        if not isinstance(x, Tagged):
            return lax.dynamic_index_in_dim(x, self._indices[i], 0, keepdims=False)
        unit = str(Unit(x.path, i))
        part, dtype = self._layers[unit], x.value.dtype
        if part.dtype != dtype:
            part = _Later(part.shape, dtype, lambda: self._layers[unit].astype(dtype))
        return _whole(unit, part)

    def _mask(self, m: Mask, i: int) -> Mask:
        if m is None or m.shape[0] == 1:
            return None if m is None else m[0]
        return lax.dynamic_index_in_dim(m, self._indices[i], 0, keepdims=False)


class Runner:
    """Runs stretches of programs and observes markers; functions that are alike are jitted once."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._stretches: dict[Any, Callable[..., Any]] = {}
        self._observers: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def stretch(
        self, eqns: Sequence[_compat.JaxprEqn], wanted: Sequence[Any]
    ) -> tuple[Sequence[Any], Callable[[list[Any]], list[Any]]]:
        """The variables that `eqns` read from before, and their values -> those of `wanted`."""
        inputs, key = _signature(eqns, wanted)
        if key not in self._stretches:

            def run(values: list[Any]) -> list[Any]:
                known = dict(zip(inputs, values, strict=True))
                after = interpret_equations(self._table, eqns, known)
                return [self._opened(after[v]) for v in wanted]

            self._stretches[key] = jax.jit(run)
        return inputs, self._stretches[key]

    def _opened(self, value: Any) -> Any:
        return self._table.open(value, None, "it is kept") if self._table.is_box(value) else value  # pyright: ignore[reportArgumentType]

    def observer(
        self, marker: Marker, needs: Mapping[str, frozenset[str]], shapes: Mapping[Unit, Any]
    ) -> Callable[[dict[int, Stats] | None, Sequence[Any]], dict[int, Stats]]:
        """(totals by position in `marker.units`, values of its atoms) -> those of both."""
        number = {str(u): i for i, u in enumerate(marker.units)}
        tags = tuple(
            t if t is None else dataclasses.replace(t, path=str(number[t.path]))
            for t in marker.tags
        )
        wants = tuple(needs[u.path] for u in marker.units)
        sizes = tuple(shapes[u] for u in marker.units)
        eqn = marker.eqn
        plain = [t if t is None else (t.value, t.path, t.axes, t.starts, t.loops) for t in tags]
        key = (_text(eqn), *plain, marker.masked, wants, sizes)

        def collect(values: Sequence[Any]) -> dict[int, Stats]:
            values = [self._opened(v) for v in values]
            by_number = lambda leaves: {str(i): v for i, v in enumerate(leaves)}
            walk = Observer(by_number(wants), by_number(sizes))
            rest = iter(values)
            inputs: Values = []
            for t in tags:
                if t is None:
                    inputs.append(next(rest))
                else:
                    value = next(rest) if t.value is None else t.value
                    inputs.append(dataclasses.replace(t, value=value))
            walk.observe(eqn, inputs, [next(rest) if m else None for m in marker.masked])
            return {int(path): total for path, total in walk.totals().items()}

        def observe(totals: dict[int, Stats] | None, values: Sequence[Any]) -> dict[int, Stats]:
            if key not in self._observers:
                step = lambda totals, values: {
                    i: add(totals[i], t) for i, t in collect(values).items()
                }
                found = jax.eval_shape(collect, values)
                self._observers[key] = jax.jit(step, donate_argnums=0), found
            step, found = self._observers[key]
            return step(empty(found) if totals is None else totals, values)

        return observe


def _signature(
    eqns: Sequence[_compat.JaxprEqn], wanted: Sequence[Any]
) -> tuple[list[Any], tuple[Any, ...]]:
    """The variables that come from outside, in order; and what is equal for equal stretches."""
    numbers: dict[Any, int] = {}
    inputs: list[Any] = []
    rows: list[Any] = []

    def number(atom: Any) -> Any:
        if isinstance(atom, _compat.Literal):
            return _literal(atom)
        if atom not in numbers:
            inputs.append(atom)
            numbers[atom] = len(numbers)
        return numbers[atom]

    for eqn in eqns:
        read = tuple(number(v) for v in eqn.invars)
        for v in eqn.outvars:
            numbers[v] = len(numbers)
        rows.append((_text(eqn), read, tuple(numbers[v] for v in eqn.outvars)))
    outs = tuple(number(v) for v in wanted)
    return inputs, (tuple(rows), outs)


def _text(eqn: _compat.JaxprEqn) -> Any:
    """Equal for equations that compute the same from their inputs."""
    params = eqn.params
    if eqn.primitive.name.startswith("custom_"):  # what differentiates it is never called here
        params = {"call_jaxpr": params["call_jaxpr"], "num_consts": params["num_consts"]}
    ordered = sorted(params.items(), key=lambda item: item[0])
    return eqn.primitive.name, str(ordered), tuple(_constants([v for _, v in ordered]))


def _constants(value: Any) -> Iterator[Any]:
    """What printing a jaxpr leaves out: arrays inside of it."""
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _constants(v)
    elif hasattr(getattr(value, "jaxpr", value), "eqns"):
        inner, consts = _compat.open_jaxpr(value)
        yield from map(id, consts)
        for eqn in inner.eqns:
            yield from (_literal(v) for v in eqn.invars if isinstance(v, _compat.Literal))
            yield from _constants(list(eqn.params.values()))


def _literal(atom: Any) -> Any:
    value = np.asarray(atom.val)
    return value.tobytes(), str(value.dtype), value.shape


def reads(eqns: Sequence[_compat.JaxprEqn]) -> Iterator[Any]:
    """The variables that equations read."""
    for eqn in eqns:
        yield from (v for v in eqn.invars if not isinstance(v, _compat.Literal))
