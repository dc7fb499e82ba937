"""GPTQ: round one input feature after the other, and let those to come make up for the error."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import quantizing
from qjax.activation import Activation
from qjax.algorithms.base import Algorithm, Notes, Stats, needed
from qjax.algorithms.clipping import clipped, plain
from qjax.algorithms.grid import AXIS, Grid, nearest
from qjax.formats import FORMATS, Format, split_planes
from qjax.qtensor import QTensor
from qjax.spec import Spec

ActOrder = Literal["static", "dynamic"] | None
Scales = Literal["given", "updated"]

_ATTEMPTS = 4  # dampings tried, each ten times the one before
_SLAB = 1024  # rows that one loop solves; more are halved first, which saves nearly half the work


def gptq(
    damping: float = 0.01,
    act_order: ActOrder = "static",
    scales: Scales = "given",
    block_size: int = 128,
) -> Algorithm:
    """GPTQ: rounds the rows of w `[in, out]` in turn, each corrected for what those before lost.

    With H = X^T X + damping * mean(diag(X^T X)) * I = R D R^T, R unit upper triangular and D
    diagonal, and e the errors of the rows done so far,

        q_k = round(w_k + sum_{j<k} e_j R[j, k])        e_k = w_k - q_k

    which is Algorithm 1 of Frantar et al. (arXiv:2210.17323) as Chee et al. rewrote it (LDLQ,
    arXiv:2307.13304, theorem 6): the same codes, from one Cholesky factor and without the inverse
    of H. `round` takes the nearest value of a grid. With `scales="given"` it is that of `quantize`:
    the scale method and scale dtype of the Spec, chosen from w before the first row is rounded
    (static groups). So every format that `quantize` knows can be solved for. With
    `scales="updated"` a group of rows gets its scale when its turn comes, from what the errors
    before have made of it, w'_k = w_k + sum_j e_j R[j, k]: that of the clip which leaves the least
    sum over its rows of D_k (w'_k - round(w'_k))^2. The error of the output is that sum over all
    rows, with w'_k corrected for the rows of its own group too.

    Args:
      damping: of the mean of the diagonal. Where the factorization fails it is raised tenfold, up
        to three times; then the weight is rounded to nearest.
      act_order: "static" takes rows by falling diag(H) and puts them back, so that nothing changes
        at run time; "dynamic" also forms the groups in that order, and the QTensor carries the
        permutation for its input; None takes rows as they stand. With updated scales "static" keeps
        the rows of a group together, groups by their falling sum of diag(H).
      scales: "given" or "updated", where every group is that of one output and scales have no codes
        of their own.
      block_size: rows whose errors reach the later ones in one matmul (the paper's lazy batches).
        It changes the speed, and rounding in the last place.

    Returns:
      An Algorithm that needs the hessian. Its notes: "damping", the one used, and infinite where
      the weight was rounded to nearest.

    Deviations: a feature that calibration never saw is rounded to nearest; the authors' code sets
    its weights to zero. Such features count neither for the mean of the diagonal. llama.cpp's
    types choose codes before their scale is rounded, so that H = I does not give theirs exactly.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 16))
      >>> w = jax.random.normal(jax.random.key(1), (16, 8))
      >>> stats = qjax.Stats(hessian=x.T @ x)
      >>> q, notes = qjax.gptq().quantize(w, qjax.Spec.parse("int4"), stats)
      >>> error = lambda q: float(jnp.sum((x @ (w - qjax.dequantize(q))) ** 2))
      >>> error(q) < error(qjax.quantize(w, "int4", axis=0))
      True
    """
    if not damping > 0:
        raise ValueError(f"gptq: damping must be positive, got {damping}; the paper's is 0.01")
    if act_order not in ("static", "dynamic", None):
        raise ValueError(f'gptq: act_order must be "static", "dynamic" or None, got {act_order!r}')
    if scales not in ("given", "updated"):
        raise ValueError(f'gptq: scales must be "given" or "updated", got {scales!r}')
    if block_size < 1:
        raise ValueError(f"gptq: block_size must be at least 1, got {block_size}; take 128")

    def quantize(
        w: jax.Array, spec: Spec, stats: Stats, within: jax.Array | None = None
    ) -> tuple[QTensor, Notes]:
        h = needed("gptq", stats, "hessian")
        tiled = spec.block == () or isinstance(spec.block, tuple)
        if scales == "updated" and (tiled or spec.scale_spec is not None):
            raise ValueError(
                f'gptq: scales="updated" needs groups of one output with scales of their own, and '
                f'{spec} has {"tiles" if tiled else "scales in codes"}; take scales="given", or a '
                "spec such as int4_g128"
            )
        return _quantize(w, spec, h, damping, act_order, scales, block_size, within)

    options = f"{damping}, {act_order}, {scales}, {block_size}"
    return Algorithm("gptq", frozenset({"hessian"}), True, quantize, options=options)


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5, 6))
def _quantize(
    w: jax.Array,
    spec: Spec,
    hessian: jax.Array,
    damping: float,
    act_order: ActOrder,
    scales: Scales,
    block_size: int,
    within: jax.Array | None,
) -> tuple[QTensor, Notes]:
    h = hessian.astype(np.promote_types(np.float32, hessian.dtype))
    size = quantizing.block_of(spec, w.shape, (AXIS,))[0]
    kept = size if scales == "updated" and act_order == "static" else 1
    order = None if act_order is None else _order(_diagonal(h)[0], kept)
    if act_order == "dynamic":
        w, within = w[order], None if within is None else within[order]
    factor, variance, seen, used = _factor(h, order, damping)
    there = order if act_order == "static" else None
    back = None if there is None else jnp.argsort(there)
    moved = lambda v, to: v if to is None else v[to]
    fmt, group = FORMATS[spec.format], np.arange(w.shape[0]) // size
    exact = moved(w.astype(factor.dtype), there)

    if scales == "updated":
        rounding = functools.partial(_group, spec=spec, block_size=block_size)
        done = _solve(_Problem(exact, exact, factor, jnp.where(seen, variance, 0)), rounding, size)
        assert done.ranges is not None
        q, grid, _ = nearest(w, plain(spec), moved(done.ranges, back))
    else:
        q, grid, _ = nearest(w, spec, within)
        p = _Problem(exact, exact, factor, moved(jnp.asarray(group), there))
        rounding = functools.partial(_rows, grid=grid, fmt=fmt)
        done = _solve(p, rounding, min(block_size, w.shape[0]))
    codes = grid.rows(group).codes(fmt, moved(exact - done.errors, back))
    act = q.activation
    if act_order == "dynamic":
        act = dataclasses.replace(act or Activation(), axis=(-2,), permutation=order)
    q = dataclasses.replace(q, qvalue=split_planes(fmt, codes), activation=act)
    return q, {"damping": used}


def _order(diagonal: jax.Array, size: int) -> jax.Array:
    """Rows by falling diagonal, `size` neighbors together and these by their falling sum."""
    group = np.arange(diagonal.shape[0]) // size
    total = jax.ops.segment_sum(diagonal, group, num_segments=group[-1] + 1)
    if diagonal.shape[0] % size:  # the last one, of fewer rows, stays last
        total = total.at[-1].set(-1)
    keys = (-diagonal, jnp.asarray(group), -total[group]) if size > 1 else (-diagonal,)
    return jnp.lexsort(keys).astype(jnp.int32)


def _diagonal(h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """diag(H) with a mean of 1 over features that were seen, and 1 of others; seen; the mean."""
    diagonal = jnp.diag(h)
    seen = diagonal != 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(seen), 1).astype(h.dtype)
    mean = jnp.where(mean > 0, mean, 1)
    return jnp.where(seen, diagonal / mean, 1), seen, mean


def _factor(
    hessian: jax.Array, order: jax.Array | None, damping: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """R and diag(D) of h + damping * I = R D R^T, who was seen, and the damping it took.

    h is the Hessian in this order with a mean of 1 on its diagonal; features never seen stand
    apart, with 1. R is the identity and D ones if every damping failed.

    Written so that two arrays of the size of h are alive at once: each attempt makes its own from
    the Hessian, in the order that `cholesky` wants; what failed is read off the diagonal, which it
    fills with NaN too; and rows are turned around once, at the end.
    """
    flip = lambda v: v[::-1] if order is None else v[order][::-1]
    _, seen, mean = _diagonal(hessian)
    known = flip(seen)
    eye = lambda: jnp.eye(hessian.shape[0], dtype=hessian.dtype)

    def attempt(damping: jax.Array) -> jax.Array:
        h = flip(flip(hessian).T).T / mean
        h = jnp.where(known[:, None] & known[None, :], h, 0)
        on_diagonal = damping + (~known).astype(h.dtype)
        return jnp.linalg.cholesky(h + on_diagonal[None, :] * eye(), symmetrize_input=False)

    def failed(lower: jax.Array) -> jax.Array:
        return ~jnp.all(jnp.isfinite(jnp.diag(lower)))

    def again(state: tuple[int, jax.Array, jax.Array]) -> tuple[int, jax.Array, jax.Array]:
        count, damping, _ = state
        return count + 1, damping * 10, attempt(damping * 10)

    first = jnp.asarray(damping, hessian.dtype)
    _, used, lower = lax.while_loop(
        lambda s: (s[0] < _ATTEMPTS) & failed(s[2]), again, (1, first, attempt(first))
    )
    good, diagonal = ~failed(lower), jnp.diag(lower)
    upper = jnp.where(good, lower / diagonal[None, :], eye())[::-1, ::-1]
    variance = jnp.where(good, diagonal[::-1] ** 2, 1)
    return upper, variance, known[::-1], jnp.where(good, used, jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Problem:
    """Rows to round, in order.

    Attributes:
      x: `[k, out]`, corrected for the errors of all rows before the first of these.
      w: `[k, out]`, as they were.
      factor: `[k, k]`, R.
      each: `[k]`, what rounding a row takes: which row of the grid; with updated scales, D.
    """

    x: jax.Array
    w: jax.Array
    factor: jax.Array
    each: jax.Array

    def rows(self, start: int, stop: int) -> "_Problem":
        return _Problem(
            self.x[start:stop],
            self.w[start:stop],
            self.factor[start:stop, start:stop],
            self.each[start:stop],
        )


class _Done(NamedTuple):
    """The errors `[k, out]`, and with updated scales what these were chosen from, `[k, out]`."""

    errors: jax.Array
    ranges: jax.Array | None = None


_Rounding = Callable[[_Problem], _Done]


def _solve(p: _Problem, rounding: _Rounding, size: int) -> _Done:
    """Rounds `size` rows at a time; halves problems down to slabs."""
    k = p.x.shape[0]
    if k <= max(_SLAB, size):
        return _slab(p, rounding, size)
    half = -(-k // (2 * size)) * size
    first = _solve(p.rows(0, half), rounding, size)
    rest = p.rows(half, k)
    moved = rest.x + p.factor[:half, half:].T @ first.errors
    second = _solve(dataclasses.replace(rest, x=moved), rounding, size)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _slab(p: _Problem, rounding: _Rounding, size: int) -> _Done:
    """Block by block of `size` rows; a last one of fewer is filled up with copies of its last."""
    k = p.x.shape[0]
    if k == size:
        return rounding(p)
    pad = [(0, -k % size)]
    x, w = (jnp.pad(v, [*pad, (0, 0)], mode="edge") for v in (p.x, p.w))
    factor, each = jnp.pad(p.factor, [*pad, *pad]), jnp.pad(p.each, pad)

    def cut(v: jax.Array, block: jax.Array, axis: int = 0) -> jax.Array:
        return lax.dynamic_slice_in_dim(v, block * size, size, axis)

    def step(block: jax.Array, done: _Done) -> _Done:
        above = cut(factor, block, 1)
        moved = cut(x, block) + above.T @ done.errors
        found = rounding(_Problem(moved, cut(w, block), cut(above, block), cut(each, block)))
        put = lambda v, new: lax.dynamic_update_slice_in_dim(v, new, block * size, 0)
        return jax.tree.map(put, done, found)

    like = jax.eval_shape(rounding, _Problem(x[:size], w[:size], factor[:size, :size], each[:size]))
    start = jax.tree.map(lambda v: jnp.zeros((x.shape[0], *v.shape[1:]), v.dtype), like)
    done = lax.fori_loop(0, x.shape[0] // size, step, start)
    return jax.tree.map(lambda v: v[:k], done)


def _group(p: _Problem, *, spec: Spec, block_size: int) -> _Done:
    """One group of rows, with the scale that its corrected rows ask for."""
    x = p.x.astype(jnp.float32)
    ranges = clipped(x, p.each.astype(jnp.float32), spec)
    _, grid, _ = nearest(x, plain(spec), ranges)
    rounding = functools.partial(_rows, grid=grid, fmt=FORMATS[spec.format])
    one = dataclasses.replace(p, each=jnp.zeros(p.each.shape, jnp.int32))
    return _Done(_solve(one, rounding, min(block_size, x.shape[0])).errors, ranges)


def _rows(p: _Problem, *, grid: Grid, fmt: Format) -> _Done:
    """Row by row, on a given grid."""

    def step(k: jax.Array, errors: jax.Array) -> jax.Array:
        def cut(v: jax.Array, axis: int = 0) -> jax.Array:
            return lax.dynamic_index_in_dim(v, k, axis, keepdims=False)

        moved, row = cut(p.x) + cut(p.factor, 1) @ errors, grid.rows(cut(p.each))
        value = row.values(fmt, row.codes(fmt, moved), moved.dtype)
        return lax.dynamic_update_index_in_dim(errors, cut(p.w) - value, k, 0)

    return _Done(lax.fori_loop(0, p.x.shape[0], step, jnp.zeros_like(p.x)))
