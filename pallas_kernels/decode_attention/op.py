"""decode_attention: the op as it is called, with its checks."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.definition import instead
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device


def problem_of(q: jax.Array, keys: jax.Array, scale: float) -> Problem:
    """The problem of queries `[batch, heads, head_dim]` over keys."""
    batch, length, kv_heads, head_dim = keys.shape
    dtype = q.dtype.name if q.dtype == keys.dtype else f"{q.dtype.name} over {keys.dtype.name}"
    return Problem(batch, kv_heads, q.shape[1] // kv_heads, head_dim, length, scale, dtype)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    first: jax.Array | int,
    position: jax.Array | int,
    keys: jax.Array,
    values: jax.Array,
    scale: float,
    *,
    implementation: str | None = None,
    device: Device | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token per row, whose key and value join the cache.

    The pairs (i, i + head_dim / 2) of q and k are turned by the angle of the position, in float32.
    `y = softmax(scale q K^T) V` over the positions from `first` to `position`; query heads share
    key heads in groups of their ratio.

    Args:
      q: `[batch, heads, head_dim]`, not turned yet.
      k, v: `[batch, kv_heads, head_dim]`.
      cos, sin: float32 `[head_dim / 2]`.
      first, position: int32 `[]`: the first position that is seen, and that of the new token.
      keys, values: `[batch, length, kv_heads, head_dim]`, the positions before.
      scale: on the scores.
      implementation: a name in `IMPLEMENTATIONS["decode_attention"]`, taken or refused; None for
        the best that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      y as q, keys and values with the new token's.

    Raises:
      ValueError: if shapes do not fit, or the implementation cannot run this.
    """
    batch, _, kv_heads, head_dim = keys.shape
    one = (batch, kv_heads, head_dim)
    fits = q.ndim == 3 and q.shape[::2] == (batch, head_dim) and q.shape[1] % kv_heads == 0
    if not fits or {k.shape, v.shape} != {one} or values.shape != keys.shape:
        raise ValueError(
            f"decode_attention: a cache {list(keys.shape)} goes with q [{batch}, multiple of "
            f"{kv_heads}, {head_dim}], k and v {list(one)}, is given {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)} and values {list(values.shape)}"
        )
    problem = problem_of(q, keys, scale)
    seen = jnp.stack([jnp.asarray(at, jnp.int32) for at in (first, position)])
    operands = (q, k, v, cos, sin, seen, keys, values)
    name = choose("decode_attention", problem, device, implementation)
    if name == "reference":
        return reference.run(*operands, problem=problem)
    return instead(IMPLEMENTATIONS["decode_attention"][name].run, reference.run, problem, operands)
