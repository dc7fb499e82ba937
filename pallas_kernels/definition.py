"""A kernel in the place of its definition."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.mapping import looped


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # traced once for the layers of a model
def instead(
    run: Callable[..., Any],
    definition: Callable[..., Any],
    problem: Any,
    operands: tuple[jax.Array, ...],
) -> Any:
    """`run(*operands, problem=problem)`: `vmap` loops over it, and its derivatives are those of
    `definition`, which takes the same.
    """
    kernel = looped(functools.partial(run, problem=problem))

    @jax.custom_jvp
    def call(*operands: jax.Array) -> Any:
        return kernel(*operands)

    @call.defjvp
    def _jvp(operands: Any, tangents: Any) -> Any:
        _, tangent = jax.jvp(functools.partial(definition, problem=problem), operands, tangents)
        return call(*operands), tangent

    return call(*operands)
