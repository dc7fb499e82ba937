"""What a prepared weight does in place of the structural operations: they move axes, not arrays."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from qjax import structural
from qjax.prepared import Prepared
from qjax.structural import CannotCarry


def transpose(p: Prepared, permutation: Sequence[int]) -> Prepared:
    """`lax.transpose` that leaves the axes of layers where they are."""
    lead, p = len(p.lead), p.local()
    if tuple(permutation[:lead]) != tuple(range(lead)):
        raise CannotCarry("the transpose moves its axes of layers")
    inner = [a - lead for a in permutation[lead:]]
    place = lambda axes: tuple(inner.index(a) for a in axes)
    return dataclasses.replace(
        p,
        inner=tuple(p.inner[a] for a in inner),
        k_axes=place(p.k_axes),
        n_axes=place(p.n_axes),
    )


def reshape(p: Prepared, shape: Sequence[int]) -> Prepared:
    """`lax.reshape` that merges and splits axes within k, n and the layers, never across."""
    p, shape = p.local(), tuple(shape)
    lead = next(
        (j for j in range(len(shape) + 1) if math.prod(shape[:j]) == math.prod(p.lead)), None
    )
    if lead is None or math.prod(shape[lead:]) != math.prod(p.inner):
        raise CannotCarry("the reshape merges its axes of layers with others")
    inner = shape[lead:]
    groups = structural.regroup(p.inner, inner)

    def follow(axes: Sequence[int]) -> tuple[int, ...]:
        left, placed = [a for a in axes if p.inner[a] != 1], []
        for before, after in groups:
            if before[0] in left:
                at = left.index(before[0])
                if left[at : at + len(before)] != before:
                    raise CannotCarry("the reshape merges axes in another order than prepared")
                placed.append((at, after))
        return tuple(a for _, after in sorted(placed) for a in after)

    k_axes, n_axes = follow(p.k_axes), follow(p.n_axes)
    ones = tuple(a for a, s in enumerate(inner) if s == 1)
    if not k_axes or len({*k_axes, *n_axes, *ones}) != len(inner):
        raise CannotCarry("the reshape merges contracted axes with others")
    arrays = jax.tree.map(lambda v: v.reshape(*shape[:lead], *v.shape[len(p.lead) :]), p.arrays)
    return dataclasses.replace(
        p, arrays=arrays, inner=inner, k_axes=k_axes, n_axes=(*n_axes, *ones)
    )


def _new_shape(params: Mapping[str, Any]) -> Sequence[int]:
    if params.get("dimensions") is not None:
        raise CannotCarry("the reshape permutes axes")
    return params["new_sizes"]


def convert(p: Prepared, dtype: Any) -> Prepared:
    """The same codes, dequantized to another floating-point dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CannotCarry(f"it is converted to {np.dtype(dtype)}")
    return dataclasses.replace(p, dtype=np.dtype(dtype))


def slice_leading(p: Prepared) -> Prepared | None:
    """`p` as a scan over its leading axis needs it, or None if that is no axis of layers."""
    return p if p.lead else None


def dynamic_slice(p: Prepared, starts: Sequence[Any], sizes: Sequence[int]) -> Prepared:
    """`lax.dynamic_slice` along axes of layers."""
    lead = len(p.lead)
    if tuple(sizes[lead:]) != p.shape[lead:]:
        raise CannotCarry("the slice cuts a prepared matrix")
    zero = jnp.zeros_like(starts[0])

    def cut(v: jax.Array) -> jax.Array:
        whole = v.shape[lead:]
        return lax.dynamic_slice(v, (*starts[:lead], *[zero] * len(whole)), (*sizes[:lead], *whole))

    return dataclasses.replace(p, arrays=jax.tree.map(cut, p.arrays))


