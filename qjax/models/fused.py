"""What a step of decoding runs as one kernel each, where `pallas_kernels` has one that fits.

Each function takes one new token per row, ``[batch, 1, ...]``, and returns None where there is no
such kernel or are more tokens: the model goes its own way.
"""

from __future__ import annotations

import jax

from pallas_kernels.add_norm import op as add_norm_op
from pallas_kernels.add_norm.problem import Problem as AddNorm
from pallas_kernels.decode_attention import op as attention_op
from pallas_kernels.dispatch import choose
from pallas_kernels.gated import op as gated_op
from pallas_kernels.gated.problem import Problem as Gated


def add_norm(
    x: jax.Array, y: jax.Array, scale: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array] | None:
    """``x + y`` and its RMSNorm, over the last axis."""
    *_, tokens, width = x.shape
    rows = x.size // width
    if tokens != 1 or x.dtype != y.dtype:
        return None
    if not _runs("add_norm", AddNorm(rows, width, epsilon, x.dtype.name)):
        return None
    total, normed = add_norm_op.add_norm(
        x.reshape(rows, width), y.reshape(rows, width), scale, epsilon
    )
    return total.reshape(x.shape), normed.reshape(x.shape)


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array | None:
    """``activation(gate) * up``."""
    *_, tokens, width = gate.shape
    rows = gate.size // width
    if tokens != 1 or not _runs("gated", Gated(rows, width, activation, gate.dtype.name)):
        return None
    y = gated_op.gated(gate.reshape(rows, width), up.reshape(rows, width), activation)
    return y.reshape(gate.shape)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    span: tuple[jax.Array, jax.Array],
    held: tuple[jax.Array, jax.Array],
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """Attention of one new token ``[batch, 1, heads, head_dim]``, and the keys and values with it.

    `turn` is the rotation of its position, `span` the first position that it sees and its own,
    `held` the keys and values before.
    """
    if q.shape[1] != 1 or not all(isinstance(x, jax.Array) for x in held):
        return None
    one, keys = q[:, 0], held[0]
    if not _runs("decode_attention", attention_op.problem_of(one, keys, scale)):
        return None
    cos, sin = (x.reshape(-1) for x in turn)
    y, keys, values = attention_op.decode_attention(
        one, k[:, 0], v[:, 0], cos, sin, *span, *held, scale
    )
    return y[:, None], keys, values


def _runs(op: str, problem: object) -> bool:
    return choose(op, problem) != "reference"
