"""ggml types that are decoded rather than kept: IQ1, IQ2 and IQ3, whose codes index lattices.

Their grids of some thousand entries are the `gguf` package's, an optional dependency.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

DENSE_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_AT_ONCE = 1 << 22  # bytes that are decoded at a time, each to some 20 bytes of float32


def to_array(raw: np.ndarray, type_name: str, dtype: DTypeLike, transpose: bool) -> jax.Array:
    """The values of ggml blocks of one of `DENSE_TYPES`.

    Args:
      raw: uint8 `[..., rows, row_bytes]`, the bytes of the tensor's rows.
      type_name: one of `DENSE_TYPES`.
      dtype: of the array.
      transpose: False keeps the file's `[..., rows, columns]`, True gives `[..., columns, rows]`.

    Raises:
      ImportError: naming the extra that brings the package `gguf`.
    """
    try:
        import gguf
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"{type_name} tensors are decoded by the package gguf: pip install 'qjax[gguf]'"
        ) from missing
    kind: Any = gguf.GGMLQuantizationType[type_name]
    rows = raw.reshape(math.prod(raw.shape[:-1]), raw.shape[-1])
    columns = rows.shape[1] // gguf.GGML_QUANT_SIZES[kind][1] * gguf.GGML_QUANT_SIZES[kind][0]
    out = np.empty((len(rows), columns), dtype)
    step = max(1, _AT_ONCE // max(rows.shape[1], 1))
    for first in range(0, len(rows), step):
        out[first : first + step] = gguf.dequantize(rows[first : first + step], kind)
    out = out.reshape(*raw.shape[:-1], columns)
    return jnp.asarray(np.swapaxes(out, -1, -2) if transpose else out)
