"""Traces a function of pytrees into a jaxpr over its arrays; what is no array keeps its Python value."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.qtensor import is_qtensor


class Traced(NamedTuple):
    """A closed jaxpr over the array leaves, and how to put its outputs back into the function's result."""

    jaxpr: Any
    rebuild: Callable[[Sequence[Any]], Any]


def is_array(leaf: Any) -> bool:
    """Whether `leaf` is traced: jax and numpy arrays, and ShapeDtypeStructs standing for them."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def path_string(path: Sequence[Any]) -> str:
    """The path of a parameter below its argument: "layers_0/kernel" for args[0]["layers_0"]["kernel"].value."""
    text = jax.tree_util.keystr(tuple(path)[2:], simple=True, separator="/")
    return text.removesuffix("/value")


def trace(fn: Callable[..., Any], leaves: Sequence[Any], tree: Any, dense: Callable[[Any], Any]) -> Traced:
    """Traces `fn(*args, **kwargs)`, where (args, kwargs) is `tree` with `leaves`, on `dense(leaf)` of each traced leaf."""
    dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf) or is_qtensor(leaf)]
    result: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        full = list(leaves)
        for i, v in zip(dynamic, values, strict=True):
            full[i] = v
        args, kwargs = jax.tree.unflatten(tree, full)
        outputs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
        result[:] = [out_tree, [None if _is_traced(o) else o for o in outputs], [_is_traced(o) for o in outputs]]
        return [o for o in outputs if _is_traced(o)]

    jaxpr = jax.make_jaxpr(flat)(*(dense(leaves[i]) for i in dynamic))
    out_tree, static, traced = result

    def rebuild(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return jax.tree.unflatten(out_tree, [next(rest) if t else s for s, t in zip(static, traced, strict=True)])

    return Traced(jaxpr, rebuild)


def arrays_of(tree: Any) -> list[Any]:
    """The array leaves of `tree`."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_traced(leaf)]


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))
