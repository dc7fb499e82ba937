"""Matrices of FP8 or int8 codes under scales in blocks, as Hugging Face's files hold them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike

from qjax.io.groups import FLOATS, check_part
from qjax.qtensor import QTensor

_FORMATS = {np.dtype(ml_dtypes.float8_e4m3fn): "fp8_e4m3", np.dtype(np.int8): "int8"}


def to_qtensor(
    codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], dtype: DTypeLike
) -> QTensor:
    """The QTensor `[inputs, outputs]` of codes `[outputs, inputs]` times a scale per block.

    Args:
      codes: float8_e4m3fn or int8 `[n, k]`.
      scale: floats `[ceil(n / rows), ceil(k / columns)]`.
      block: rows and columns that share one.
      dtype: of the dequantized matrix.
    """
    rows, columns = block
    return QTensor(
        jnp.asarray(np.ascontiguousarray(codes.T)),
        jnp.asarray(np.ascontiguousarray(scale.T)),
        None,
        None,
        None,
        _FORMATS[codes.dtype],
        (columns, rows),
        np.dtype(dtype),
    )


def check_scale(
    codes: np.ndarray, scale: np.ndarray, block: tuple[int, int], name: str, where: str
) -> None:
    """Raises a ValueError unless there is one floating-point scale for each block of codes."""
    n, k = codes.shape
    wanted = (-(-n // block[0]), -(-k // block[1]))
    about = f"{where}: {n} outputs of {k} inputs in blocks of {block}"
    check_part({name: scale}, name, (*FLOATS, ml_dtypes.float8_e8m0fnu), wanted, about)
