"""Bytes held on the device, from bit widths: `.nbytes` counts a whole byte for each int4."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax.qtensor import QTensor


def nbytes(tree: Any) -> int:
    """Bytes that the arrays of `tree` hold on a device; sub-byte dtypes count their bits.

    Example:
      >>> nbytes(jnp.zeros((3, 4), jnp.int4))
      6
    """
    return sum(-(-math.prod(v.shape) * _bits(v.dtype) // 8) for v in jax.tree.leaves(tree))


def bits_per_weight(q: QTensor) -> float:
    """Bits held per element of the weight: codes, scales, zero points and offsets together."""
    return 8 * nbytes(q) / max(q.size, 1)


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return (
        jnp.finfo(dtype).bits
        if jnp.issubdtype(dtype, jnp.floating)
        else 8 * jnp.dtype(dtype).itemsize
    )
