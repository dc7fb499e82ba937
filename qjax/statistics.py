"""What calibration keeps of an input: additive statistics of x `[*lead, *tokens, in]`.

While batches pass, a Stats holds totals: sums where its fields are means, and the blocks on and
below the diagonal of the Hessian only. `finished` makes the means and mirrors the Hessian.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.algorithms.base import Stats

SAMPLES = 512  # tokens kept for algorithms that look at some
_WHOLE, _BLOCK = 512, 1024  # features; of larger Hessians blocks above the diagonal are left out
_RUN = 512  # tokens of one expert that are multiplied at once

_MEANS = ("mean_abs", "second_moment")


def totals(x: jax.Array, lead: int, keep: jax.Array | None, needs: frozenset[str]) -> Stats:
    """Totals of x `[*lead, *tokens, in]` over tokens.

    Args:
      x: floating point, or numbers that convert to float32.
      lead: how many leading axes have statistics of their own.
      keep: bool, broadcasts to `[*lead, *tokens]`: which tokens count. None: all.
      needs: the fields of Stats wanted; `count` is always there.
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    tokens = tuple(range(lead, x.ndim - 1))
    keep = jnp.ones((1,) * (x.ndim - 1), jnp.bool_) if keep is None else keep
    x = jnp.where(keep[..., None], x, jnp.zeros((), x.dtype))
    keep = jnp.broadcast_to(keep, x.shape[:-1])
    wide = x.astype(jnp.float32)
    make: dict[str, Callable[[], jax.Array]] = {
        "hessian": lambda: _gram(x, lead),
        "mean_abs": lambda: jnp.sum(jnp.abs(wide), tokens),
        "second_moment": lambda: jnp.sum(wide * wide, tokens),
        "max_abs": lambda: _largest(wide, tokens),
        "samples": lambda: _first(
            wide.reshape(*x.shape[:lead], -1, x.shape[-1]), keep.reshape(*x.shape[:lead], -1)
        ),
    }
    found = {name: make[name]() for name in sorted(needs - {"count"})}
    return Stats(**found, count=jnp.sum(keep, tokens, dtype=jnp.float32))


def ragged_totals(
    x: jax.Array, sizes: jax.Array, keep: jax.Array | None, needs: frozenset[str]
) -> Stats:
    """Totals `[experts, ...]` of rows x `[tokens, in]` sorted by expert, `sizes` of them for each.

    `keep`, bool `[tokens]`, tells which rows count; rows beyond the last expert's never do.
    """
    experts = sizes.shape[0]
    row = jnp.arange(x.shape[0], dtype=jnp.int32)
    expert = jnp.searchsorted(jnp.cumsum(sizes.astype(jnp.int32)), row, side="right")
    if keep is not None:
        expert = jnp.where(keep, expert, experts)
        order = jnp.argsort(expert, stable=True)
        x, expert = x[order], expert[order]
    ones = jnp.ones(x.shape[0], jnp.int32)
    sizes = jnp.zeros(experts, jnp.int32).at[expert].add(ones, mode="drop")
    x = jnp.where((expert < experts)[:, None], x, jnp.zeros((), x.dtype))
    wide = x.astype(jnp.float32)
    zeros = jnp.zeros((experts, x.shape[1]), jnp.float32)

    def add(v: jax.Array) -> jax.Array:
        return zeros.at[expert].add(v, mode="drop")

    make: dict[str, Callable[[], jax.Array]] = {
        "hessian": lambda: _ragged_gram(x, sizes),
        "mean_abs": lambda: add(jnp.abs(wide)),
        "second_moment": lambda: add(wide * wide),
        "max_abs": lambda: zeros.at[expert].max(jnp.abs(wide), mode="drop") + 0 * add(wide),
        "samples": lambda: _ragged_first(wide, sizes),
    }
    found = {name: make[name]() for name in sorted(needs - {"count"})}
    return Stats(**found, count=sizes.astype(jnp.float32))


def add(a: Stats, b: Stats) -> Stats:
    """The totals of the tokens of both."""

    def join(name: str) -> Any:
        left, right = getattr(a, name), getattr(b, name)
        if left is None or right is None:
            return None
        if name == "max_abs":
            return jnp.maximum(left, right)
        if name == "samples":
            rows = jnp.concatenate([left, right], axis=-2)
            place = jnp.arange(left.shape[-2], dtype=jnp.float32)
            place = place.reshape((1,) * (left.ndim - 2) + (-1,))
            assert a.count is not None
            assert b.count is not None
            valid = [place < c[..., None] for c in (a.count, b.count)]
            return _first(rows, jnp.concatenate(valid, axis=-1))
        return left + right

    return Stats(**{f.name: join(f.name) for f in dataclasses.fields(Stats)})


