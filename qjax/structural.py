"""Structural operations on QTensors: move the codes and their scales along, never decode.

Each function takes an array or a QTensor, so that scales which are QTensors follow by recursion.
`CannotCarry` says why a QTensor cannot follow; the caller then dequantizes it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import activation, blocks
from qjax.formats import FORMATS, move_codes
from qjax.qtensor import QTensor, dequantize

Value: TypeAlias = Any  # jax.Array or QTensor: each function returns the kind that it is given


class CannotCarry(ValueError):
    """The operation cannot be expressed on codes and scales; the message says why."""


def block_of(q: QTensor) -> blocks.Block:
    """The block of `q` with one entry per axis, none longer than its axis."""
    if q.param_shape is not None:
        raise CannotCarry("its storage has another shape than the weight")
    return tuple(
        min(b, max(s, 1)) for b, s in zip(blocks.align(q.block, q.ndim), q.shape, strict=True)
    )


def _rebuild(
    q: QTensor,
    block: blocks.Block,
    on_plane: Callable[[Any], Any],
    on_scale: Callable[[Any], Any],
    moves_last: bool,
    on_activation: Callable[[activation.Activation], activation.Activation],
) -> QTensor:
    """`q` with `on_plane` applied to its codes, `on_scale` to whatever has one value per block and
    `on_activation` to what it asks of the other operand.
    """
    storage = FORMATS[q.format].storage
    if moves_last and "uint1" in storage:
        raise CannotCarry("its bits are packed along the last axis")

    def follow(scale: Value | None) -> Value | None:
        if scale is None:
            return None
        try:
            return on_scale(scale)
        except CannotCarry:
            if not isinstance(scale, QTensor):
                raise
            return on_scale(dequantize(scale))  # quantized scales are small: only they are opened

    try:
        act = None if q.activation is None else on_activation(q.activation)
    except activation.CannotMove as why:
        raise CannotCarry(str(why)) from why
    qvalue = tuple(map(on_plane, q.qvalue)) if isinstance(q.qvalue, tuple) else on_plane(q.qvalue)
    return dataclasses.replace(
        q,
        qvalue=qvalue,
        scale=follow(q.scale),
        zero_point=follow(q.zero_point),
        offset=follow(q.offset),
        activation=act,
        block=blocks.trim(block),
    )


def transpose(x: Value, permutation: Sequence[int]) -> Value:
    """`lax.transpose`; the block is permuted with the axes."""
    if not isinstance(x, QTensor):
        return lax.transpose(x, permutation)
    block = block_of(x)
    moved = tuple(block[p] for p in permutation)
    turn = lambda v: transpose(v, permutation)
    places = np.argsort(permutation).tolist()
    on_activation = lambda act: activation.moved(act, places, x.shape, x.ndim)
    moves_last = permutation[-1] != x.ndim - 1
    turn_codes = lambda plane: move_codes(lambda p: lax.transpose(p, permutation), plane)
    return _rebuild(x, moved, turn_codes, turn, moves_last, on_activation)


def reshape(x: Value, shape: Sequence[int]) -> Value:
    """`lax.reshape`, where every block stays a block of the new shape."""
    if not isinstance(x, QTensor):
        return lax.reshape(x, shape)
    shape, block = tuple(shape), list([1] * len(shape))
    old, groups = block_of(x), regroup(x.shape, shape)
    for before, after in groups:
        sizes = [shape[a] for a in after]
        for a, b in zip(
            after,
            _reblock([x.shape[a] for a in before], [old[a] for a in before], sizes),
            strict=True,
        ):
            block[a] = b

    def on_plane(plane: jax.Array) -> jax.Array:
        packed = plane.shape[-1] != x.shape[-1]
        return lax.reshape(plane, (*shape[:-1], plane.shape[-1]) if packed else shape)

    def on_activation(act: activation.Activation) -> activation.Activation:
        _, features = activation.weight_axes(act, x.ndim)
        merged = {tuple(before): tuple(after) for before, after in groups}
        alone = {a[0]: b[0] for a, b in merged.items() if len(a) == len(b) == 1}
        places = [alone.get(a) for a in range(x.ndim)]
        return activation.moved(act, places, x.shape, len(shape), merged.get(features))

    return _rebuild(
        x,
        tuple(block),
        on_plane,
        lambda s: reshape(s, blocks.scale_shape(shape, block)),
        moves_last=shape[-1:] != x.shape[-1:],
        on_activation=on_activation,
    )


def regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts a reshape into independent groups (old axes, new axes) of equal size; axes of length 1
    belong to none.
    """
    groups, i, j = [], 0, 0
    before_axes = [a for a, s in enumerate(old) if s != 1]
    after_axes = [a for a, s in enumerate(new) if s != 1]
    if 0 in old:
        raise CannotCarry("it is empty")
    while i < len(before_axes):
        before, after = [before_axes[i]], [after_axes[j]]
        m, n = old[before[0]], new[after[0]]
        while m != n:
            if m < n:
                i += 1
                before.append(before_axes[i])
                m *= old[before[-1]]
            else:
                j += 1
                after.append(after_axes[j])
                n *= new[after[-1]]
        groups.append((before, after))
        i, j = i + 1, j + 1
    return groups


