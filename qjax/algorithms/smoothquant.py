"""SmoothQuant: move what is hard to quantize from the activations into the weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qjax.algorithms.base import Algorithm, Notes, Stats, needed
from qjax.algorithms.rtn import rtn
from qjax.algorithms.scaled import quantize_scaled, scale_stats
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.spec import Spec


def smoothquant(
    alpha: float = 0.5, static: bool = False, solver: Callable[[], Algorithm] = rtn
) -> Algorithm:
    """SmoothQuant: divides feature j of the input by s_j and multiplies row j of the weight.

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

    so that y = (x / s) @ (s * w) and both have less to span (Xiao et al., arXiv:2211.10438,
    equation 4). s is the QTensor's `input_scale`; `qjax.models.fold` moves it into the norm before.

    Args:
      alpha: how much of the difficulty goes to the weights, 0 to 1.
      static: whether the input gets one scale from calibration, max|x / s| / largest code, in place
        of one per token from each token's own maximum.
      solver: makes the algorithm that quantizes s * w: `qjax.rtn` or `qjax.gptq`.

    Returns:
      An Algorithm that needs max_abs, and of the Spec an activation ("int8/int8_token").

    Deviations: s_j is 1 where a feature was never seen or its weights are zero.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 16)) * jnp.ones(16).at[3].set(50)[None]
      >>> w = jax.random.normal(jax.random.key(1), (16, 8))
      >>> stats, spec = qjax.Stats(max_abs=jnp.abs(x).max(0)), qjax.Spec.parse("int8/int8_token")
      >>> q, _ = qjax.smoothquant().quantize(w, spec, stats)
      >>> run = lambda q: qjax.quantized(lambda w, x: x @ w)(q, x)
      >>> error = lambda q: float(jnp.sum((run(q) - x @ w) ** 2))
      >>> error(q) < 0.1 * error(qjax.quantize(w, spec, axis=0))
      True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must lie between 0 and 1, got {alpha}")
    inner = solver()

    def quantize(w: jax.Array, spec: Spec, stats: Stats) -> tuple[QTensor, Notes]:
        if spec.activation is None:
            raise ValueError(
                f"smoothquant: {spec} does not quantize the input; write {spec}/int8_token"
            )
        of_x = needed("smoothquant", stats, "max_abs")
        of_w = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=1)
        known = (of_x > 0) & (of_w > 0)
        scale = jnp.where(known, of_x, 1) ** alpha / jnp.where(known, of_w, 1) ** (1 - alpha)
        q, notes = quantize_scaled(inner, w, spec, stats, scale)
        if not static:
            return q, notes
        largest = scale_stats(stats, scale).max_abs
        assert largest is not None
        step = jnp.maximum(jnp.max(largest), 1e-30) / FORMATS[spec.activation.format].max
        assert q.activation is not None
        whole = spec.activation._replace(block=())
        act = dataclasses.replace(q.activation, spec=whole, scale=step)
        return dataclasses.replace(q, activation=act), notes

    needs, options = frozenset({"max_abs"}) | inner.needs, f"{alpha}, {static}, {inner}"
    return Algorithm("smoothquant", needs, True, quantize, options=options)
