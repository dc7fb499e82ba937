"""Cache: keys and values of the positions that a decoder has seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.models.architecture import Config


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, and how many they are.

    Attributes:
      keys, values: a tuple of [batch, length, num_kv_heads, head_dim], one per layer; or, for a
        scanned model, one array with a leading layer axis.
      length: int32 [], the number of positions that are filled.
    """

    keys: Any
    values: Any
    length: jax.Array


def init_cache(config: Config, batch: int, length: int) -> Cache:
    """Returns an empty cache for `length` positions, in the compute dtype."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    if config.scan:
        stacked = (config.num_layers, *shape)
        keys, values = jnp.zeros(stacked, config.dtype), jnp.zeros(stacked, config.dtype)
    else:
        keys = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
        values = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    return Cache(keys, values, jnp.zeros((), jnp.int32))