def reduced(total: Stats, axis: int) -> Stats:
    """Totals with a leading axis summed away: of a weight that every iteration of a loop uses."""
    assert total.count is not None
    parts = [
        jax.tree.map(functools.partial(jnp.take, indices=i, axis=axis), total)
        for i in range(total.count.shape[axis])
    ]
    return functools.reduce(add, parts)


def empty(like: Any) -> Any:
    """Totals of no tokens, of the shapes of `like`."""
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), like)


@jax.jit
def finished(total: Stats) -> Stats:
    """Stats from totals."""
    hessian = total.hessian
    if hessian is not None:
        hessian = jnp.tril(hessian) + jnp.swapaxes(jnp.tril(hessian, -1), -1, -2)
    return dataclasses.replace(_scaled(total, lambda c: 1 / jnp.maximum(c, 1)), hessian=hessian)


@jax.jit
def merged(a: Stats, b: Stats) -> Stats:
    """The Stats of the tokens of both."""
    return finished(add(_scaled(a, lambda c: c), _scaled(b, lambda c: c)))


def _scaled(stats: Stats, factor: Callable[[jax.Array], jax.Array]) -> Stats:
    assert stats.count is not None
    by = factor(stats.count)[..., None]
    means = {n: v * by for n in _MEANS if (v := getattr(stats, n)) is not None}
    return dataclasses.replace(stats, **means)


def _largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest magnitude, NaN where any is not finite: XLA:CPU drops NaN from maxima."""
    return jnp.max(jnp.abs(x), axes, initial=0.0) + 0 * jnp.sum(x, axes)


def _gram(x: jax.Array, lead: int) -> jax.Array:
    """x^T x over tokens, float32 `[*lead, in, in]`: its blocks on and below the diagonal."""
    batch, tokens, size = tuple(range(lead)), tuple(range(lead, x.ndim - 1)), x.shape[-1]
    step = max(size, 1) if size < _WHOLE else min(_BLOCK, 64 * -(-size // 256))  # of a quarter
    rows = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        row = _products(x[..., start:stop], x[..., :stop], tokens, batch)
        rows.append(jnp.pad(row, [(0, 0)] * (row.ndim - 1) + [(0, size - stop)]))
    return jnp.concatenate(rows, axis=-2)


def _products(a: jax.Array, b: jax.Array, tokens: Any, batch: Any) -> jax.Array:
    """a^T b in float32. Products of 16-bit floats are exact in it; wider ones must not be cut."""
    precision = None if a.dtype.itemsize <= 2 else lax.Precision.HIGHEST
    numbers = ((tokens, tokens), (batch, batch))
    return lax.dot_general(a, b, numbers, precision, jnp.float32).astype(jnp.float32)


def _ragged_gram(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x_e^T x_e for each expert e, `[experts, in, in]`: runs of its rows, one after the other."""
    length = max(min(_RUN, x.shape[0]), 1)
    x = jnp.pad(x, [(0, length), (0, 0)])
    begins, runs = jnp.cumsum(sizes) - sizes, -(-sizes // length)
    ends = jnp.cumsum(runs)

    def step(i: jax.Array, h: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, i, side="right")
        begin = begins[expert] + (i - ends[expert] + runs[expert]) * length
        part = lax.dynamic_slice_in_dim(x, begin, length)
        left = begins[expert] + sizes[expert] - begin
        mine = jnp.arange(length, dtype=left.dtype) < left
        part = jnp.where(mine[:, None], part, jnp.zeros((), x.dtype))
        return h.at[expert].add(_products(part, part, (0,), ()))

    start = jnp.zeros((sizes.shape[0], x.shape[1], x.shape[1]), jnp.float32)
    return lax.fori_loop(0, ends[-1], step, start)


def _first(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """The first SAMPLES valid rows of `[*lead, rows, in]`, and zeros."""
    order = jnp.argsort(~valid, axis=-1, stable=True)[..., :SAMPLES]
    rows = jnp.where(valid[..., None], rows, 0)
    chosen = jnp.take_along_axis(rows, order[..., None], axis=-2)
    missing = SAMPLES - chosen.shape[-2]
    return jnp.pad(chosen, [(0, 0)] * (rows.ndim - 2) + [(0, max(missing, 0)), (0, 0)])


def _ragged_first(x: jax.Array, sizes: jax.Array) -> jax.Array:
    place = jnp.arange(SAMPLES, dtype=sizes.dtype)[None, :]
    index = (jnp.cumsum(sizes) - sizes)[:, None] + place
    chosen = jnp.take(x, index, axis=0, mode="fill", fill_value=0)
    return jnp.where((place < sizes[:, None])[..., None], chosen, 0)
