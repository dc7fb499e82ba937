"""Hopper through Pallas Mosaic GPU: what it supports. The kernel is in `hopper_kernel`."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.frame import Device

CLUSTERED = 116  # multiprocessors of 132 that clusters of four fill, or a little more than of eight
GROUPS = 8  # rows of a product that are scores
HEAD_DIMS = (64, 128)


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, heads of 64 or 128, up to eight per key head, on one H100 or H200 with jax 0.11."""
    p = problem
    reason = hopper.missing_alone(device)
    if reason is not None:
        return reason
    if p.dtype != "bfloat16":
        return f"the arrays are {p.dtype}, it takes bfloat16"
    if p.head_dim not in HEAD_DIMS or p.groups > GROUPS:
        return f"{p.groups} heads of {p.head_dim} share a key, it takes up to {GROUPS} of 64 or 128"
    large = p.batch * p.length * p.kv_heads * p.head_dim >= 2**31
    return "the cache has 2 ** 31 elements or more" if large else None


def cluster_of(problem: Problem) -> int:
    """How many blocks split the positions of a row and key head: of 8 and 4 what the chip takes at
    once, since a block has the registers of a multiprocessor and must ask for its first keys, else
    2.
    """
    pairs = problem.batch * problem.kv_heads
    return next((c for c in (8, 4) if pairs * c <= CLUSTERED), 2)


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
    """See `reference.run`; keys and values are written in place."""
    from pallas_kernels.decode_attention import hopper_kernel  # needs a jax with Mosaic GPU

    flat = [x.reshape(problem.batch, -1) for x in (q, k, v)]
    bits = [lax.bitcast_convert_type(x, jnp.int32) for x in (cos, sin)]
    where = jnp.concatenate([jnp.pad(seen, (0, 2)), *bits])  # one kernel of XLA's, not three
    y, keys, values = hopper_kernel.kernel(problem)(*flat, where, keys, values)
    return y.reshape(q.shape), keys, values
