"""Matrices of 4-bit floats under scales of NVFP4 and MX, as Hugging Face's files hold them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.io import bitstream
from qjax.io.groups import check_part, told
from qjax.qtensor import QTensor

E2M1, E4M3, E8M0 = (
    np.dtype(t)
    for t in (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu)
)
TINY = np.finfo(np.float32).tiny  # it and its reciprocal are normal numbers
GROUPS = {"nvfp4": 16, "mxfp4": 32}  # inputs that share a scale


def check(words: np.ndarray | None, scale: np.ndarray, format: str, where: str) -> tuple[int, int]:
    """(outputs, inputs) of packed codes; ValueError where their scales do not fit them."""
    if words is None or words.ndim != 2 or words.dtype != np.uint8:
        raise ValueError(f"{where}: codes of {format} must be a matrix of uint8, are {told(words)}")
    n, k = words.shape[0], 2 * words.shape[1]
    about = f"{where}: {n} outputs of {k} inputs in {format}"
    if k % GROUPS[format]:
        raise ValueError(f"{about}: are no whole groups of {GROUPS[format]}")
    dtypes = [E4M3] if format == "nvfp4" else [np.uint8, E8M0]
    check_part({"weight_scale": scale}, "weight_scale", dtypes, (n, k // GROUPS[format]), about)
    return n, k


def shape(parts: Mapping[str, np.ndarray], format: str, where: str) -> tuple[int, int]:
    """(outputs, inputs); ValueError where the tensors do not fit each other."""
    n, k = check(parts.get("weight_packed"), parts["weight_scale"], format, where)
    if format == "nvfp4":
        about = f"{where}: {n} outputs of {k} inputs in {format}"
        check_part(parts, "weight_global_scale", [np.float32], (1,), about)
        whole = parts["weight_global_scale"][0]
        if not TINY <= whole <= 1 / TINY:
            raise ValueError(f"{about}: 'weight_global_scale' is {whole}, must be positive")
    return n, k


def read(parts: Mapping[str, np.ndarray], format: str, dtype: DTypeLike) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes and scales.

    Args:
      parts: uint8 ``weight_packed [n, k / 2]``, earlier inputs in the low halves; for "nvfp4"
        float8_e4m3fn ``weight_scale [n, k / 16]`` and float32 ``weight_global_scale [1]``, which
        divides it; for "mxfp4" ``weight_scale [n, k / 32]``, the exponents' bytes.
      format: "nvfp4" or "mxfp4".
      dtype: of the dequantized matrix.

    The reciprocal of the global scale is held: values are within one unit in the last place of
    float32 of those by division.
    """
    whole = parts.get("weight_global_scale")
    whole = None if whole is None else 1 / whole.astype(np.float32)
    return to_qtensor(parts["weight_packed"], parts["weight_scale"], whole, format, dtype)


def to_qtensor(
    words: np.ndarray, scale: np.ndarray, whole: np.ndarray | None, format: str, dtype: DTypeLike
) -> QTensor:
    """The same, of packed codes and scales; `whole`, of one number, multiplies those of "nvfp4"."""
    packed = np.ascontiguousarray(words).view("<u4")
    codes = bitstream.unpack(packed, 4, 2 * words.shape[1])
    codes = np.ascontiguousarray(codes.T).view(E2M1)
    scale = np.ascontiguousarray(scale.T)
    if format == "mxfp4":
        held: jax.Array | QTensor = jnp.asarray(scale.view(E8M0))
    else:
        assert whole is not None
        by = jnp.asarray(whole, jnp.float32).reshape(1, 1)
        held = _qtensor(scale, by, "fp8_e4m3", scale.shape, np.float32)
    return _qtensor(codes, held, format, (GROUPS[format], 1), dtype)


def write(q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a matrix `[inputs, outputs]` in "nvfp4" or "mxfp4".

    Raises:
      ValueError: `q` is none.
    """
    group = GROUPS[q.format]
    matrix = q.ndim == 2 and q.param_shape is None and q.activation is None
    if not matrix or tuple(q.block) != (group, 1) or q.storage_shape[0] % group:
        raise ValueError(f"is {q!r}: a matrix of whole groups of {group} inputs is needed")
    codes = np.asarray(q.qvalue).view(np.uint8) & 15
    parts = {"weight_packed": bitstream.pack(codes.T, 4).view(np.uint8)}
    if q.format == "mxfp4":
        return parts | {"weight_scale": np.ascontiguousarray(np.asarray(q.scale).T).view(np.uint8)}
    scale = q.scale
    if not isinstance(scale, QTensor) or scale.format != "fp8_e4m3" or scale.scale.size != 1:
        raise ValueError(f"is {q!r}: has no FP8 scales under one of the whole matrix")
    whole = np.float32(1) / np.asarray(scale.scale, np.float32).reshape(1)
    held = np.ascontiguousarray(np.asarray(scale.qvalue).T)
    return parts | {"weight_scale": held, "weight_global_scale": whole}


def _qtensor(
    codes: np.ndarray,
    scale: jax.Array | QTensor,
    format: str,
    block: tuple[int, ...],
    dtype: DTypeLike,
) -> QTensor:
    return QTensor(
        jnp.asarray(codes), scale, None, None, None, format, tuple(block), np.dtype(dtype)
    )
