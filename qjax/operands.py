"""What a tagged parameter is multiplied with, in a matmul, a ragged dot or a convolution."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax import _compat
from qjax.algorithms.base import Stats
from qjax.products import is_rows_by_experts
from qjax.statistics import ragged_totals, totals
from qjax.tagged import Axes, Tagged, Values, array_of
from qjax.token_masks import Mask

Masks = list[Mask]


class Operand(NamedTuple):
    """What a tagged parameter is multiplied with in one equation.

    `contract` and `batch` are pairs (axis of the parameter's value, axis of x). `sizes`: tokens per
    expert of a ragged dot, whose expert axis of the value is `group`.
    """

    box: Tagged
    x: Any
    mask: Mask
    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...] = ()
    sizes: Any = None
    group: int | None = None

    @property
    def lead(self) -> tuple[Axes, ...]:
        """The parameter's axes that the leading axes of the totals hold."""
        if self.group is not None:
            return (self.box.axes[self.group],)
        return tuple(self.box.axes[w] for w, _ in self._sorted(self.batch))

    def signature(self, shape: Axes) -> Any:
        """How x is read: together with x it tells the totals."""
        axes = tuple((self.box.axes[w], a) for w, a in self._sorted(self.contract))
        sizes = tuple(tuple(shape[i] for i in group) for group, _ in axes)
        batch = tuple(a for _, a in self._sorted(self.batch))
        order = tuple(a for _, a in axes)
        flat = [i for group, _ in axes for i in group]
        ranks = tuple(sorted(flat).index(i) for i in flat)
        starts = tuple(s for a, s in self.box.starts if a in flat)
        return (order, sizes, ranks, batch, starts, self.group is not None)

    def totals(self, shape: Axes, needs: frozenset[str]) -> Stats:
        x, keep = self._arranged(shape)
        if self.group is not None:
            if keep is not None:
                keep = jnp.broadcast_to(keep, x.shape[:1])
            return ragged_totals(x, self.sizes, keep, needs)
        lead = len(self.batch)
        if lead:  # an expert's capacity that no token takes is filled with zeros
            taken = jnp.any(x != 0, -1)
            keep = taken if keep is None else keep & taken
        return totals(x, lead, keep, needs)

    def _sorted(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted(pairs, key=lambda pair: self.box.axes[pair[0]])

    def _arranged(self, shape: Axes) -> tuple[jax.Array, Mask]:
        """Gives x as `[*lead, *tokens, in]`, features in the parameter's order, and its mask."""
        contract, batch = self._sorted(self.contract), [a for _, a in self._sorted(self.batch)]
        inner = [a for _, a in contract]
        tokens = [a for a in range(self.x.ndim) if a not in (*inner, *batch)]
        x = lax.transpose(jnp.asarray(self.x), (*batch, *tokens, *inner))
        outer, axes = len(batch) + len(tokens), []
        for d, (w, _) in enumerate(contract):
            group = self.box.axes[w]
            axes += group
            x = self._widened(x, outer + d, group, [shape[a] for a in group])
        x = x.reshape(*x.shape[:outer], *(shape[a] for a in axes))
        order = sorted(range(len(axes)), key=lambda i: axes[i])
        x = lax.transpose(x, (*range(outer), *(outer + i for i in order)))
        x = x.reshape(*x.shape[:outer], math.prod(shape[a] for a in axes))
        if self.mask is None:
            return x, None
        keep = lax.transpose(
            jnp.any(self.mask, tuple(inner), keepdims=True), (*batch, *tokens, *inner)
        )
        return x, keep.reshape(keep.shape[:outer])

    def _widened(self, x: jax.Array, dim: int, group: Axes, sizes: Sequence[int]) -> jax.Array:
        """Widens x with zeros where the parameter is a slice along a contracted axis."""
        size = math.prod(sizes)
        if x.shape[dim] == size and None not in (dict(self.box.starts).get(a, 0) for a in group):
            return x
        start = dict(self.box.starts).get(group[0], 0) if len(group) == 1 else None
        if start is None:
            raise ValueError(
                f"{self.box.path}: a matmul contracts {x.shape[dim]} of the {size} features of "
                f"axes {group}, from a place that is not known before it runs; quantize it without "
                "an algorithm"
            )
        widths = [(0, 0)] * x.ndim
        widths[dim] = (start, size - start - x.shape[dim])
        return jnp.pad(x, widths)


def operands(eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> list[Operand]:
    """The uses of tagged parameters in a matmul, ragged dot or convolution; lookups have none."""
    rule = _OPERANDS.get(eqn.primitive.name)
    return [] if rule is None else rule(eqn, inputs, masks)


def _dot(eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> list[Operand]:
    contract, batch = eqn.params["dimension_numbers"]
    found = []
    for side, box in enumerate(inputs):
        if isinstance(box, Tagged) and contract[side]:
            pair = lambda dims, side=side: tuple(zip(dims[side], dims[1 - side], strict=True))
            x, mask = array_of(inputs[1 - side]), masks[1 - side]
            found.append(Operand(box, x, mask, pair(contract), pair(batch)))
    return found


def _ragged(eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> list[Operand]:
    x, box, sizes = inputs[:3]
    if not isinstance(box, Tagged):
        return []
    if not is_rows_by_experts(eqn.params):
        raise ValueError(
            f"{box.path}: statistics of a ragged dot need rows [tokens, in] by experts "
            f"[experts, in, out], got {eqn.params['ragged_dot_dimension_numbers']}; quantize it "
            "without an algorithm"
        )
    return [Operand(box, array_of(x), masks[0], ((1, 1),), (), array_of(sizes), 0)]


def _conv(eqn: _compat.JaxprEqn, inputs: Values, masks: Masks) -> list[Operand]:
    """Patches of x `[batch, *places, channels * window]`, times a kernel `[channels, *window]`."""
    x, box = inputs
    if not isinstance(box, Tagged):
        return []
    params, names = eqn.params, eqn.params["dimension_numbers"]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise ValueError(
            f"{box.path}: of a grouped convolution every group has inputs of its own; quantize it "
            "without an algorithm"
        )
    _, channels, *window = names.rhs_spec
    shape = box.value.shape
    patches = lax.conv_general_dilated_patches(
        array_of(x),
        [shape[a] for a in window],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.ConvDimensionNumbers(names.lhs_spec, tuple(range(len(shape))), names.lhs_spec),
        precision=lax.Precision.HIGHEST,
    )
    batch, features, *places = names.lhs_spec
    patches = lax.transpose(patches, (batch, *places, features))
    patches = patches.reshape(*patches.shape[:-1], *(shape[a] for a in (channels, *window)))
    mask = masks[0]
    if mask is not None:
        mask = jnp.any(mask, tuple(a for a in range(mask.ndim) if a != batch))
        mask = mask.reshape(-1, *(1,) * (patches.ndim - 1))
    first = 1 + len(places)
    pairs = tuple((w, first + i) for i, w in enumerate((channels, *window)))
    return [Operand(box, patches, mask, pairs)]


_OPERANDS: Mapping[str, Callable[..., list[Operand]]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _conv,
}