def static_slice(p: Prepared, start: Sequence[int], limit: Sequence[int], strides: Any) -> Prepared:
    """`lax.slice` along axes of layers."""
    lead = len(p.lead)
    if strides is not None and any(s != 1 for s in strides):
        raise CannotCarry("the slice has strides")
    if any(start[lead:]) or tuple(limit[lead:]) != p.shape[lead:]:
        raise CannotCarry("the slice cuts a prepared matrix")

    def cut(v: jax.Array) -> jax.Array:
        rest = v.shape[lead:]
        return lax.slice(v, (*start[:lead], *[0] * len(rest)), (*limit[:lead], *rest))

    return dataclasses.replace(p, arrays=jax.tree.map(cut, p.arrays))


def take(
    p: Prepared,
    indices: jax.Array,
    dims: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: Any,
) -> jax.Array:
    """A `lax.gather` of whole output channels, dequantized: an embedding's rows."""
    p = p.local()
    order, weight = LAYOUTS[p.layout], p.weight
    if p.lead or len(p.n_axes) != 1 or p.explicit_sharding() is not None:
        raise CannotCarry("the lookup is not in a plain matrix on Auto mesh axes")
    (axis,) = p.n_axes
    whole = [size for a, size in enumerate(p.inner) if a != axis]
    one_axis = (tuple(dims.start_index_map), tuple(dims.collapsed_slice_dims)) == ((axis,),) * 2
    if not one_axis or dims.operand_batching_dims:
        raise CannotCarry("the lookup does not take whole output channels")
    if [n for a, n in enumerate(slice_sizes) if a != axis] != whole:
        raise CannotCarry("the lookup takes parts of output channels")
    rows, tile = indices.reshape(-1), order.tile(weight)[1]
    inside = jnp.clip(rows, 0, weight.n - 1)

    def pick(v: jax.Array, axes: Sequence[str]) -> jax.Array:
        return jnp.take(v, inside // tile, axis=axes.index("n"), mode="clip")

    arrays = p.operands()
    picked = {
        n: pick(v, order.code_axes if n == "codes" else order.scale_axes) for n, v in arrays.items()
    }
    k_shape = tuple(p.inner[a] for a in p.k_axes)
    found = dataclasses.replace(
        p,
        arrays=picked,
        nested=(),
        weight=weight._replace(n=rows.size * tile),
        inner=(rows.size * tile, *k_shape),
        k_axes=tuple(range(1, p.ndim)),
        n_axes=(0,),
    ).dequantized()
    found = found.reshape(rows.size, tile, *k_shape)[jnp.arange(rows.size), inside % tile]
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        known = (rows == inside).reshape(-1, *[1] * len(k_shape))
        found = jnp.where(known, found, jnp.full((), jnp.nan, found.dtype))
    found = found.reshape(*indices.shape[:-1], *k_shape)
    batch = indices.ndim - 1
    kept = sorted(p.k_axes)
    source = {d: batch + p.k_axes.index(a) for d, a in zip(dims.offset_dims, kept, strict=True)}
    rest = iter(range(batch))
    return lax.transpose(
        found, [source[d] if d in source else next(rest) for d in range(found.ndim)]
    )


# What a Prepared does in place of the structural operations of `structural`, by primitive:
# (equation parameters, inputs) -> output.
STRUCTURAL: Mapping[str, Callable[[dict[str, Any], list[Any]], Any]] = {
    "convert_element_type": lambda p, v: convert(v[0], p["new_dtype"]),
    "transpose": lambda p, v: transpose(v[0], p["permutation"]),
    "reshape": lambda p, v: reshape(v[0], _new_shape(p)),
    "squeeze": lambda p, v: reshape(
        v[0], [s for a, s in enumerate(v[0].shape) if a not in p["dimensions"]]
    ),
    "slice": lambda p, v: static_slice(v[0], p["start_indices"], p["limit_indices"], p["strides"]),
    "dynamic_slice": lambda p, v: dynamic_slice(v[0], v[1:], p["slice_sizes"]),
}

# Operations that treat a Prepared as they treat a QTensor.
ANY = frozenset(
    "pvary sharding_constraint reshard stop_gradient copy copy_p optimization_barrier".split()
)
