"""ModelOpt (NVIDIA's TensorRT Model Optimizer): FP8, NVFP4, MX, int8 and AWQ's int4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike

from qjax.activation import Activation
from qjax.io import block_floats, scaled
from qjax.io.groups import FLOATS, Grouped, check_part, to_qtensor, told
from qjax.qtensor import QTensor

MARKS = (SCALE,) = ("weight_scale",)
PARTS = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
PARTS += ("input_scale",)  # of the other operand, not taken over

# how weights are held follows from the dtypes of their tensors; of others it is not known
ALGORITHMS = frozenset(
    "fp8 fp8_per_channel_per_token fp8_pb_wo nvfp4 nvfp4_awq w4a16_nvfp4 w4a8_nvfp4_fp8 mxfp4 "
    "w4a8_mxfp4_fp8 mxfp8 w8a16 w8a8_sq_per_channel w4a16_awq mixed_precision".split()
)
TILE = 128  # outputs and inputs of a block of "fp8_pb_wo"


def settings(config: Mapping[str, Any], where: str) -> None:
    """Raises a ValueError where weights are held in a way that is not known."""
    layers = config.get("quantized_layers", {})
    if not isinstance(layers, Mapping) or not all(isinstance(v, Mapping) for v in layers.values()):
        raise ValueError(f"{where}: key 'quantized_layers': must be an object of objects")
    for held in (config, *layers.values()):
        name = held.get("quant_algo")
        if not isinstance(name, str) or name.lower() not in ALGORITHMS:
            known = ", ".join(sorted(ALGORITHMS))
            raise ValueError(f"{where}: key 'quant_algo': can be read: {known}; is {name!r}")


def shape(parts: Mapping[str, np.ndarray], s: None, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    codes, scale = parts.get("weight"), parts[SCALE]
    if codes is None or codes.ndim != 2:
        raise ValueError(f"{where}: 'weight' must be a matrix, is {told(codes)}")
    n, k = codes.shape
    if codes.dtype == np.uint8 and scale.dtype in FLOATS:
        n *= 2
        if scale.ndim != 2 or not scale.shape[1] or k % scale.shape[1]:
            raise ValueError(f"{where}: {SCALE!r} of {k} inputs is {told(scale)}")
        check_part(parts, SCALE, FLOATS, (n, scale.shape[1]), where)
    elif codes.dtype == np.uint8:
        n, k = block_floats.check(codes, scale, _fp4(scale), where)
        if _fp4(scale) == "nvfp4":
            check_part(parts, "weight_scale_2", [np.float32], (), where)
            if not 0 < parts["weight_scale_2"] < np.inf:
                raise ValueError(f"{where}: 'weight_scale_2' is {parts['weight_scale_2']}")
    elif codes.dtype == ml_dtypes.float8_e4m3fn and scale.dtype == np.uint8:
        if k % 32:
            raise ValueError(f"{where}: {k} inputs are no whole groups of 32")
        check_part(parts, SCALE, [np.uint8], (n, k // 32), where)
    elif codes.dtype in (ml_dtypes.float8_e4m3fn, np.int8):
        scaled.check_scale(codes, *_of_blocks(codes, scale), SCALE, where)
    else:
        raise ValueError(
            f"{where}: 'weight' is {told(codes)} and {SCALE!r} {told(scale)}: they belong to "
            "nothing that can be read"
        )
    if "pre_quant_scale" in parts:
        check_part(parts, "pre_quant_scale", FLOATS, (k,), where)
        if not (parts["pre_quant_scale"] > 0).all():
            raise ValueError(f"{where}: 'pre_quant_scale' must be positive")
    return n, k


def read(parts: Mapping[str, np.ndarray], s: None, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes and scales.

    Args:
      parts: of `PARTS`, ``weight`` and ``weight_scale``: uint8 `[n, k / 2]` under float8_e4m3fn
        `[n, k / 16]` and a float32 ``weight_scale_2`` that multiplies it (NVFP4), or under
        exponents' bytes `[n, k / 32]` (MXFP4); float8_e4m3fn `[n, k]` under such bytes (MXFP8);
        float8_e4m3fn or int8 `[n, k]` under one float, one per output, or one per 128 x 128; uint8
        `[n / 2, k]`, earlier outputs in the low halves, under floats `[n, groups]` (int4).
        ``pre_quant_scale [k]`` multiplies the other operand.
      s: None, as of `settings`.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    The reciprocal of ``pre_quant_scale`` is held: products are within one unit in the last place of
    float32 of those by multiplication.

    Raises:
      ValueError: the tensors do not fit each other.
    """
    _, k = shape(parts, s, where)
    codes, scale = parts["weight"], parts[SCALE]
    if codes.dtype == np.uint8 and scale.dtype in FLOATS:
        both = np.stack([codes & 15, codes >> 4], 1).reshape(-1, k) ^ np.uint8(8)
        group = k // scale.shape[1]
        held = Grouped(4, np.ascontiguousarray(both.T), np.ascontiguousarray(scale.T), None, group)
        q = to_qtensor(held, dtype)
    elif codes.dtype == np.uint8:
        whole = parts.get("weight_scale_2")
        q = block_floats.to_qtensor(codes, scale, whole, _fp4(scale), dtype)
    elif scale.dtype == np.uint8:
        powers = scale.view(ml_dtypes.float8_e8m0fnu)
        q = scaled.to_qtensor(codes, powers, (1, 32), dtype)
        q = dataclasses.replace(q, format="mxfp8")
    else:
        q = scaled.to_qtensor(codes, *_of_blocks(codes, scale), dtype)
    if "pre_quant_scale" not in parts:
        return q
    by = 1 / jnp.asarray(parts["pre_quant_scale"], jnp.float32)
    return dataclasses.replace(q, activation=Activation(axis=(-2,), input_scale=by))


def _fp4(scale: np.ndarray) -> str:
    return "nvfp4" if scale.dtype == ml_dtypes.float8_e4m3fn else "mxfp4"


def _of_blocks(codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Scales as a matrix, and outputs and inputs that share one."""
    if scale.ndim == 0:
        return scale.reshape(1, 1), codes.shape
    if scale.ndim == 1:
        return scale[:, None], (1, codes.shape[1])
    tiles = scale.ndim == 4 and scale.shape[1::2] == (1, 1)
    return scale.reshape(scale.shape[::2]) if tiles else scale, (TILE, TILE)
