"""A weight as matrices `[*lead, in, out]`, which is what algorithms see, and its QTensor back."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax import structural
from qjax.algorithms.base import Stats
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.qtensor import QTensor
from qjax.spec import Spec

Axes = tuple[int, ...]


class Layout(NamedTuple):
    """How a weight of `shape` becomes matrices; hashable.

    `lead` (layers, experts), `contracted` and `free` axes each keep their order and are flattened.
    The innermost contracted axis is padded to a multiple of `group`, so that groups restart at each
    index of the outer ones.
    """

    shape: Axes
    lead: Axes
    contracted: Axes
    group: int = 1

    @property
    def free(self) -> Axes:
        return tuple(
            a for a in range(len(self.shape)) if a not in self.contracted and a not in self.lead
        )

    @property
    def lead_shape(self) -> Axes:
        return self._sizes(self.lead)

    @property
    def order(self) -> Axes:
        return (*self.lead, *self.contracted, *self.free)

    @property
    def inner(self) -> int:
        """The innermost contracted axis, padded."""
        return -(-self.shape[self.contracted[-1]] // self.group) * self.group

    @property
    def rows(self) -> int:
        return math.prod(self._sizes(self.contracted[:-1])) * self.inner

    @property
    def columns(self) -> int:
        return math.prod(self._sizes(self.free))

    def _sizes(self, axes: Axes) -> Axes:
        return tuple(self.shape[a] for a in axes)


def layout(shape: Axes, contracted: Axes, lead: Axes, spec: Spec) -> tuple[Layout, Spec]:
    """The layout of a weight, and the Spec for its matrices that means the same blocks.

    Raises:
      ValueError: if tiles would run across the last of several output axes.
    """
    made = Layout(tuple(shape), tuple(lead), tuple(sorted(contracted)))
    if isinstance(spec.block, int):
        rows, rest = spec.block, ()
    elif spec.block:
        rows, *rest = spec.block
    else:
        return made, spec
    inner = shape[made.contracted[-1]]
    rows = min(rows, max(inner, 1))
    if rest and made.free:
        last = shape[made.free[-1]]
        rest = (min(rest[0], max(last, 1)),)
        if len(made.free) > 1 and last % rest[0]:
            raise ValueError(
                f"tiles of {spec.block} on shape {tuple(shape)} would run across output axis "
                f"{made.free[-1]} of length {last}; take columns that divide it"
            )
    if len(made.contracted) > 1 and inner % rows:
        made = made._replace(group=rows)
    return made, spec._replace(block=(rows, *rest) if rest else rows)


def to_matrices(w: jax.Array, how: Layout) -> jax.Array:
    """`w` as `[*lead, in, out]`; padding repeats the last row, a member of the last group."""
    w = jnp.transpose(w, how.order)
    axis = len(how.lead) + len(how.contracted) - 1
    if missing := how.inner - w.shape[axis]:
        w = jnp.pad(w, [(0, missing if a == axis else 0) for a in range(w.ndim)], mode="edge")
    return w.reshape(*how.lead_shape, how.rows, how.columns)


def pad_stats(stats: Stats, how: Layout) -> Stats:
    """Statistics of the unpadded input, with features that were never seen in the padding."""
    size = how.shape[how.contracted[-1]]
    if size == how.inner:
        return stats

    def pad(leaf: jax.Array | None, axes: int) -> jax.Array | None:
        if leaf is None:
            return None
        kept = leaf.shape[: leaf.ndim - axes]
        split = leaf.reshape(*kept, *(how.rows // how.inner, size) * axes)
        widths = [(0, 0)] * len(kept) + [(0, 0), (0, how.inner - size)] * axes
        return jnp.pad(split, widths).reshape(*kept, *(how.rows,) * axes)

    return dataclasses.replace(
        stats,
        hessian=pad(stats.hessian, 2),
        **{n: pad(getattr(stats, n), 1) for n in ("mean_abs", "max_abs", "second_moment")},
        samples=pad(stats.samples, 1),
    )


def from_matrices(q: QTensor, how: Layout) -> QTensor:
    """The QTensor of matrices on the axes of its weight.

    Raises:
      structural.CannotCarry: if what its activation holds cannot follow.
    """
    fmt = FORMATS[q.format]
    if "uint1" in fmt.storage:  # packed bits do not move along their axis: move whole codes
        whole = dataclasses.replace(q, qvalue=join_planes(fmt, q.qvalue), format="uint8")
        back = from_matrices(whole, how)
        codes: Any = back.qvalue
        return dataclasses.replace(back, qvalue=split_planes(fmt, codes), format=q.format)
    sizes = [how.shape[a] for a in how.order]
    axis = len(how.lead) + len(how.contracted) - 1
    q = structural.reshape(q, [*sizes[:axis], how.inner, *sizes[axis + 1 :]])
    if how.inner != sizes[axis]:
        q = structural.static_slice(q, [0] * len(sizes), sizes)
    back = [how.order.index(a) for a in range(len(sizes))]
    return q if back == list(range(len(sizes))) else structural.transpose(q, back)
