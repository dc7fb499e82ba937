"""Runs an algorithm on weights of a model: matrices in, QTensors on the parameters' axes out."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.algorithms.base import Algorithm, Notes, Stats
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.matrices import Layout, from_matrices, layout, pad_stats, to_matrices
from qjax.qtensor import QTensor, dequantize
from qjax.quantizing import quantize
from qjax.spec import Spec
from qjax.statistics import SAMPLES
from qjax.structural import CannotCarry, static_slice

MIN_TOKENS = 64


class Task(NamedTuple):
    """One weight to quantize; `input_key` is equal for weights with the same input."""

    path: str
    w: jax.Array
    spec: Spec
    axis: tuple[int, ...]
    batch_axis: tuple[int, ...]
    algorithm: Algorithm
    stats: Stats | None
    input_key: Any = None


class Solved(NamedTuple):
    """What an algorithm did to one weight.

    Attributes:
      path: of the parameter.
      error_before: of round-to-nearest with the same Spec, relative to the output; see
        `relative_error`.
      error_after: of the algorithm.
      notes: what the algorithm tells, such as the damping used: the largest over layers and
        experts.
      tokens: how many tokens calibration saw; None without statistics.
      few: how many experts saw fewer than `min_tokens` and took no statistics.
      seconds: what quantizing took, a weight's share of those solved together.
    """

    path: str
    error_before: float
    error_after: float
    notes: dict[str, float]
    tokens: int | None
    few: int
    seconds: float

    def __str__(self) -> str:
        text = f"{self.path}: error {self.error_before:.3g} -> {self.error_after:.3g}"
        text += "".join(f", {name} {value:.3g}" for name, value in self.notes.items())
        text += "" if self.tokens is None else f", {self.tokens} tokens"
        text += f", {self.few} experts with too few tokens" if self.few else ""
        return f"{text}, {self.seconds:.2f} s"


def solve(
    tasks: Sequence[Task], min_tokens: int, log: Callable[[Solved], None] | None
) -> dict[str, QTensor]:
    """Quantizes every task; those that share an input are given to a joint algorithm at once.

    Raises:
      ValueError: naming the path, if statistics are missing, have another shape or are not finite,
        or if there were no tokens.
    """
    groups: dict[Any, list[tuple[Task, Layout, Spec]]] = {}
    for task in tasks:
        with _named(task.path):
            how, spec = layout(task.w.shape, task.axis, task.batch_axis, task.spec)
        together = task.algorithm.joint and task.input_key is not None
        apart = spec.block == () or isinstance(spec.block, tuple) or spec.scale_spec is not None
        alone = None if together and not apart else task.path
        shape = (how.lead_shape, how.rows, how.inner, task.w.dtype)
        key = (alone, task.input_key, task.algorithm, spec, shape)
        groups.setdefault(key, []).append((task, how, spec))
    results: dict[str, QTensor] = {}
    for group in groups.values():
        results |= _solve_group(group, min_tokens, log)
    return {task.path: results[task.path] for task in tasks}


def _solve_group(
    group: Sequence[tuple[Task, Layout, Spec]],
    min_tokens: int,
    log: Callable[[Solved], None] | None,
) -> dict[str, QTensor]:
    start = time.perf_counter()
    tasks, layouts, specs = map(tuple, zip(*group, strict=True))
    first, spec, how = tasks[0], specs[0], layouts[0]
    name = " + ".join(t.path for t in tasks)
    stats, few, tokens = _checked(first, how, min_tokens)
    weights = tuple(t.w for t in tasks)
    with _named(name):
        q, notes = _run(weights, pad_stats(stats, how), first.algorithm, spec, layouts)
        q = first.algorithm.finish(q, notes)
        try:
            done = _placed(q, layouts)
        except CannotCarry as why:
            raise ValueError(
                f"shape {first.w.shape}, contracted over {first.axis}: what {first.algorithm.name} "
                f"made of it cannot take the weight's own axes, since {why}; choose options that "
                "change no coordinates, or a group that divides the innermost contracted axis"
            ) from why
    if log is not None:
        errors = jax.device_get(_errors(weights, done, stats, first.spec, layouts))
        spent = (time.perf_counter() - start) / len(tasks)
        held = {k: float(np.max(v)) for k, v in jax.device_get(notes).items()}
        for task, (before, after) in zip(tasks, errors, strict=True):
            log(Solved(task.path, float(before), float(after), held, tokens, few, spent))
    return dict(zip((t.path for t in tasks), done, strict=True))


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Puts a path in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(task: Task, how: Layout, min_tokens: int) -> tuple[Stats, int, int | None]:
    """The statistics that the algorithm reads, how many experts took none, and how many tokens."""
    needs = task.algorithm.needs
    if not needs:
        return Stats(), 0, None
    what = f"{task.path}: {task.algorithm.name} needs {', '.join(sorted(needs))} of its input"
    if task.stats is None:
        raise ValueError(
            f"{what}, and there are no Stats for it; collect them with "
            "stats = qjax.calibrate(fn, params, batches, recipe) and give them to "
            "quantize_params(params, recipe, sites, stats=stats), or call "
            "qjax.quantize_sequential(fn, params, batches, recipe)"
        )
    rows = how.rows // how.inner * how.shape[how.contracted[-1]]
    for field in sorted(needs | {"count"}):
        leaf = getattr(task.stats, field)
        if leaf is None:
            raise ValueError(
                f"{what}, and its Stats have no {field}; they were collected for another recipe: "
                "call qjax.calibrate(fn, params, batches, recipe) with this one"
            )
        ends = {"hessian": (rows, rows), "count": (), "samples": (SAMPLES, rows)}
        needed = (*how.lead_shape, *ends.get(field, (rows,)))
        if leaf.shape != needed:
            raise ValueError(
                f"{task.path}: the {field} of its Stats has shape {leaf.shape}, needed {needed} "
                f"for a weight of shape {how.shape}; calibrate the same function and parameters"
            )
    stats = Stats(**{f: getattr(task.stats, f) for f in (*needs, "count")})
    assert stats.count is not None
    if isinstance(stats.count, Tracer):
        return _settled(stats, min_tokens, len(how.lead))[0], 0, None
    count = np.asarray(stats.count)
    if not count.any():
        raise ValueError(
            f"{task.path}: calibration saw no tokens for it, so {task.algorithm.name} has nothing "
            "to go by; give batches in which the model uses it and a mask that keeps some tokens, "
            f"or Rule({task.path!r}, {str(task.spec)!r}), which needs no calibration"
        )
    settled, few = _settled(stats, min_tokens, len(how.lead)) if how.lead else (stats, 0)
    bad = [f for f in sorted(needs) if not np.all(jax.device_get(_finite(getattr(settled, f))))]
    if bad:
        raise ValueError(
            f"{task.path}: the {bad[0]} of its input is not finite, so an activation was NaN, Inf "
            "or beyond float32; run the float model on the batches, and mask or mend those that "
            "overflow"
        )
    return settled, int(few), int(count.sum())


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _settled(stats: Stats, min_tokens: int, lead: int) -> tuple[Stats, jax.Array]:
    """Statistics of white noise in place of those of experts with too few tokens."""
    assert stats.count is not None
    count = stats.count
    few = (count < min_tokens) & (count < jnp.max(count))

    def instead(leaf: jax.Array | None, value: Any) -> jax.Array | None:
        if leaf is None or not lead:
            return leaf
        chosen = few.reshape(*few.shape, *(1,) * (leaf.ndim - lead))
        return jnp.where(chosen, value(leaf), leaf)

    ones: Any = jnp.ones_like
    largest = lambda v: jnp.broadcast_to(jnp.max(v, tuple(range(lead)), keepdims=True), v.shape)
    eye = lambda v: jnp.broadcast_to(
        jnp.eye(v.shape[-1], dtype=v.dtype).reshape((1,) * lead + v.shape[-2:]), v.shape
    )
    changed = Stats(
        hessian=instead(stats.hessian, eye),
        mean_abs=instead(stats.mean_abs, ones),
        max_abs=instead(stats.max_abs, largest),
        second_moment=instead(stats.second_moment, ones),
        samples=instead(stats.samples, jnp.zeros_like),
        count=count,
    )
    return changed, jnp.sum(few)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(
    weights: tuple[jax.Array, ...],
    stats: Stats,
    algorithm: Algorithm,
    spec: Spec,
    layouts: tuple[Layout, ...],
) -> tuple[QTensor, Notes]:
    """The weights side by side along out, solved once for each index of the leading axes."""
    w = jnp.concatenate([to_matrices(w, how) for w, how in zip(weights, layouts, strict=True)], -1)
    run: Callable[..., Any] = lambda w, stats: algorithm.quantize(w, spec, stats)
    for _ in layouts[0].lead:
        run = jax.vmap(run)
    return run(w, stats)


@functools.partial(jax.jit, static_argnums=(1,))
def _placed(q: QTensor, layouts: tuple[Layout, ...]) -> tuple[QTensor, ...]:
    """The QTensor of weights side by side, cut and on the axes of each."""
    fmt = FORMATS[q.format]
    if "uint1" in fmt.storage:  # packed bits cannot be cut along their axis: cut whole codes
        whole = dataclasses.replace(q, qvalue=join_planes(fmt, q.qvalue), format="uint8")
        parts = _placed(whole, layouts)
        split = lambda codes: split_planes(fmt, codes)
        return tuple(dataclasses.replace(v, qvalue=split(v.qvalue), format=q.format) for v in parts)
    done, start = [], 0
    for how in layouts:
        stop = start + how.columns
        low, high = [0] * q.ndim, list(q.shape)
        low[-1], high[-1] = start, stop
        part = q if len(layouts) == 1 else static_slice(q, low, high)
        done.append(from_matrices(part, how))
        start = stop
    return tuple(done)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _errors(
    weights: tuple[jax.Array, ...],
    done: tuple[QTensor, ...],
    stats: Stats,
    spec: Spec,
    layouts: tuple[Layout, ...],
) -> list[tuple[jax.Array, jax.Array]]:
    found = []
    for w, q, how in zip(weights, done, layouts, strict=True):
        exact = to_matrices(w, how._replace(group=1)).astype(jnp.float32)
        nearest = quantize(w, spec._replace(activation=None), how.contracted, batch_axis=how.lead)
        pair = [to_matrices(dequantize(v), how._replace(group=1)) for v in (nearest, q)]
        found.append(tuple(relative_error(exact, v.astype(jnp.float32), stats) for v in pair))
    return found


def relative_error(w: jax.Array, approximation: jax.Array, stats: Stats) -> jax.Array:
    """How far the output of a weight `[*lead, in, out]` is off, as a part of its energy.

    sum((x (w - a))^2) / sum((x w)^2) over the tokens x of calibration, which is
    tr(d^T H d) / tr(w^T H w) with d = w - a and H the Hessian. Without a Hessian H is the diagonal
    of second moments, or of the squares of what else is known; without statistics, the identity.
    """
    hessian = stats.hessian
    if hessian is not None:
        energy = lambda v: jnp.sum(v * jnp.matmul(hessian, v))
    else:
        moment = next(
            (
                power(leaf)
                for leaf, power in (
                    (stats.second_moment, lambda v: v),
                    (stats.mean_abs, jnp.square),
                    (stats.max_abs, jnp.square),
                )
                if leaf is not None
            ),
            jnp.ones(w.shape[:-1], jnp.float32),
        )
        energy = lambda v: jnp.sum(v * v * moment[..., None])
    return energy(w - approximation) / jnp.maximum(energy(w), jnp.finfo(jnp.float32).tiny)
