"""Activation: what a quantized weight asks of the other operand of its matmul."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qjax import _compat
from qjax.spec import Spec

Axes = tuple[int, ...]

COORDINATES = ("input_scale", "permutation", "signs")  # the leaves that change coordinates
LEAVES = (*COORDINATES, "scale")
_FEATURE_AXES = {**dict.fromkeys(COORDINATES, 1), "scale": 0}  # of a leaf, after its stacked ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """What happens to the other operand of a matmul, and what the weight underwent for it.

    Let w be a weight along its contracted axes, flattened to length k, and x the other operand.
    The matmul takes, instead of x and w,

        x' = P(R(x / s))        w' = P(R(s * w))        so that x' @ w' = x @ w

    - s is `input_scale` (AWQ, arXiv:2306.00978; SmoothQuant, arXiv:2211.10438);
    - R(v) = (v * signs) @ H with H the orthonormal Walsh-Hadamard matrix in Sylvester's order, on
      consecutive blocks whose length is the largest power of two that divides k (QuaRot,
      arXiv:2404.00456); R is orthogonal;
    - P(v)[i] = v[permutation[i]] (the act-order of GPTQ, arXiv:2210.17323).

    A QTensor holds w'; `dequantize` undoes all three and returns w. What is None is the identity.
    Then x' may be quantized while the matmul runs, x' ~ c * t with codes c = encode(x' / t):

    - `spec` says in which format; its scale t is max|x'| / largest code per token (`block` None) or
      for all of x' (`block` ()), or the static `scale` if there is one; codes saturate.
    - `threshold` (LLM.int8(), arXiv:2208.07339, section 3.2): features of x' of which any token has
      a magnitude of at least that are multiplied in floating point with the dequantized rows, the
      others in `spec`. Up to `budget` of them are gathered; where a call has more, or the weight
      has no rows to gather (groups, parallel axes), that product takes all features; on a kernel
      the rest is added (64 of them are gathered there without a budget).

    Gradients are straight-through: those of x @ dequantize(w).

    Attributes:
      spec: how x' is quantized; None leaves it as it is.
      axis: the contracted axes of the weight in rising order, counted from its end (negative), so
        that stacking layers does not move them; () where no leaf changes coordinates.
      threshold: of outlier features; None for none.
      budget: how many outlier features a call has at most, in general; None for all.
      input_scale: positive floats `[*lead, k]`. `lead` are leading axes of the weight that are
        stacked (layers) or run in parallel (experts); all leaves of k have the same.
      permutation: integers `[*lead, k]`, each of 0..k-1 once.
      signs: +1 and -1, `[*lead, k]`, of any number dtype.
      scale: positive floats `[*lead]`.

    Example:
      >>> w, x = jnp.arange(8.0).reshape(4, 2), jnp.ones((1, 4))
      >>> act = Activation(axis=(-2,), input_scale=jnp.array([1.0, 2.0, 4.0, 8.0]))
      >>> held = to_storage(act, w)
      >>> q = dataclasses.replace(qjax.quantize(held, "int8", 0), activation=act)
      >>> bool(jnp.allclose(qjax.dequantize(q), w, atol=0.25))
      True
    """

    spec: Spec | None = dataclasses.field(default=None, metadata={"static": True})
    axis: Axes = dataclasses.field(default=(), metadata={"static": True})
    threshold: float | None = dataclasses.field(default=None, metadata={"static": True})
    budget: int | None = dataclasses.field(default=None, metadata={"static": True})
    input_scale: jax.Array | None = None
    permutation: jax.Array | None = None
    signs: jax.Array | None = None
    scale: jax.Array | None = None


def coordinates(act: Activation) -> dict[str, jax.Array]:
    """The leaves that change coordinates, by name."""
    return {n: v for n in COORDINATES if (v := getattr(act, n)) is not None}


def changes_coordinates(act: Activation | None) -> bool:
    """Whether the weight is held in other coordinates than the model's."""
    return act is not None and bool(coordinates(act))


def quantizing(act: Activation) -> Activation | None:
    """What is left of `act` once x is in the weight's coordinates."""
    if act.spec is None:
        return None
    return dataclasses.replace(act, axis=(), **dict.fromkeys(COORDINATES))


def to_storage(act: Activation, w: jax.Array) -> jax.Array:
    """P(R(s * w)): a weight in the coordinates in which its QTensor holds it."""

    def change(act: Activation, v: jax.Array) -> jax.Array:
        v = v if act.input_scale is None else v * _fit(act.input_scale, v)
        return _permute(act, _rotate(act, v))

    lead, axes = weight_axes(act, w.ndim)
    return _on_features(change, act, w, lead, axes)


def from_storage(act: Activation, w: jax.Array) -> jax.Array:
    """The inverse of `to_storage`: R and P undone, divided by s."""

    def change(act: Activation, v: jax.Array) -> jax.Array:
        if act.permutation is not None:
            v = jnp.take(v, jnp.argsort(act.permutation), axis=-1)
        if act.signs is not None:
            v = hadamard(v) * _fit(act.signs, v)
        return v if act.input_scale is None else v / _fit(act.input_scale, v)

    lead, axes = weight_axes(act, w.ndim)
    return _on_features(change, act, w, lead, axes)


def on_input(act: Activation, x: jax.Array, lead: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """P(R(x / s)), in float32, rounded to the dtype of x.

    Args:
      act: its leaves have one axis for each of `lead`, then k.
      x: the other operand.
      lead: the axes of x that run in parallel with the leading axes of the leaves.
      axes: the axes of x that are multiplied with `act.axis`, in that order.
    """

    def change(act: Activation, v: jax.Array) -> jax.Array:
        v = v if act.input_scale is None else v / _fit(act.input_scale, v)
        return _permute(act, _rotate(act, v))

    return _on_features(change, act, x.astype(jnp.float32), lead, axes).astype(x.dtype)


def weight_axes(act: Activation, ndim: int) -> tuple[Axes, Axes]:
    """(leading, contracted) axes of a weight of `ndim` axes that the leaves of `act` run along."""
    leaves = list(coordinates(act).values())
    lead = leaves[0].ndim - 1 if leaves else 0
    return tuple(range(lead)), tuple(a + ndim for a in act.axis)


def hadamard(x: jax.Array) -> jax.Array:
    """`x @ H` along the last axis, H the orthonormal Walsh-Hadamard matrix in blocks; H @ H = 1."""
    length = x.shape[-1]
    block, half, y = length & -length, 1, x
    while half < block:
        pairs = y.reshape(*x.shape[:-1], length // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([low + high, low - high], axis=-2).reshape(x.shape)
        half *= 2
    return y * jnp.asarray(block**-0.5, x.dtype)


def _rotate(act: Activation, v: jax.Array) -> jax.Array:
    return v if act.signs is None else hadamard(v * _fit(act.signs, v))


def _permute(act: Activation, v: jax.Array) -> jax.Array:
    return v if act.permutation is None else jnp.take(v, act.permutation, axis=-1)


def _fit(leaf: jax.Array, v: jax.Array) -> jax.Array:
    return leaf.astype(v.dtype).reshape((1,) * (v.ndim - 1) + (-1,))


def _on_features(
    change: Callable[[Activation, jax.Array], jax.Array],
    act: Activation,
    v: jax.Array,
    lead: Sequence[int],
    axes: Sequence[int],
) -> jax.Array:
    """`change` on `v` with `axes` flattened and last, once for each index of its axes `lead`.

    Under Explicit mesh axes the features are gathered before what mixes them, and cut again.
    """
    where = _compat.explicit_sharding(v)
    if where is not None and (
        len(axes) > 1 or act.permutation is not None or act.signs is not None
    ):
        whole = [None if a in axes else entry for a, entry in enumerate(where.spec)]
        v = jax.sharding.reshard(v, NamedSharding(where.mesh, PartitionSpec(*whole)))
    last = range(v.ndim - len(axes), v.ndim)
    v = jnp.moveaxis(v, (*lead, *axes), (*range(len(lead)), *last))
    shape = v.shape
    flat = v.reshape(*shape[: v.ndim - len(axes)], -1)
    for _ in lead:
        change = jax.vmap(change)
    flat = change(dataclasses.replace(act, scale=None), flat)
    v = jnp.moveaxis(flat.reshape(shape), (*range(len(lead)), *last), (*lead, *axes))
    return v if where is None else jax.sharding.reshard(v, where)


def check(act: Any, shape: Axes, where: str) -> None:
    """Raises ValueError if `act` is none that a weight of `shape` can have."""
    if not isinstance(act, Activation):
        raise ValueError(
            f"{where}activation must be an Activation or None, got {type(act).__name__}"
        )
    _check_static(act, len(shape), where)
    if act.scale is not None:
        if act.spec is None or act.spec.block != ():
            raise ValueError(
                f"{where}activation.scale is static: it needs a spec with block=(), got {act.spec}"
            )
        _check_leaf(act, "scale", tuple(shape[: len(getattr(act.scale, "shape", ()))]), where)
    leaves = list(coordinates(act))
    if not leaves:
        return
    if not act.axis:
        raise ValueError(f"{where}activation.{leaves[0]} needs the axis that it runs along")
    count = len(getattr(getattr(act, leaves[0]), "shape", ())) - 1
    first = min(act.axis) + len(shape)
    if not 0 <= count <= first:
        raise ValueError(
            f"{where}activation.{leaves[0]} must have one axis for its features, after at most "
            f"{first} stacked ones, got {_kind(getattr(act, leaves[0]))}"
        )
    needed = (*shape[:count], math.prod(shape[a] for a in act.axis))
    for name in leaves:
        _check_leaf(act, name, needed, where)


def _check_static(act: Activation, ndim: int, where: str) -> None:
    if act.spec is not None and (
        not isinstance(act.spec, Spec) or act.spec.block not in (None, ())
    ):
        raise ValueError(
            f"{where}activation.spec must be None or a Spec with block None (per token) or () "
            f"(for all of it), got {act.spec!r}"
        )
    axis = act.axis
    whole = isinstance(axis, tuple) and all(isinstance(a, int) and -ndim <= a < 0 for a in axis)
    if not whole or list(axis) != sorted(set(axis)):
        raise ValueError(
            f"{where}activation.axis must be rising axes from -{ndim} to -1, got {axis!r}"
        )
    if act.threshold is not None and (
        act.spec is None or not isinstance(act.threshold, float) or not act.threshold > 0
    ):
        raise ValueError(
            f"{where}activation.threshold must be a positive float beside a spec, "
            f"got {act.threshold!r} beside {act.spec}"
        )
    if act.budget is not None and (
        act.threshold is None or type(act.budget) is not int or act.budget < 1
    ):
        raise ValueError(
            f"{where}activation.budget must be a positive int beside a threshold, "
            f"got {act.budget!r} beside {act.threshold}"
        )


def _check_leaf(act: Activation, name: str, needed: Axes, where: str) -> None:
    leaf: Any = getattr(act, name)
    kinds = {"permutation": (jnp.integer,), "signs": (jnp.integer, jnp.floating)}
    of_kind = hasattr(leaf, "dtype") and any(
        jnp.issubdtype(leaf.dtype, k) for k in kinds.get(name, (jnp.floating,))
    )
    if not of_kind or tuple(getattr(leaf, "shape", ())) != needed:
        kind = {"permutation": "an integer", "signs": "a number"}.get(name, "a floating-point")
        raise ValueError(
            f"{where}activation.{name} must be {kind} array of shape {needed}, got {_kind(leaf)}"
        )


def _kind(leaf: Any) -> str:
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype} of shape {tuple(leaf.shape)}"
    return type(leaf).__name__


class CannotMove(ValueError):
    """An operation would cut or mix the features that an Activation describes."""


def moved(
    act: Activation,
    positions: Sequence[int | None],
    shape: Sequence[int],
    ndim: int,
    features: Axes | None = None,
) -> Activation:
    """`act` after an operation that puts axis a of a weight of `shape` at `positions[a]` of `ndim`.

    None stands for an axis that is gone. Features keep their order and stacked axes stay in front;
    a stacked axis may go if it has length 1. `features` are the new axes of the features where
    positions cannot tell them.
    """
    _, axes = weight_axes(act, len(shape))
    if features is None:
        features = tuple(p for a in axes if (p := positions[a]) is not None)
        if len(features) < len(axes) or list(features) != sorted(features):
            raise CannotMove("it moves the features of its activation")

    def follow(name: str) -> Any:
        leaf = getattr(act, name)
        if leaf is None:
            return None
        leading = range(leaf.ndim - _FEATURE_AXES[name])
        stay = [a for a in leading if positions[a] is not None]
        if [positions[a] for a in stay] != list(range(len(stay))) or any(
            shape[a] != 1 for a in leading if a not in stay
        ):
            raise CannotMove("it moves the stacked axes of its activation")
        kept = [leaf.shape[a] for a in stay]
        return (
            leaf if len(stay) == len(leading) else leaf.reshape(*kept, *leaf.shape[len(leading) :])
        )

    leaves = {n: follow(n) for n in _FEATURE_AXES}
    return dataclasses.replace(act, axis=tuple(a - ndim for a in features), **leaves)


def sliced(
    act: Activation, cut: Callable[[jax.Array, int], jax.Array], whole: Sequence[bool]
) -> Activation:
    """`act` after a slice of its weight: `cut(leaf, number of its stacked axes)` slices a leaf.

    `whole` tells the axes that the slice takes as they are.
    """
    _, axes = weight_axes(act, len(whole))
    if not all(whole[a] for a in axes):
        raise CannotMove("it cuts the features of its activation")
    return on_leaves(act, lambda leaf, n: leaf if all(whole[:n]) else cut(leaf, n))


def stacked(act: Activation, length: int) -> Activation:
    """`act` with all leaves stacked along the first axis of its weight, for a scan over it."""
    return on_leaves(
        act,
        lambda leaf, count: leaf if count else jnp.broadcast_to(leaf, (length, *leaf.shape)),
    )


def on_leaves(act: Activation, change: Callable[[jax.Array, int], Any]) -> Activation:
    """`change(leaf, number of its stacked axes)` for every leaf."""
    leaves = {n: v for n in _FEATURE_AXES if (v := getattr(act, n)) is not None}
    changed = {n: change(v, v.ndim - _FEATURE_AXES[n]) for n, v in leaves.items()}
    return dataclasses.replace(act, **changed)
