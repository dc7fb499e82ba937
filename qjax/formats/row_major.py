"""A mark on an array that XLA for a GPU may not lay out in another order.

`jax.lax.platform_dependent` around a layout constraint would say the same, but take as long to
lower as the decoding beside it; a primitive with a rule per platform costs nothing.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_primitive = Primitive("qjax_row_major")
_primitive.def_impl(lambda x, alone: x)  # outside of a program an array lies as it lies
_primitive.def_abstract_eval(lambda x, alone: x)


def row_major(x: jax.Array, *, alone: bool = False) -> jax.Array:
    """`x`; inside a program for a GPU its last axis stays the one that lies together in memory.

    With `alone` what makes it there is not joined with what uses it.
    """
    return _primitive.bind(x, alone=alone)


def _batched(args: tuple[jax.Array], axes: tuple[int], alone: bool) -> tuple[jax.Array, int]:
    return row_major(*args, alone=alone), axes[0]


def _constrained(x: jax.Array, alone: bool) -> jax.Array:
    x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(x) if alone else x


batching.primitive_batchers[_primitive] = _batched
mlir.register_lowering(_primitive, lambda ctx, x, alone: [x])
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_constrained, multiple_results=False), platform=_platform
    )
