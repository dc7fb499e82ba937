"""Cache: keys and values of the positions that a decoder has seen, in floats or 8-bit codes."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax.formats import FORMATS
from qjax.models.architecture import Config
from qjax.rounding import absmax
from qjax.spec import Spec

# The dtypes that a cache may have beside the compute dtype, and the formats they hold.
QUANTIZED = {"int8": Spec("int8"), "float8_e4m3fn": Spec("fp8_e4m3")}


class Coded(NamedTuple):
    """Vectors along the last axis, ``x = codes * scale``.

    Attributes:
      codes: int8 or float8_e4m3fn [..., head_dim].
      scale: float32 [..., 1], ``max |x| / largest code``.
    """

    codes: jax.Array
    scale: jax.Array


Held: TypeAlias = jax.Array | Coded


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, and how many they are.

    Attributes:
      keys, values: a tuple of [batch, length, num_kv_heads, head_dim], one per layer; or, for a
        scanned model, one array with a leading layer axis. In a quantized cache each is a `Coded`.
      length: int32 [], the number of positions that are filled.
    """

    keys: Any
    values: Any
    length: jax.Array


def init_cache(config: Config, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
    """Returns an empty cache for `length` positions.

    Args:
      config: the Decoder's.
      batch: rows of the tokens.
      length: positions that it can hold.
      dtype: None for the compute dtype. ``int8`` and ``float8_e4m3fn`` hold each head of each token
        as codes with one float32 scale, rounded when they are written and decoded where they are
        used: ``head_dim + 4`` bytes in place of ``2 * head_dim`` in bfloat16.

    Raises:
      ValueError: if the dtype is none of these.

    Example:
      >>> config = Config(50, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
      >>> cache = init_cache(config, batch=1, length=16, dtype="int8")
      >>> cache.keys[0].codes.shape, cache.keys[0].scale.shape
      ((1, 16, 2, 8), (1, 16, 2, 1))
    """
    held = jnp.dtype(config.dtype if dtype is None else dtype)
    if held != config.dtype and held.name not in QUANTIZED:
        known = ", ".join([jnp.dtype(config.dtype).name, *QUANTIZED])
        raise ValueError(f"init_cache: dtype must be one of {known}, is {held}")
    leading = (config.num_layers,) if config.scan else ()
    shape = (*leading, batch, length, config.num_kv_heads, config.head_dim)

    def empty() -> Held:
        codes = jnp.zeros(shape, held)
        if held.name not in QUANTIZED:
            return codes
        return Coded(codes, jnp.zeros((*shape[:-1], 1), jnp.float32))

    def layers() -> Any:
        return empty() if config.scan else tuple(empty() for _ in range(config.num_layers))

    return Cache(layers(), layers(), jnp.zeros((), jnp.int32))


def write(held: Held, x: jax.Array, start: jax.Array) -> Held:
    """`held` of one layer with x [batch, s, heads, head_dim] at the positions from `start` on."""
    if isinstance(held, Coded):
        block = (1,) * (x.ndim - 1) + x.shape[-1:]
        spec = QUANTIZED[held.codes.dtype.name]
        rounded = absmax(x.astype(jnp.float32), spec, block, block)
        new: Any = Coded(rounded.codes, rounded.scale)  # pyright: ignore[reportArgumentType]
    else:
        new = x.astype(held.dtype)
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
    return jax.tree.map(put, held, new)


def read(held: Held, dtype: DTypeLike) -> jax.Array:
    """What `held` stands for: [batch, length, heads, head_dim] in `dtype`."""
    if not isinstance(held, Coded):
        return held
    fmt = FORMATS[QUANTIZED[held.codes.dtype.name].format]
    values = fmt.decode(held.codes, jnp.dtype(jnp.float32)) * held.scale
    return values.astype(dtype)
