"""The definition, in jnp."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.frame import Device


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    seen: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `op.decode_attention`; `seen` int32 [2] holds the first position and the new one."""
    p = problem

    def turned(x: jax.Array) -> jax.Array:
        near, far = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[None, None], sin[None, None]
        return jnp.concatenate((near * c - far * s, far * c + near * s), axis=-1).astype(x.dtype)

    put = lambda held, x: lax.dynamic_update_slice_in_dim(held, x[:, None], seen[1], axis=1)
    keys, values = put(keys, turned(k)), put(values, v)
    q = turned(q).reshape(p.batch, p.kv_heads, p.groups, p.head_dim)
    scores = jnp.einsum("bkgd,btkd->bkgt", q, keys, preferred_element_type=jnp.float32) * p.scale
    positions = jnp.arange(p.length, dtype=jnp.int32)
    live = (positions >= seen[0]) & (positions <= seen[1])
    weights = jax.nn.softmax(jnp.where(live[None, None, None], scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bkgt,btkd->bkgd", weights.astype(q.dtype), values)
    return y.reshape(p.batch, p.kv_heads * p.groups, p.head_dim), keys, values
