"""quantize_sequential: calibrates and quantizes a model in one pass, site after site."""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax import _compat, tracing, trees
from qjax.algorithms.base import Stats
from qjax.calibration import Call, wanted
from qjax.io.folder import read_folder, write_folder
from qjax.programs import Program, Runner, Unit, flatten, reads
from qjax.qtensor import QTensor, is_qtensor
from qjax.recipe import Recipe
from qjax.run import Box, dense_leaf, run_table
from qjax.solving import MIN_TOKENS, Solved, Task, solve
from qjax.spec import Spec
from qjax.statistics import add, finished
from qjax.transform import Decision, apply_decisions, decide

Log = Callable[[Solved], None]

# By how many bytes the live values of all batches may grow from stop to stop: at most so many, and
# not by more than this part of the parameters.
_SPARE, _SPARE_PART = 2 << 30, 1 / 8


def quantize_sequential(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe | Spec | str,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    *,
    mask: Callable[..., Any] | None = None,
    min_tokens: int = MIN_TOKENS,
    log: Log | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Any:
    """Quantizes a model in one pass, each weight from activations of what is quantized already.

    The function is traced once for each shape of batch and walked along its data flow. Before the
    first use of a weight whose algorithm needs statistics all batches are brought there, the
    statistics of its input are collected, the weight is quantized, and the walk goes on with its
    codes. Weights with the same input (q, k and v) are quantized together. Of the batches only the
    values that later equations read are kept, of the weights one site at a time is copied.

    - A scan over layers is unrolled, layer by layer, if it holds nothing else to be calibrated.
    - A weight that is a constant of a scan, or inside of `while`, `cond` or `shard_map`, is
      observed while that operation runs as a whole on float weights, and quantized before it runs
      again on codes.
    - A weight that is used several times is quantized at its last matmul, from the inputs of all;
      before, it runs as it was.
    - Weights whose algorithm needs no statistics are quantized at the start.

    Args:
      fn, params: as for `calibrate`.
      batches: as for `calibrate`, in something that can be iterated again, such as a list.
      recipe: as for `quantize_params`.
      checkpoint_dir: a folder where every site is saved once it is done. Called again with the same
        arguments, a run that was killed continues there and gives the same bits (on the same
        machine: another one may sum in another order).
      mask: as for `calibrate`.
      min_tokens: as for `quantize_params`.
      log: called with what the algorithm did to each weight: output error before and after, damping
        and seconds.
      progress: hands on the sites, and may show how far it is, such as `rich.progress.track`.

    Returns:
      The quantized pytree, ready for `quantized(fn)`; stacked layers are stacked again.

    Raises:
      ValueError: as `calibrate` and `quantize_params`; if `batches` can be iterated only once; or
        if `checkpoint_dir` holds a run on other batches, parameters or another recipe.

    Example:
      >>> params = {"w": jnp.eye(4), "v": jnp.eye(4)}
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
      >>> batches = [jax.random.normal(jax.random.key(i), (8, 4)) for i in range(2)]
      >>> recipe = qjax.Recipe(qjax.Rule(".*", "int4", qjax.gptq()))
      >>> quantize_sequential(fn, params, batches, recipe)["v"]
      QTensor(int4, shape=(4, 4), block=(4, 1), dtype=float32)
    """
    recipe = Recipe.of(recipe)
    if iter(batches) is batches:
        raise ValueError(
            "quantize_sequential: the batches can be iterated only once, so a run could not be "
            "resumed; give a list, such as list(batches)"
        )
    calls = [Call.of(fn, params, batch, mask) for batch in batches]
    if not calls:
        raise ValueError("quantize_sequential: there are no batches; give at least one")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    named = {tracing.param_path(p): v for p, v in leaves}
    sites = calls[0].sites
    decisions = decide(named, recipe, sites)
    needed = wanted(calls[0], recipe)
    rest = {path: v for path, v in named.items() if path not in needed}
    held = named | apply_decisions(rest, decisions, sites, None, min_tokens, log)
    saved = None if checkpoint_dir is None else _Saved(checkpoint_dir, calls, named, recipe)
    work = _Walk(calls, held, tree, needed)
    for visit in progress(work.visits()):
        done = None if saved is None else saved.load(visit.number)
        if done is None:
            entries: list[Solved] = []
            done = work.quantize(visit, min_tokens, entries.append if log is not None else None)
            if saved is not None:
                saved.store(visit.number, done)
            if log is not None:
                for entry in entries:
                    log(entry)
        work.take(done)
    return jax.tree.unflatten(tree, [work.result(path) for path in named])


class _Visit(NamedTuple):
    """A stop of the walk: what is observed there, and what is quantized after it."""

    number: int
    position: int  # in the markers of the first program's groups
    ready: tuple[Unit, ...]


class _Batch(NamedTuple):
    """A batch on its way: which program it runs, the stop where it rests (-1 at the start), and the
    values that are alive there.
    """

    program: int
    stop: int
    values: dict[Any, Any]

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in self.values.values())


