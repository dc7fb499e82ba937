"""RTN: round to nearest."""

import functools

import jax

from qjax.algorithms.base import Algorithm, Notes, Stats
from qjax.algorithms.grid import nearest
from qjax.qtensor import QTensor
from qjax.spec import Spec


def rtn(scale_method: str | None = None) -> Algorithm:
    """Round to nearest: every element takes the closest value that its block's scale allows.

    Args:
      scale_method: how scales are chosen, in place of what the Spec says: "absmax", "minmax" or
        "mse" (the clip of least squared error); see `Spec.scale_method`.

    Returns:
      An Algorithm that needs no statistics; a Rule without an algorithm does the same.

    Example:
      >>> w = jax.random.normal(jax.random.key(1), (128, 8))
      >>> q, _ = qjax.rtn("mse").quantize(w, qjax.Spec.parse("int4_g64"), qjax.Stats())
      >>> error = lambda q: float(jnp.sum((w - qjax.dequantize(q)) ** 2))
      >>> error(q) < error(qjax.quantize(w, "int4_g64", axis=0))
      True
    """

    def quantize(
        w: jax.Array, spec: Spec, stats: Stats, within: jax.Array | None = None
    ) -> tuple[QTensor, Notes]:
        method = spec.scale_method if scale_method is None else scale_method
        return _rtn(w, spec._replace(scale_method=method), within), {}

    return Algorithm("rtn", frozenset(), False, quantize, options=f"{scale_method}")


@functools.partial(jax.jit, static_argnums=1)
def _rtn(w: jax.Array, spec: Spec, within: jax.Array | None) -> QTensor:
    return nearest(w, spec, within)[0]
