"""Traces a function of pytrees into a jaxpr over its arrays; other leaves stay Python values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.qtensor import is_qtensor


class Traced(NamedTuple):
    """A closed jaxpr over the array leaves, and how its outputs become the function's result."""

    jaxpr: Any
    rebuild: Callable[[Sequence[Any]], Any]


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is traced: jax and numpy arrays, and ShapeDtypeStructs standing for them."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def param_path(path: Sequence[Any]) -> str:
    """The path of a parameter: its keys joined by "/", without a trailing "/value"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/").removesuffix("/value")


def trace(
    fn: Callable[..., Any], leaves: Sequence[Any], tree: Any, dense: Callable[[Any], Any]
) -> Traced:
    """Traces `fn(*args, **kwargs)`, flattened to `tree` and `leaves`, on `dense` leaves."""
    dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf) or is_qtensor(leaf)]
    result: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        full = list(leaves)
        for i, v in zip(dynamic, values, strict=True):
            full[i] = v
        args, kwargs = jax.tree.unflatten(tree, full)
        outputs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        result[:] = [
            out_tree,
            [None if _is_traced(o) else o for o in outputs],
            [_is_traced(o) for o in outputs],
        ]
        return [o for o in outputs if _is_traced(o)]

    jaxpr = jax.make_jaxpr(flat)(*(dense(leaves[i]) for i in dynamic))
    out_tree, static, traced = result

    def rebuild(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(
            out_tree, [next(rest) if t else s for s, t in zip(static, traced, strict=True)]
        )

    return Traced(jaxpr, rebuild)


def arrays_of(tree: Any) -> list[Any]:
    """The array leaves of `tree`."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_traced(leaf)]


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