class _Walk:
    """The state of one pass."""

    def __init__(
        self,
        calls: Sequence[Call],
        held: Mapping[str, Any],
        tree: Any,
        needed: Mapping[str, Decision],
    ) -> None:
        self._held, self._needed = held, needed
        self._needs = {path: d.needs for path, d in needed.items()}
        self._codes: dict[Unit, QTensor] = {}
        self._totals: dict[Unit, Stats] = {}
        self._runner = Runner(run_table(None))
        size = sum(getattr(v, "nbytes", 0) for v in held.values())
        self._spare = min(_SPARE, _SPARE_PART * size)
        self._programs: list[_Path] = []
        numbers: dict[Any, int] = {}
        self._batches: list[_Batch] = []
        for call in calls:
            if call.key not in numbers:
                numbers[call.key] = len(self._programs)
                self._programs.append(_Path(_program(call, held, tree, self._needs), needed))
            program = numbers[call.key]
            start = self._programs[program].start(call.arrays)
            self._batches.append(_Batch(program, -1, start))
        first = self._programs[0].plan
        if any(p.plan != first for p in self._programs[1:]):
            raise ValueError(
                "batches of different shapes use the weights in a different order; give batches "
                "with the same structure and Python values"
            )
        seen = {unit.path for units in first for unit in units}
        missing = [path for path in needed if path not in seen]
        if missing:
            raise ValueError(
                f"{missing[0]}: no matmul that can be observed uses it, so there are no statistics "
                "for its algorithm; give it a Rule without one"
            )

    def visits(self) -> list[_Visit]:
        """The stops in order; a unit is ready at its last one."""
        plan = self._programs[0].plan
        last = {unit: i for i, units in enumerate(plan) for unit in units}
        return [
            _Visit(i, i, tuple(u for u in dict.fromkeys(units) if last[u] == i))
            for i, units in enumerate(plan)
        ]

    def quantize(self, visit: _Visit, min_tokens: int, log: Log | None) -> dict[Unit, QTensor]:
        """Observes all batches at a stop, and quantizes what is ready."""
        found: dict[int, Stats] | None = None
        first = self._programs[0].markers[visit.position][0]
        observers = [self._observer(path, visit.position) for path in self._programs]
        stay: bool | None = None
        for i, batch in enumerate(self._batches):
            path = self._programs[batch.program]
            there = self._ahead(batch, visit.position)
            values = self._reached(path, there, visit.position)
            jax.block_until_ready(found)  # so that two batches at most hold what they compute with
            found = observers[batch.program](found, values)
            stay = self._stays(batch, there, visit) if stay is None else stay
            if not stay:
                self._batches[i] = there
        for batch in self._batches:
            self._programs[batch.program].drop(batch.stop)
        assert found is not None
        by_unit = {u: found[i] for i, u in enumerate(first.units) if i in found}
        # every use of the same input has the totals of the first
        shared = next(iter(by_unit.values()), None) if len(first.units) == 1 else None
        for marker in self._programs[0].markers[visit.position]:
            for unit in marker.units:
                total = by_unit.get(unit, shared)
                if total is not None:
                    before = self._totals.get(unit)
                    self._totals[unit] = total if before is None else add(before, total)
        together = None if shared is None else finished(shared)
        tasks = [
            self._task(u, visit, together if self._totals[u] is shared else None)
            for u in visit.ready
        ]
        for unit in visit.ready:  # a Hessian of many features is large: the sums make room
            del self._totals[unit]
        del found, by_unit, shared, together, total
        done = solve(tasks, min_tokens, log)
        return {unit: done[str(unit)] for unit in visit.ready}

    def take(self, done: Mapping[Unit, QTensor]) -> None:
        """Goes on with these codes."""
        self._codes |= done

    def result(self, path: str) -> Any:
        """What became of a parameter."""
        if path not in self._needed:
            return self._held[path]
        if Unit(path) in self._codes:
            return self._codes[Unit(path)]
        layers = sorted((u for u in self._codes if u.path == path), key=lambda u: u.layer or 0)
        return trees.stack([{path: self._codes[u]} for u in layers])[path]

    def _observer(self, path: "_Path", position: int) -> Callable[..., dict[int, Stats]]:
        marker = path.markers[position][0]
        return self._runner.observer(marker, self._needs, {u: self._shape(u) for u in marker.units})

    def _ahead(self, batch: _Batch, position: int) -> _Batch:
        """A batch at a stop. It is brought from stop to stop, whatever was skipped or run before,
        so that the same programs run.
        """
        path = self._programs[batch.program]
        for stop in range(batch.stop + 1, position + 1):
            if stop not in path.stretches:
                wanted = path.alive(stop)
                path.stretches[stop] = wanted, *self._runner.stretch(path.between(stop), wanted)
            wanted, inputs, run = path.stretches[stop]
            values = run([self._value(path, batch, v) for v in inputs]) if wanted else []
            batch = path.keep(batch, stop, wanted, values)
        return batch

    def _reached(self, path: "_Path", batch: _Batch, position: int) -> list[Any]:
        """What is observed of a batch that rests at a stop."""
        atoms = path.markers[position][0].atoms
        if position not in path.reaches:
            eqns = path.last(position)
            made = {v for eqn in eqns for v in eqn.outvars}
            wanted = [v for v in atoms if not isinstance(v, _compat.Literal) and v in made]
            path.reaches[position] = wanted, *self._runner.stretch(eqns, wanted)
        wanted, inputs, run = path.reaches[position]
        values = run([self._value(path, batch, v) for v in inputs]) if wanted else []
        found = dict(zip(wanted, values, strict=True))
        known = lambda v: not isinstance(v, _compat.Literal) and v in found
        return [found[v] if known(v) else self._value(path, batch, v) for v in atoms]

    def _stays(self, batch: _Batch, there: _Batch, visit: _Visit) -> bool:
        """Whether batches stay at the stop before, since they would hold too much at this one; they
        run from there again for the next. Not at the start, where they are tokens, nor where that
        would run codes that are made here.
        """
        if batch.stop < 0 or batch.stop != visit.position - 1:
            return False
        used = self._programs[0].plan[batch.stop]
        growth = (there.nbytes - batch.nbytes) * len(self._batches)
        return growth > self._spare and not set(used) & set(visit.ready)

    def _task(self, unit: Unit, visit: _Visit, shared: Stats | None) -> Task:
        decision = self._needed[unit.path]
        spec, algorithm = decision.spec, decision.algorithm
        assert spec is not None
        assert algorithm is not None
        down = 0 if unit.layer is None else 1
        axis = tuple(a - down for a in decision.axis)
        batch_axis = tuple(a - down for a in decision.batch_axis if a >= down)
        stats = finished(self._totals[unit]) if shared is None else shared
        key = None if shared is None else visit.number
        return Task(str(unit), self._weight(unit), spec, axis, batch_axis, algorithm, stats, key)

    def _shape(self, unit: Unit) -> tuple[int, ...]:
        shape = self._held[unit.path].shape
        return tuple(shape if unit.layer is None else shape[1:])

    def _weight(self, unit: Unit) -> Any:
        w = self._held[unit.path]
        if unit.layer is None:
            return w
        numpy = isinstance(w, np.ndarray)
        return w[unit.layer] if numpy else jax.lax.dynamic_index_in_dim(w, unit.layer, 0, False)

    def _value(self, path: "_Path", batch: _Batch, atom: Any) -> Any:
        if isinstance(atom, _compat.Literal):
            return atom.val
        if atom in batch.values:
            return batch.values[atom]
        if atom in path.shared:
            return path.shared[atom]
        source = path.program.sources[atom]
        if source.kind == "const":
            return source.what
        if source.kind == "index":
            return jnp.asarray(source.what, jnp.int32)
        unit = source.what if source.kind == "layer" else Unit(source.what)
        if unit in self._codes:
            return Box(self._codes[unit], None)
        w = self._weight(unit)
        return Box(w, None) if is_qtensor(w) else w


