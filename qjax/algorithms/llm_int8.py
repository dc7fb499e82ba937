"""LLM.int8(): features with outliers are multiplied apart, in floating point."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activation import Activation
from qjax.algorithms.base import Algorithm, Notes, Stats, needed
from qjax.algorithms.grid import nearest
from qjax.qtensor import QTensor
from qjax.spec import Spec


def llm_int8(threshold: float = 6.0) -> Algorithm:
    """LLM.int8(): x @ w in int8, but for the features in which some token is an outlier.

        O = {j : max over tokens |x_j| >= threshold}
        y = t * ((codes of x without O) @ (codes of w)) * s + x[:, O] @ w_q[O, :]

    t is one scale per token, taken after its outliers were set to zero, s one per output (Dettmers
    et al., arXiv:2208.07339, section 3.2). Which features are outliers is settled in every call,
    from all its tokens: the result of a token depends on what it is batched with, as in
    bitsandbytes. The second product gathers as many features as `budget` says, which is what
    calibration saw, with half as much to spare; a call that has more takes all features in floating
    point, or on a kernel the rest (`lax.cond`), so that the result is the same.

    Args:
      threshold: of |x|.

    Returns:
      An Algorithm that needs max_abs, and of the Spec an activation and one scale per output
      ("int8/int8_token"). Its notes: "outliers", how many features calibration saw.

    Deviations: the second product takes the dequantized rows in float32; bitsandbytes takes them in
    float16.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.ones(32).at[3].set(30)[None]
      >>> w = jax.random.normal(jax.random.key(1), (32, 8))
      >>> algorithm, stats = qjax.llm_int8(), qjax.Stats(max_abs=jnp.abs(x).max(0))
      >>> q = algorithm.finish(*algorithm.quantize(w, qjax.Spec.parse("int8/int8_token"), stats))
      >>> q.activation.threshold, q.activation.budget
      (6.0, 8)
    """
    if not threshold > 0:
        raise ValueError(f"llm_int8: threshold must be positive, got {threshold}; 6.0 is usual")

    def quantize(w: jax.Array, spec: Spec, stats: Stats) -> tuple[QTensor, Notes]:
        if spec.activation is None:
            raise ValueError(
                f"llm_int8: {spec} does not quantize the input; write {spec}/int8_token"
            )
        outliers = jnp.sum(needed("llm_int8", stats, "max_abs") >= threshold)
        q, _, _ = nearest(w, spec)
        act = Activation(spec=spec.activation, threshold=float(threshold))
        return dataclasses.replace(q, activation=act), {"outliers": outliers}

    def finish(q: QTensor, notes: Notes) -> QTensor:
        most = int(np.max(np.asarray(notes["outliers"]), initial=0))
        budget = 8 * max(-(-3 * most // 16), 1)
        assert q.activation is not None
        return dataclasses.replace(q, activation=dataclasses.replace(q.activation, budget=budget))

    return Algorithm("llm_int8", frozenset({"max_abs"}), False, quantize, finish, f"{threshold}")
