"""Which tokens a value belongs to: a bool array beside it, followed through the operations.

A mask has the rank of its value; an axis that it does not depend on has length 1. An element counts
if anything that made it counts: elementwise operations keep what all operands keep, and what is
summed over keeps what any summand kept.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qjax import _compat
from qjax.structural import CannotCarry, regroup

Mask: TypeAlias = "jax.Array | None"  # None: all count


def follow(
    eqn: _compat.JaxprEqn, inputs: Sequence[Any], masks: Sequence[Mask], outputs: Sequence[Any]
) -> list[Mask]:
    """The masks of the outputs of an equation, from those of its inputs."""
    if all(m is None for m in masks):
        return [None] * len(outputs)
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return [_aligned(inputs, masks, output) for output in outputs]
    return rule(eqn.params, inputs, masks, outputs)


def both(masks: Sequence[Mask]) -> Mask:
    """What all of them keep."""
    known = [m for m in masks if m is not None]
    if not known:
        return None
    result = known[0]
    for m in known[1:]:
        result = result & m
    return result


def _aligned(inputs: Sequence[Any], masks: Sequence[Mask], output: Any) -> Mask:
    """Of an operation without a rule: the mask stays on leading axes that the output shares."""
    kept = []
    for x, m in zip(inputs, masks, strict=True):
        if m is None:
            continue
        depth = max((a + 1 for a, s in enumerate(m.shape) if s != 1), default=0)
        if output.shape[:depth] == x.shape[:depth]:
            kept.append(m.reshape(*m.shape[:depth], *(1,) * (output.ndim - depth)))
    return both(kept)


def _one(
    rule: Callable[[Mapping[str, Any], Any, jax.Array, Any], Mask],
) -> Callable[..., list[Mask]]:
    """A rule for operations whose first operand has the mask."""

    def run(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
        if masks[0] is None:
            return [None] * len(outputs)
        return [rule(params, inputs, masks[0], outputs[0])]

    return run


def _reshape(params: Mapping[str, Any], inputs: Any, m: jax.Array, output: Any) -> Mask:
    if params.get("dimensions") is not None:
        return None
    before, after = [1] * m.ndim, [1] * output.ndim
    try:
        groups = regroup(inputs[0].shape, output.shape)
    except CannotCarry:
        return None
    for old, new in groups:
        if any(m.shape[a] != 1 for a in old):
            for a in old:
                before[a] = inputs[0].shape[a]
            for a in new:
                after[a] = output.shape[a]
    return jnp.broadcast_to(m, before).reshape(after)


def _broadcast(params: Mapping[str, Any], inputs: Any, m: jax.Array, output: Any) -> Mask:
    shape = [1] * output.ndim
    for d, s in zip(params["broadcast_dimensions"], m.shape, strict=True):
        shape[d] = s
    return lax.broadcast_in_dim(m, shape, params["broadcast_dimensions"])


def _slice(params: Mapping[str, Any], inputs: Any, m: jax.Array, output: Any) -> Mask:
    pick = lambda values, single: [
        v if s != 1 else single for v, s in zip(values, m.shape, strict=True)
    ]
    strides = None if params["strides"] is None else pick(params["strides"], 1)
    return lax.slice(m, pick(params["start_indices"], 0), pick(params["limit_indices"], 1), strides)


def _dynamic_slice(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    m, starts = masks[0], inputs[1:]
    if m is None:
        return [None]
    sizes = [n if s != 1 else 1 for n, s in zip(params["slice_sizes"], m.shape, strict=True)]
    zero = jnp.zeros((), jnp.asarray(starts[0]).dtype)
    starts = [v if s != 1 else zero for v, s in zip(starts, m.shape, strict=True)]
    return [lax.dynamic_slice(m, starts, sizes)]


def _concatenate(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    axis, ndim = params["dimension"], outputs[0].ndim
    whole = [jnp.ones((1,) * ndim, jnp.bool_) if m is None else m for m in masks]
    common = list(
        jnp.broadcast_shapes(*([*m.shape[:axis], 1, *m.shape[axis + 1 :]] for m in whole))
    )
    parts = []
    for x, m in zip(inputs, whole, strict=True):
        common[axis] = x.shape[axis]
        parts.append(jnp.broadcast_to(m, common))
    return [lax.concatenate(parts, axis)]


def _split(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    m, axis = masks[0], params["axis"]
    if m is None or m.shape[axis] == 1:
        return [m] * len(outputs)
    return list(lax.split(m, params["sizes"], axis))


def _reduce(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    axes = params["axes"]
    return [both([None if m is None else jnp.any(m, axes) for m in masks])] * len(outputs)


def _gather(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    (m, by), (x, indices), numbers = masks, inputs, params["dimension_numbers"]
    ndim = outputs[0].ndim
    found = []
    if m is not None:
        sizes = [n if s != 1 else 1 for n, s in zip(params["slice_sizes"], m.shape, strict=True)]
        for a in numbers.operand_batching_dims:
            if m.shape[a] == 1:
                m = jnp.repeat(m, x.shape[a], a)
        found.append(lax.gather(m, indices, numbers, sizes, mode="clip"))
    if by is not None:
        by = jnp.all(by, -1)
        places = [a for a in range(ndim) if a not in numbers.offset_dims]
        shape = [1] * ndim
        for a, s in zip(places, by.shape, strict=True):
            shape[a] = s
        found.append(by.reshape(shape))
    return [both(found)]


def _dot(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    contract, batch = params["dimension_numbers"]
    ndim, found, start = outputs[0].ndim, [], len(batch[0])
    for side, (x, m) in enumerate(zip(inputs, masks, strict=True)):
        free = [a for a in range(x.ndim) if a not in (*contract[side], *batch[side])]
        if m is not None:
            m = jnp.any(m, tuple(contract[side]), keepdims=True)
            m = lax.transpose(m, (*batch[side], *free, *contract[side]))
            shape = [1] * ndim
            shape[: len(batch[side])] = [m.shape[i] for i in range(len(batch[side]))]
            for i in range(len(free)):
                shape[start + i] = m.shape[len(batch[side]) + i]
            found.append(m.reshape(shape))
        start += len(free)
    return [both(found)]


def _drop(params: Any, inputs: Any, masks: Any, outputs: Any) -> list[Mask]:
    """Of operations that mix tokens: what comes out belongs to none."""
    return [None] * len(outputs)


_RULES: Mapping[str, Callable[..., list[Mask]]] = {
    "transpose": _one(lambda p, v, m, out: lax.transpose(m, p["permutation"])),
    "reshape": _one(_reshape),
    "squeeze": _one(lambda p, v, m, out: lax.squeeze(m, p["dimensions"])),
    "broadcast_in_dim": _one(_broadcast),
    "slice": _one(_slice),
    "rev": _one(lambda p, v, m, out: lax.rev(m, [d for d in p["dimensions"] if m.shape[d] != 1])),
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "split": _split,
    "gather": _gather,
    "dot_general": _dot,
    "sort": _drop,
    **dict.fromkeys(
        ("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin").split(),
        _reduce,
    ),
}