_Stretch = tuple[list[Any], Sequence[Any], Callable[..., Any]]  # wanted, inputs, function

# Elementwise, structural and sums: what a norm is made of.
_CHEAP = frozenset(
    "add add_any sub mul div neg square integer_pow sqrt rsqrt max min convert_element_type copy "
    "broadcast_in_dim reshape squeeze expand_dims transpose reduce_sum select_n".split()
)


class _Path:
    """A program and its stops: uses of the same input are one.

    Batches rest at a stop, or a few cheap equations before it where less is alive there: of an
    input and its norm only the input is kept, and the norm is made twice.
    """

    def __init__(self, program: Program, needed: Collection[str]) -> None:
        self.program = program
        groups: dict[str, list[Any]] = {}
        for marker in program.markers:
            groups.setdefault(marker.group, []).append(marker)
        self.markers = [tuple(group) for group in groups.values()]
        self.plan = [tuple(u for m in group for u in m.units) for group in self.markers]
        self.shared: dict[Any, Any] = {}
        self.stretches: dict[int, _Stretch] = {}
        self.reaches: dict[int, _Stretch] = {}
        self._of_batch = self._dependent()
        self._last_eqn, self._last_stop = self._last_reads()
        self._rests = [self._resting(stop, needed) for stop in range(len(self.markers))]

    def start(self, arrays: Sequence[Any]) -> dict[Any, Any]:
        """The values of a batch before the first equation."""
        batch = {v: s.what for v, s in self.program.sources.items() if s.kind == "batch"}
        return {v: arrays[i] for v, i in batch.items()}

    def rest(self, stop: int) -> int:
        """The equation before which batches rest."""
        return 0 if stop < 0 else self._rests[stop]

    def between(self, stop: int) -> Sequence[Any]:
        """The equations from the rest before to this one."""
        return self.program.eqns[self.rest(stop - 1) : self.rest(stop)]

    def last(self, stop: int) -> Sequence[Any]:
        """The equations from the rest to the stop."""
        return self.program.eqns[self.rest(stop) : self.markers[stop][0].index]

    def alive(self, stop: int) -> list[Any]:
        """The variables that `between(stop)` makes and something later reads, in order."""
        made = [v for eqn in self.between(stop) for v in eqn.outvars]
        return [v for v in made if self._is_read(v, stop)]

    def keep(self, batch: _Batch, stop: int, made: Sequence[Any], values: Sequence[Any]) -> _Batch:
        """The batch at a stop: what nothing reads any more is dropped, and what does not depend on
        the batch is kept once.
        """
        mine = {v: x for v, x in batch.values.items() if self._is_read(v, stop)}
        for v, x in zip(made, values, strict=True):
            if v in self._of_batch:
                mine[v] = x
            else:
                self.shared.setdefault(v, x)
        return batch._replace(values=mine, stop=stop)

    def drop(self, stop: int) -> None:
        """Forgets what was kept once and nothing reads from a stop on."""
        self.shared = {v: x for v, x in self.shared.items() if self._is_read(v, stop)}
        self.stretches = {i: run for i, run in self.stretches.items() if i > stop}
        self.reaches = {i: run for i, run in self.reaches.items() if i > stop}

    def _is_read(self, v: Any, stop: int, at: int | None = None) -> bool:
        """Whether anything reads a variable from a stop on, whose rest is `at`."""
        at = self.rest(stop) if at is None else at
        return self._last_eqn.get(v, -1) >= at or self._last_stop.get(v, -1) >= stop

    def _resting(self, stop: int, needed: Collection[str]) -> int:
        """Where the fewest bytes of a batch are alive, at the stop or before cheap equations."""
        index = at = self.markers[stop][0].index
        size = lambda v: math.prod(v.aval.shape) * v.aval.dtype.itemsize
        made = [v for eqn in self.program.eqns[:index] for v in eqn.outvars]
        start = [v for v, s in self.program.sources.items() if s.kind == "batch"]
        alive = [v for v in (*start, *made) if v in self._of_batch and self._is_read(v, stop, at)]
        total = sum(map(size, alive))
        best, least = at, total
        held = set(alive)
        cheap = lambda i: self.program.eqns[i].primitive.name in _CHEAP  # it may as well run twice
        while at > 0 and cheap(at - 1) and not self._takes(at - 1, needed):
            at -= 1
            eqn = self.program.eqns[at]
            held -= set(eqn.outvars)
            held |= {v for v in reads([eqn]) if v in self._of_batch}
            total = sum(map(size, held))
            if total < least:
                best, least = at, total
        return best

    def _takes(self, index: int, needed: Collection[str]) -> bool:
        """Whether an equation reads a weight that will be codes."""
        sources = [self.program.sources.get(v) for v in reads([self.program.eqns[index]])]
        whats = [s.what for s in sources if s is not None and s.kind in ("param", "layer")]
        return any((w.path if isinstance(w, Unit) else w) in needed for w in whats)

    def _last_reads(self) -> tuple[dict[Any, int], dict[Any, int]]:
        """The last equation and the last stop that read each variable."""
        eqns = self.program.eqns[: self.markers[-1][0].index] if self.markers else ()
        in_eqns = {v: i for i, eqn in enumerate(eqns) for v in reads([eqn])}
        at_stops = {
            v: i
            for i, group in enumerate(self.markers)
            for v in group[0].atoms
            if not isinstance(v, _compat.Literal)
        }
        return in_eqns, at_stops

    def _dependent(self) -> set[Any]:
        """The variables that depend on the batch."""
        found = {v for v, s in self.program.sources.items() if s.kind == "batch"}
        for eqn in self.program.eqns:
            if any(v in found for v in reads([eqn])):
                found.update(eqn.outvars)
        return found


