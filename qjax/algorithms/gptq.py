"""GPTQ: round one input feature after the other, and let those to come make up for the error."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.activation import Activation
from qjax.algorithms.base import Algorithm, Notes, Stats, needed
from qjax.algorithms.grid import Grid, nearest
from qjax.formats import FORMATS, Format, split_planes
from qjax.qtensor import QTensor
from qjax.spec import Spec

ActOrder = Literal["static", "dynamic"] | None

_ATTEMPTS = 4  # dampings tried, each ten times the one before
_SLAB = 1024  # rows that one loop solves; more are halved first, which saves nearly half the work


def gptq(damping: float = 0.01, act_order: ActOrder = "static", block_size: int = 128) -> Algorithm:
    """GPTQ: rounds the rows of w `[in, out]` in turn, each corrected for what those before lost.

    With H = X^T X + damping * mean(diag(X^T X)) * I = R D R^T, R unit upper triangular and D
    diagonal, and e the errors of the rows done so far,

        q_k = round(w_k + sum_{j<k} e_j R[j, k])        e_k = w_k - q_k

    which is Algorithm 1 of Frantar et al. (arXiv:2210.17323) as Chee et al. rewrote it (LDLQ,
    arXiv:2307.13304, theorem 6): the same codes, from one Cholesky factor and without the inverse
    of H. `round` takes the nearest value of the grid, which is that of `quantize`: the scale method
    and scale dtype of the Spec, chosen from w before the first row is rounded (static groups). So
    every format that `quantize` knows can be solved for.

    Args:
      damping: of the mean of the diagonal. Where the factorization fails it is raised tenfold, up
        to three times; then the weight is rounded to nearest.
      act_order: "static" takes rows by falling diag(H) and puts them back, so that nothing changes
        at run time; "dynamic" also forms the groups in that order, and the QTensor carries the
        permutation for its input; None takes rows as they stand.
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
    if block_size < 1:
        raise ValueError(f"gptq: block_size must be at least 1, got {block_size}; take 128")

    def quantize(
        w: jax.Array, spec: Spec, stats: Stats, within: jax.Array | None = None
    ) -> tuple[QTensor, Notes]:
        h = needed("gptq", stats, "hessian")
        return _quantize(w, spec, h, damping, act_order, block_size, within)

    return Algorithm("gptq", frozenset({"hessian"}), True, quantize)


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _quantize(
    w: jax.Array,
    spec: Spec,
    hessian: jax.Array,
    damping: float,
    act_order: ActOrder,
    block_size: int,
    within: jax.Array | None,
) -> tuple[QTensor, Notes]:
    h = _normalized(hessian.astype(np.promote_types(np.float32, hessian.dtype)))
    order = jnp.argsort(-jnp.diag(h), stable=True).astype(jnp.int32)
    if act_order == "dynamic":
        w, within = w[order], None if within is None else within[order]
    q, grid, group = nearest(w, spec, within)
    group, exact = jnp.asarray(group), w.astype(h.dtype)
    if act_order is not None:
        h = h[order][:, order]
    if act_order == "static":
        exact, group = exact[order], group[order]
    factor, used = _factor(h, damping)
    fmt = FORMATS[spec.format]
    errors = _solve(_Problem(exact, exact, factor, group), grid, fmt, block_size)
    codes = grid.rows(group).codes(fmt, exact - errors)
    if act_order == "static":
        codes = codes[jnp.argsort(order)]
    act = q.activation
    if act_order == "dynamic":
        act = dataclasses.replace(act or Activation(), axis=(-2,), permutation=order)
    q = dataclasses.replace(q, qvalue=split_planes(fmt, codes), activation=act)
    return q, {"damping": used}


def _normalized(h: jax.Array) -> jax.Array:
    """H with a mean of 1 on its diagonal; features never seen stand apart, with 1."""
    diagonal = jnp.diag(h)
    seen = diagonal != 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(seen), 1).astype(h.dtype)
    h = jnp.where(seen[:, None] & seen[None, :], h / jnp.where(mean > 0, mean, 1), 0)
    return h + jnp.diag((~seen).astype(h.dtype))


