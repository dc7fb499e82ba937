"""Weights multiplied by an input scale: what AWQ and SmoothQuant have in common."""

import dataclasses

import jax
import jax.numpy as jnp

from qjax.activation import Activation
from qjax.algorithms.base import Algorithm, Notes, Stats
from qjax.qtensor import QTensor
from qjax.spec import Spec


def scale_stats(stats: Stats, scale: jax.Array) -> Stats:
    """The Stats of x / scale."""

    def divided(leaf: jax.Array | None, power: int = 1) -> jax.Array | None:
        return (
            None if leaf is None else leaf / scale.reshape((1,) * (leaf.ndim - 1) + (-1,)) ** power
        )

    hessian = divided(stats.hessian)
    return dataclasses.replace(
        stats,
        hessian=None if hessian is None else hessian / scale[:, None],
        mean_abs=divided(stats.mean_abs),
        max_abs=divided(stats.max_abs),
        second_moment=divided(stats.second_moment, 2),
        samples=divided(stats.samples),
    )


def quantize_scaled(
    solver: Algorithm,
    w: jax.Array,
    spec: Spec,
    stats: Stats,
    scale: jax.Array,
    within: jax.Array | None = None,
) -> tuple[QTensor, Notes]:
    """`scale * w` quantized by `solver`, as a QTensor of w whose input is divided by `scale`.

    `within` is in the coordinates of scale * w.
    """
    wide = w.astype(jnp.float32) * scale[:, None]
    q, notes = solver.quantize(wide, spec, scale_stats(stats, scale), within)
    act = dataclasses.replace(q.activation or Activation(), axis=(-2,), input_scale=scale)
    return dataclasses.replace(q, activation=act, dtype=jnp.dtype(w.dtype)), notes