def _program(
    call: Call, held: Mapping[str, Any], tree: Any, needs: Mapping[str, frozenset[str]]
) -> Program:
    params = jax.tree.unflatten(tree, list(held.values()))
    args, kwargs = call.arguments(call.arrays)
    leaves, whole = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_qtensor)
    jaxpr = tracing.trace(call.fn, leaves, whole, dense_leaf).jaxpr
    paths = [p for p, v in held.items() if tracing.is_array(v) or is_qtensor(v)]
    return flatten(jaxpr, [*paths, *[None] * len(call.arrays)], needs, call.masks)


class _Saved:
    """Sites that are done, each in a folder of its own that appears whole or not at all."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        calls: Sequence[Call],
        named: Mapping[str, Any],
        recipe: Recipe,
    ) -> None:
        self._path = pathlib.Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        mine = {
            "batches": _digest([v for call in calls for v in (repr(call.key), *call.arrays)]),
            "parameters": _digest([v for p, x in named.items() for v in (p, _sampled(x))]),
            "recipe": _digest([_described(rule) for rule in recipe.rules]),
        }
        manifest = self._path / "run.json"
        if not manifest.exists():
            temporary = manifest.with_suffix(".tmp")
            temporary.write_text(json.dumps(mine))
            temporary.replace(manifest)
        found = json.loads(manifest.read_text())
        for name, digest in mine.items():
            if found.get(name) != digest:
                raise ValueError(
                    f"{self._path}: holds a run with other {name}; give the same {name} to go on "
                    "with it, or another checkpoint_dir"
                )

    def load(self, number: int) -> dict[Unit, QTensor] | None:
        """What was quantized at a stop, if it is there."""
        folder = self._path / f"{number:05d}"
        if not folder.exists():
            return None
        found = read_folder(folder)
        return {Unit(*unit): found.params[i] for i, unit in enumerate(found.metadata["units"])}

    def store(self, number: int, done: Mapping[Unit, QTensor]) -> None:
        codes = dict(enumerate(done.values()))
        write_folder(
            self._path / f"{number:05d}", codes, metadata={"units": [list(u) for u in done]}
        )


def _digest(values: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for v in values:
        if isinstance(v, str):
            sha.update(v.encode())
        else:
            array = np.asarray(v)
            sha.update(f"{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _sampled(value: Any) -> Any:
    """Some elements of a parameter, enough to tell it from another."""
    if is_qtensor(value) or not tracing.is_array(value):
        return repr(value)
    return np.asarray(value.reshape(-1)[:: max(value.size // 4096, 1)])


def _described(rule: Any) -> str:
    text = f"{rule.pattern} {rule.spec!r} {rule.axis}"
    return text if rule.algorithm is None else f"{text} {rule.algorithm}"