def _factor(h: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """R of (h + damping * I) = R D R^T, and the damping it took; the identity if none sufficed."""
    eye = jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(damping: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky((h + damping * eye)[::-1, ::-1], symmetrize_input=False)
        return lower[::-1, ::-1]

    def failed(factor: jax.Array) -> jax.Array:
        return ~jnp.all(jnp.isfinite(factor))

    def again(state: tuple[int, jax.Array, jax.Array]) -> tuple[int, jax.Array, jax.Array]:
        count, damping, _ = state
        return count + 1, damping * 10, attempt(damping * 10)

    first = jnp.asarray(damping, h.dtype)
    _, used, upper = lax.while_loop(
        lambda s: (s[0] < _ATTEMPTS) & failed(s[2]), again, (1, first, attempt(first))
    )
    good = ~failed(upper)
    upper = jnp.where(good, upper / jnp.diag(upper)[None, :], eye)
    return upper, jnp.where(good, used, jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Problem:
    """Rows to round, in order.

    Attributes:
      x: `[k, out]`, corrected for the errors of all rows before the first of these.
      w: `[k, out]`, as they were.
      factor: `[k, k]`, R.
      group: `[k]`, which row of the grid each takes.
    """

    x: jax.Array
    w: jax.Array
    factor: jax.Array
    group: jax.Array

    def rows(self, start: int, stop: int) -> "_Problem":
        return _Problem(
            self.x[start:stop],
            self.w[start:stop],
            self.factor[start:stop, start:stop],
            self.group[start:stop],
        )


def _solve(p: _Problem, grid: Grid, fmt: Format, block_size: int) -> jax.Array:
    """The errors `[k, out]`, halving problems down to slabs."""
    k = p.x.shape[0]
    if k <= max(_SLAB, block_size):
        return _slab(p, grid, fmt, min(block_size, k))
    half = -(-k // (2 * block_size)) * block_size
    first = _solve(p.rows(0, half), grid, fmt, block_size)
    rest = p.rows(half, k)
    moved = rest.x + p.factor[:half, half:].T @ first
    second = _solve(dataclasses.replace(rest, x=moved), grid, fmt, block_size)
    return jnp.concatenate([first, second])


def _slab(p: _Problem, grid: Grid, fmt: Format, size: int) -> jax.Array:
    """The errors, block by block of `size` rows."""
    k = p.x.shape[0]
    pad = [(0, -k % size)]
    x, w = (jnp.pad(v, [*pad, (0, 0)]) for v in (p.x, p.w))
    factor, group = jnp.pad(p.factor, [*pad, *pad]), jnp.pad(p.group, pad)

    def step(block: jax.Array, errors: jax.Array) -> jax.Array:
        def cut(v: jax.Array, axis: int = 0) -> jax.Array:
            return lax.dynamic_slice_in_dim(v, block * size, size, axis)

        above = cut(factor, 1)
        moved = cut(x) + above.T @ errors
        found = _rows(_Problem(moved, cut(w), cut(above), cut(group)), grid, fmt)
        return lax.dynamic_update_slice_in_dim(errors, found, block * size, 0)

    return lax.fori_loop(0, x.shape[0] // size, step, jnp.zeros_like(x))[:k]


def _rows(p: _Problem, grid: Grid, fmt: Format) -> jax.Array:
    """The errors, row by row."""

    def step(k: jax.Array, errors: jax.Array) -> jax.Array:
        def cut(v: jax.Array, axis: int = 0) -> jax.Array:
            return lax.dynamic_index_in_dim(v, k, axis, keepdims=False)

        moved, row = cut(p.x) + cut(p.factor, 1) @ errors, grid.rows(cut(p.group))
        value = row.values(fmt, row.codes(fmt, moved), moved.dtype)
        return lax.dynamic_update_index_in_dim(errors, cut(p.w) - value, k, 0)

    return lax.fori_loop(0, p.x.shape[0], step, jnp.zeros_like(p.x))
