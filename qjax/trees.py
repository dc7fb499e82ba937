"""Trees that hold QTensors: what trains and what is frozen; layers stacked and unstacked."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax import structural
from qjax.formats import move_codes
from qjax.qtensor import QTensor, check_leaf, is_qtensor
from qjax.tracing import param_path

Trainable = str | Callable[[str, Any], bool] | None


def partition(tree: Any, trainable: Trainable = None) -> tuple[Any, Any]:
    """Splits a tree into (trainable, frozen): each has None where the other has a leaf.

    Args:
      tree: any pytree; a QTensor is one leaf and always frozen, its scales included.
      trainable: which leaves train: a regular expression that the whole path must match, a
        predicate `(path, leaf) -> bool`, or None for every floating-point array.

    Returns:
      Two trees that `combine` puts together. optax and `jax.grad` see only arrays in the first.

    Raises:
      ValueError: if a regular expression matches no path, or what is chosen cannot be trained.

    Example:
      >>> params = {"w": qjax.quantize(jnp.ones((8, 4)), "int8", axis=0), "b": jnp.zeros(4)}
      >>> trainable, frozen = qjax.partition(params)
      >>> jax.tree.map(jnp.shape, trainable), frozen["b"]
      ({'b': (4,), 'w': None}, None)
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    named = [(param_path(path), leaf) for path, leaf in leaves]
    chosen = [_is_chosen(path, leaf, trainable) for path, leaf in named]
    if isinstance(trainable, str) and not any(chosen):
        near = difflib.get_close_matches(trainable, [p for p, _ in named], n=3, cutoff=0.3)
        hint = f" (close: {', '.join(near)})" if near else ""
        raise ValueError(f"trainable={trainable!r} matches no parameter{hint}")
    for (path, leaf), train in zip(named, chosen, strict=True):
        if train and not _is_float(leaf):
            raise ValueError(
                f"{path}: {leaf!r} cannot be trained, only floating-point arrays can; "
                "leave it frozen, or dequantize it first"
            )
    values = [leaf for _, leaf in named]
    pick = lambda wanted: [v if c == wanted else None for v, c in zip(values, chosen, strict=True)]
    return jax.tree.unflatten(structure, pick(True)), jax.tree.unflatten(structure, pick(False))


def combine(*trees: Any) -> Any:
    """Puts the trees that `partition` made together: at every place the one that is not None.

    Raises:
      ValueError: if two trees have something at the same place.

    Example:
      >>> qjax.combine({"w": None, "b": 1.0}, {"w": 2.0, "b": None})
      {'b': 1.0, 'w': 2.0}
    """

    def first(path: Any, *values: Any) -> Any:
        present = [v for v in values if v is not None]
        if len(present) > 1:
            raise ValueError(f"{param_path(path)}: {len(present)} trees have a value here, one may")
        return present[0] if present else None

    leaf = lambda v: v is None or is_qtensor(v)
    return jax.tree_util.tree_map_with_path(first, *trees, is_leaf=leaf)


def stack(trees: Sequence[Any]) -> Any:
    """One tree of leaves with a new leading axis, from trees held alike: layers for a scan.

    Raises:
      ValueError: naming the path, if a leaf differs in format, block, shape or dtype.

    Example:
      >>> layers = [{"w": qjax.quantize(jnp.ones((8, 4)), "int8", axis=0)} for _ in range(3)]
      >>> qjax.stack(layers)["w"].shape
      (3, 8, 4)
    """
    if not trees:
        raise ValueError("stack needs at least one tree")

    def join(path: Any, *leaves: Any) -> Any:
        for leaf in leaves:
            check_leaf(leaf, param_path(path))
        kinds = {_kind(leaf) for leaf in leaves}
        if len(kinds) > 1:
            held = " and ".join(dict.fromkeys(map(_describe, leaves)))
            raise ValueError(
                f"{param_path(path)}: what is held differently cannot be stacked: {held}"
            )
        return jax.tree.map(lambda *parts: move_codes(lambda *v: jnp.stack(v), *parts), *leaves)

    return jax.tree_util.tree_map_with_path(join, *trees, is_leaf=is_qtensor)


def unstack(tree: Any) -> tuple[Any, ...]:
    """The trees that `stack` put together: every leaf cut along its leading axis.

    Raises:
      ValueError: naming the path, if a leaf has no leading axis, another length than the others, or
        blocks that span it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    if not leaves:
        raise ValueError("unstack needs a tree with at least one array")
    for path, leaf in leaves:
        check_leaf(leaf, param_path(path))
    lengths = {param_path(path): (leaf.shape[0] if leaf.ndim else None) for path, leaf in leaves}
    count = next(iter(lengths.values()))
    for path, length in lengths.items():
        if length is None or length != count:
            raise ValueError(f"{path}: leading axis of length {length}, the others have {count}")
    ready = []
    for path, leaf in leaves:
        cut = structural.slice_leading(leaf) if isinstance(leaf, QTensor) else leaf
        if cut is None:
            raise ValueError(f"{param_path(path)}: {leaf!r} has blocks that span its leading axis")
        ready.append(cut)
    one = lambda i: [jax.tree.map(lambda v: v[i], leaf) for leaf in ready]
    return tuple(jax.tree.unflatten(structure, one(i)) for i in range(count or 0))


def _is_chosen(path: str, leaf: Any, trainable: Trainable) -> bool:
    if trainable is None:
        return _is_float(leaf)
    if isinstance(trainable, str):
        return re.fullmatch(trainable, path) is not None
    return bool(trainable(path, leaf))


def _is_float(leaf: Any) -> bool:
    if is_qtensor(leaf) or not hasattr(leaf, "dtype"):
        return False
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _describe(leaf: Any) -> str:
    return repr(leaf) if is_qtensor(leaf) else f"{leaf.dtype} of shape {leaf.shape}"


def _kind(leaf: Any) -> Any:
    arrays = jax.tree.leaves(leaf)
    return jax.tree.structure(leaf), tuple(
        (v.shape, str(v.dtype)) for v in map(jnp.asarray, arrays)
    )
