"""vmap for kernels that know no mapped axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def looped(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on arrays, which `vmap` turns into a loop on the device, not unrolled."""

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> Any:
        return run(*operands)

    @call.def_vmap
    def _vmap(size: int, mapped: Any, *operands: jax.Array) -> tuple[Any, Any]:
        moving = [v for v, is_mapped in zip(operands, mapped, strict=True) if is_mapped]

        def one(parts: list[jax.Array]) -> Any:
            rest = iter(parts)
            pairs = zip(operands, mapped, strict=True)
            return looped(run)(*(next(rest) if is_mapped else v for v, is_mapped in pairs))

        out = lax.map(one, moving)
        return out, jax.tree.map(lambda _: True, out)

    return call