def _reblock(old: Sequence[int], old_block: Sequence[int], new: Sequence[int]) -> list[int]:
    """The blocks of axes `new` that hold the same elements as those of axes `old`, both flattening
    to one axis.
    """
    size, block = 1, 1
    for s, b in zip(reversed(old), reversed(old_block), strict=True):
        if block == size:  # everything further in is one block
            block *= b
        elif b != 1 or size % block:
            raise CannotCarry("the reshape merges axes across its blocks")
        size *= s
    result = []
    for s in reversed(new):
        if block >= size or block % s == 0:
            result.append(s)
            block = max(block // s, 1)
        elif s % block == 0 or s == size:  # only the outermost axis may have a ragged block
            result.append(block)
            block = 1
        else:
            raise CannotCarry("the reshape cuts its blocks")
        size //= s
    return result[::-1]


def squeeze(x: Value, dimensions: Sequence[int]) -> Value:
    """Drops axes of length 1."""
    return reshape(x, [s for a, s in enumerate(x.shape) if a not in dimensions])


def broadcast_in_dim(x: Value, shape: Sequence[int], dimensions: Sequence[int]) -> Value:
    """`lax.broadcast_in_dim`: new axes, and axes of length 1 made longer, are not blocked."""
    if not isinstance(x, QTensor):
        return lax.broadcast_in_dim(x, shape, dimensions)
    old, block = block_of(x), [1] * len(shape)
    for d, b in zip(dimensions, old, strict=True):
        block[d] = b

    def spread(v: Value) -> Value:
        wanted = list(shape)
        for d, s, whole in zip(dimensions, v.shape, x.shape, strict=True):
            wanted[d] = shape[d] if whole == 1 else s
        return broadcast_in_dim(v, wanted, dimensions)

    last_stays = dimensions[-1:] == (len(shape) - 1,) and shape[-1] == x.shape[-1]

    def on_activation(act: activation.Activation) -> activation.Activation:
        sizes = [shape[d] for d in dimensions]
        widen = lambda leaf, n: jnp.broadcast_to(leaf, (*sizes[:n], *leaf.shape[n:]))
        whole = [a == b for a, b in zip(x.shape, sizes, strict=True)]
        act = activation.sliced(act, widen, whole)
        return activation.moved(act, dimensions, sizes, len(shape))

    return _rebuild(x, tuple(block), spread, spread, not last_stays, on_activation)


def static_slice(x: Value, start: Sequence[int], limit: Sequence[int]) -> Value:
    """`lax.slice` without strides, starting where a block starts."""
    if not isinstance(x, QTensor):
        return lax.slice(x, start, limit)
    block = block_of(x)
    scale_start, scale_limit = [], []
    for size, b, first, end in zip(x.shape, block, start, limit, strict=True):
        if b < size and first % b:
            raise CannotCarry("the slice starts inside a block")
        scale_start.append(0 if b >= size else first // b)
        scale_limit.append(1 if b >= size else -(-end // b))
    return _rebuild(
        x,
        block,
        lambda plane: lax.slice(plane, start, (*limit[:-1], min(limit[-1], plane.shape[-1]))),
        lambda s: static_slice(s, scale_start, scale_limit),
        moves_last=(start[-1], limit[-1]) != (0, x.shape[-1]),
        on_activation=lambda act: activation.sliced(
            act,
            lambda leaf, n: lax.slice(
                leaf, (*start[:n], *[0] * (leaf.ndim - n)), (*limit[:n], *leaf.shape[n:])
            ),
            [(i, j) == (0, s) for i, j, s in zip(start, limit, x.shape, strict=True)],
        ),
    )


def dynamic_slice(x: Value, starts: Sequence[Any], sizes: Sequence[int]) -> Value:
    """`lax.dynamic_slice` along axes that no block runs along."""
    if not isinstance(x, QTensor):
        return lax.dynamic_slice(x, starts, sizes)
    block = block_of(x)
    if any(1 < b < size != taken for size, b, taken in zip(x.shape, block, sizes, strict=True)):
        raise CannotCarry("the dynamic slice runs along a blocked axis")
    zero = np.zeros(
        (),
        np.asarray(starts[0]).dtype
        if isinstance(starts[0], (int, np.ndarray))
        else starts[0].dtype,
    )
    one_block = [
        b >= size or size == taken for size, b, taken in zip(x.shape, block, sizes, strict=True)
    ]

    def cut(v: Value, lengths: Sequence[int]) -> Value:
        first = [
            zero if v.shape[a] == n else s
            for a, (s, n) in enumerate(zip(starts, lengths, strict=True))
        ]
        return dynamic_slice(v, first, lengths)

    return _rebuild(
        x,
        block,
        lambda plane: cut(plane, (*sizes[:-1], min(sizes[-1], plane.shape[-1]))),
        lambda s: cut(s, [s.shape[a] if one_block[a] else n for a, n in enumerate(sizes)]),
        moves_last=sizes[-1] != x.shape[-1],
        on_activation=lambda act: activation.sliced(
            act,
            lambda leaf, n: lax.dynamic_slice(
                leaf, (*starts[:n], *[zero] * (leaf.ndim - n)), (*sizes[:n], *leaf.shape[n:])
            ),
            [n == s for n, s in zip(sizes, x.shape, strict=True)],
        ),
    )


def concatenate(xs: Sequence[Any], dimension: int) -> Any:
    """`lax.concatenate` of arrays, or of QTensors that are held alike."""
    first = xs[0]
    if len({jax.tree.structure(x) for x in xs}) > 1:
        raise CannotCarry("it is concatenated with something held differently")
    if not isinstance(first, QTensor):
        return _concatenate_arrays(xs, dimension)
    block = block_of(first)
    ragged = any(x.shape[dimension] % block[dimension] for x in xs[:-1])
    end = list(block)  # the last block may be shorter
    end[dimension] = min(block[dimension], xs[-1].shape[dimension])
    if ragged or [block_of(x) for x in xs] != [*[block] * (len(xs) - 1), tuple(end)]:
        raise CannotCarry("it is concatenated inside a block")
    if jax.tree.leaves(first.activation):
        raise CannotCarry("it is concatenated with something of another activation")
    if dimension == first.ndim - 1 and "uint1" in FORMATS[first.format].storage:
        raise CannotCarry("its bits are packed along the last axis")

    def join(field: str) -> Any:
        parts = [getattr(x, field) for x in xs]
        if not isinstance(parts[0], QTensor):
            return jax.tree.map(lambda *p: _concatenate_arrays(p, dimension), *parts)
        try:
            return concatenate(parts, dimension)
        except CannotCarry:
            return concatenate([dequantize(p) for p in parts], dimension)

    fields = ("qvalue", "scale", "zero_point", "offset")
    return dataclasses.replace(first, **{f: join(f) for f in fields}, block=blocks.trim(block))


def _concatenate_arrays(xs: Sequence[jax.Array], dimension: int) -> jax.Array:
    return move_codes(lambda *parts: lax.concatenate(parts, dimension), *xs)


def take(
    x: Value,
    indices: jax.Array,
    dims: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    mode: Any,
) -> Value:
    """A `lax.gather` that takes every blocked axis whole."""
    if not isinstance(x, QTensor):
        return lax.gather(x, indices, dims, slice_sizes, mode=mode)
    block = block_of(x)
    whole = [n == size for n, size in zip(slice_sizes, x.shape, strict=True)]
    if not all(taken or b == 1 for taken, b in zip(whole, block, strict=True)):
        raise CannotCarry("the looked-up axis runs through its blocks")
    filled = lax.GatherScatterMode.from_any(mode) == lax.GatherScatterMode.FILL_OR_DROP
    if filled and any(whole[a] and block[a] != 1 for a in dims.start_index_map):
        raise CannotCarry("the lookup may run out of a blocked axis")

    def rows(v: Value) -> Value:
        sizes = [s if taken else n for s, n, taken in zip(v.shape, slice_sizes, whole, strict=True)]
        return take(v, indices, dims, sizes, mode)

    dropped = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    kept = [a for a in range(x.ndim) if a not in dropped]
    placed = [1] * (len(dims.offset_dims) + indices.ndim - 1)
    for d, a in zip(dims.offset_dims, kept, strict=True):
        placed[d] = block[a]
    last_stays = kept[-1:] == [x.ndim - 1] and whole[-1] and dims.offset_dims[-1] == len(placed) - 1

    def on_activation(act: activation.Activation) -> activation.Activation:
        def refuse(leaf: jax.Array, n: int) -> jax.Array:
            raise CannotCarry("the lookup takes some of the stacked axes of its activation")

        places = dict(zip(kept, dims.offset_dims, strict=True))
        act = activation.sliced(act, refuse, whole)
        return activation.moved(act, [places.get(a) for a in range(x.ndim)], x.shape, len(placed))

    return _rebuild(x, tuple(placed), rows, rows, not last_stays, on_activation)


def convert(x: QTensor, dtype: Any) -> QTensor:
    """The same codes, dequantized to another floating-point dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CannotCarry(f"it is converted to {np.dtype(dtype)}")
    return dataclasses.replace(x, dtype=np.dtype(dtype))


def slice_leading(q: QTensor) -> QTensor | None:
    """`q` as a scan over its leading axis needs it, or None if a block or the features of its
    activation span that axis.
    """
    if q.param_shape is None:
        stacked = q.ndim > 1 and blocks.align(q.block, q.ndim)[0] == 1
    else:
        stacked = len(q.storage_shape) > len(q.block)
    if not stacked or (q.activation is not None and -q.ndim in q.activation.axis):
        return None
    nested = {n: v for n in ("scale", "offset") if isinstance(v := getattr(q, n), QTensor)}
    opened: dict[str, Any] = {
        n: v if slice_leading(v) is not None else dequantize(v) for n, v in nested.items()
    }
    if q.activation is not None:
        opened["activation"] = activation.stacked(q.activation, q.shape[0])
    block = q.block if q.param_shape is not None else blocks.trim(q.block)
    return dataclasses.replace(q, block=block, **opened)
