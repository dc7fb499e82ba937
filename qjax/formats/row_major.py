"""A mark on an array that XLA for a GPU may not lay out in another order.

`jax.lax.platform_dependent` around a layout constraint would say the same, but take as long to
lower as the decoding beside it; a primitive with a rule per platform costs nothing.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_primitive = Primitive("qjax_row_major")
_primitive.def_impl(lambda x: x)  # outside of a program an array lies as it lies
_primitive.def_abstract_eval(lambda x: x)
batching.primitive_batchers[_primitive] = lambda args, axes: (_primitive.bind(*args), axes[0])


def row_major(x: jax.Array) -> jax.Array:
    """`x`; inside a program for a GPU its last axis stays the one that lies together in memory."""
    return _primitive.bind(x)


def _constrained(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


mlir.register_lowering(_primitive, lambda ctx, x: [x])
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(
        _primitive, mlir.lower_fun(_constrained, multiple_results=False), platform=_platform
    )
