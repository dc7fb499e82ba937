"""A kernel in the place of its definition."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.mapping import looped


def instead(run: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays: `vmap` loops over it, and its derivatives are those of `definition`."""
    run = looped(run)

    @jax.custom_jvp
    def call(*operands: jax.Array) -> Any:
        return run(*operands)

    @call.defjvp
    def _jvp(operands: Any, tangents: Any) -> Any:
        _, tangent = jax.jvp(definition, operands, tangents)
        return call(*operands), tangent

    return call
