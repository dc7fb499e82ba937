"""What a step of decoding runs as one kernel each, where `pallas_kernels` has one that fits.

Each function takes one new token per row, ``[batch, 1, ...]``. Where there is no such kernel or are
more tokens it returns None, and the model goes its own way (`gated` goes it by itself).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.add_norm import op as add_norm_op
from pallas_kernels.add_norm.problem import Problem as AddNorm
from pallas_kernels.decode_attention import op as attention_op
from pallas_kernels.dispatch import choose
from pallas_kernels.gated import op as gated_op
from pallas_kernels.gated.problem import Problem as Gated
from qjax.interpret import call_name
from qjax.models.architecture import ACTIVATIONS


class Deferred(NamedTuple):
    """``x + y`` and its RMSNorm, which are taken where they are multiplied."""

    x: jax.Array
    y: jax.Array
    scale: jax.Array
    epsilon: float


def deferred(
    x: jax.Array, y: jax.Array | None, scale: jax.Array, epsilon: float
) -> Deferred | None:
    """Where `add_norm` runs; y None is nothing to add."""
    if not _adds(x, x if y is None else y, epsilon):
        return None
    if y is None:  # halves of x, exact but for subnormals: zeros would be an array to write
        x = y = x * jnp.asarray(0.5, x.dtype)
    return Deferred(x, y, scale, epsilon)


def normed_products(
    stream: Deferred, kernels: Sequence[jax.Array], gate: str | None = None
) -> tuple[jax.Array, list[jax.Array]]:
    """``x + y``, and its norm by each kernel `[width, n]`; with `gate` the two products as one:
    ``activation(first) * second``.

    `quantized` knows it by its name (`run.CALLS`) and makes it one launch where the kernels are
    prepared weights that have one.
    """
    x, y, scale, epsilon = stream
    return _named_products(x, y, scale, list(kernels), epsilon=epsilon, gate=gate)


@functools.partial(jax.jit, static_argnames=("epsilon", "gate"))  # one jaxpr for all layers
def _named_products(x: Any, y: Any, scale: Any, kernels: Any, *, epsilon: float, gate: Any) -> Any:
    def define(x: Any, y: Any, scale: Any, kernels: Any) -> Any:
        both = add_norm(x, y, scale, epsilon)
        assert both is not None, "deferred() asked"
        last = (((x.ndim - 1,), (0,)), ((), ()))
        ys = [lax.dot_general(both[1], w.astype(x.dtype), last) for w in kernels]
        return both[0], ys if gate is None else [gated(ys[0], ys[1], gate)]

    define.__name__ = call_name("normed_products", epsilon, gate)
    return jax.jit(define)(x, y, scale, kernels)


def add_norm(
    x: jax.Array, y: jax.Array, scale: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array] | None:
    """``x + y`` and its RMSNorm, over the last axis."""
    if not _adds(x, y, epsilon):
        return None
    rows, width = x.size // x.shape[-1], x.shape[-1]
    total, normed = add_norm_op.add_norm(
        x.reshape(rows, width), y.reshape(rows, width), scale, epsilon
    )
    return total.reshape(x.shape), normed.reshape(x.shape)


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """``activation(gate) * up``, by a kernel or without."""
    *_, tokens, width = gate.shape
    rows = gate.size // width
    if tokens != 1 or not _runs("gated", Gated(rows, width, activation, gate.dtype.name)):
        return ACTIVATIONS[activation](gate) * up
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


def _adds(x: jax.Array, y: jax.Array, epsilon: float) -> bool:
    *_, tokens, width = x.shape
    problem = AddNorm(x.size // width, width, epsilon, x.dtype.name)
    return tokens == 1 and x.dtype == y.dtype and _runs("add_norm", problem)


def _runs(op: str, problem: object) -> bool:
    return choose(op, problem) != "reference"
