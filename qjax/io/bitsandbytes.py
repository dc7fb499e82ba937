"""bitsandbytes: NF4 and FP4 in blocks of the flattened matrix, int8 with a scale per row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qjax.formats import FORMATS, join_planes, split_planes
from qjax.io import scaled
from qjax.io.groups import check_part, told
from qjax.io.strict_json import is_count, read_object
from qjax.qtensor import QTensor

MARKS = ("weight.absmax", "SCB")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that its kernels know
_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = {"nf4": "nf4", "fp4": "fp4_bnb"}  # of files -> of `FORMATS`
PARTS = ("weight", "weight.absmax", "weight.quant_map", *(_STATE + kind for kind in _KINDS))
PARTS += ("weight.nested_absmax", "weight.nested_quant_map", "SCB", "weight_format")


class State(NamedTuple):
    """What a 4-bit matrix' own JSON says.

    Attributes:
      format: a row of `FORMATS`.
      block: neighbors in the flattened matrix that share a scale.
      size: (outputs, inputs).
      nested: scales that share a scale; None where scales are float32.
      offset: what is added to scales that have scales.
    """

    format: str
    block: int
    size: tuple[int, int]
    nested: int | None
    offset: float


def settings(config: Mapping[str, Any], where: str) -> None:
    """Nothing: each matrix says for itself."""


def shape(parts: Mapping[str, np.ndarray], scheme: None, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    if "SCB" not in parts:
        return _state(parts, where).size
    codes = parts.get("weight")
    if codes is None or codes.ndim != 2 or codes.dtype != np.int8:
        raise ValueError(f"{where}: 'weight' must be a matrix of int8, is {told(codes)}")
    check_part(parts, "SCB", [np.float32], codes.shape[:1], where)
    if parts.get("weight_format", np.zeros(())).any():
        raise ValueError(f"{where}: 'weight_format' must be 0, rows as they are")
    return codes.shape[0], codes.shape[1]


def read(parts: Mapping[str, np.ndarray], scheme: None, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes and scales.

    Scales that are quantized in turn (double quantization) run along the flattened matrix, which
    blocks along the inputs do not: they are held as the float32 that they stand for. int8 codes
    stand for multiples of SCB / 127, here a product that is rounded to float32 once.

    Args:
      parts: uint8 ``weight [n k / 2, 1]``, ``weight.absmax [n k / block]`` in float32, or in uint8
        with ``weight.nested_absmax`` and ``weight.nested_quant_map``, ``weight.quant_map [16]`` and
        the JSON bytes ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``); or int8 ``weight
        [n, k]`` and float32 ``SCB [n]``.
      scheme: None.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    Raises:
      ValueError: the tensors do not fit each other, or blocks run across rows.
    """
    if "SCB" in parts:
        _, k = shape(parts, scheme, where)
        scale = parts["SCB"][:, None] * np.float32(1 / 127)
        return scaled.to_qtensor(parts["weight"], scale, (1, k), dtype)
    state = _state(parts, where)
    n, k = state.size
    raw = np.ascontiguousarray(parts["weight"]).view(np.uint8).reshape(n, k // 2)
    codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(n, k)  # the first in the high nibble
    scale = parts["weight.absmax"]
    if state.nested is not None:
        outer = np.repeat(parts["weight.nested_absmax"], state.nested)[: scale.size]
        scale = parts["weight.nested_quant_map"][scale] * outer + np.float32(state.offset)
    return QTensor(
        split_planes(FORMATS[state.format], jnp.asarray(codes.T)),
        jnp.asarray(np.ascontiguousarray(scale.reshape(n, k // state.block).T)),
        None,
        None,
        None,
        state.format,
        (state.block, 1),
        np.dtype(dtype),
    )


def write(q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a matrix `[inputs, outputs]` in "nf4", "fp4_bnb" or "int8".

    An int8 scale becomes the SCB of which `read` makes it, or the nearest.

    Raises:
      ValueError: `q` is none, or its scales are quantized in turn.
    """
    kind = {v: k for k, v in _KINDS.items()}.get(q.format)
    matrix = q.ndim == 2 and q.param_shape is None and q.activation is None
    plain = not isinstance(q.scale, QTensor) and q.zero_point is None and q.offset is None
    k, n = q.shape if q.ndim == 2 else (0, 0)
    sizes = q.block[0] in BLOCKS and k % q.block[0] == 0 if kind else q.block[0] >= k
    if not (matrix and plain and sizes and q.block[1:] == (1,)) or not (kind or q.format == "int8"):
        raise ValueError(
            f"is {q!r}: bitsandbytes has matrices of nf4 and fp4_bnb in whole groups of "
            f"{', '.join(map(str, BLOCKS))} along their inputs, and of int8 with a scale per "
            "output; scales are of one level (nf4_g64)"
        )
    scale = np.ascontiguousarray(np.asarray(q.scale).T).astype(np.float32)
    codes = np.ascontiguousarray(np.asarray(join_planes(FORMATS[q.format], q.qvalue)).T)
    if kind is None:
        near = scale[:, 0] * np.float32(127)
        # maxima of float16 numbers, in files of bitsandbytes
        half = np.clip(near, -65504, 65504).astype(np.float16).astype(np.float32)
        others = (np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf)), half)
        for other in others:
            near = np.where(other * np.float32(1 / 127) == scale[:, 0], other, near)
        return {"weight": codes, "SCB": near, "weight_format": np.zeros((), np.uint8)}
    state = {"quant_type": kind, "blocksize": q.block[0], "dtype": q.dtype.name, "shape": [n, k]}
    codes = codes.astype(np.uint8)
    values = FORMATS[q.format].decode(jnp.arange(16, dtype=jnp.uint8), jnp.dtype("float32"))
    return {
        "weight": (codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1),
        "weight.absmax": scale.reshape(-1),
        "weight.quant_map": np.asarray(values),
        _STATE + kind: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def _state(parts: Mapping[str, np.ndarray], where: str) -> State:
    """Read, and held against the tensors."""
    kinds = [kind for kind in _KINDS if _STATE + kind in parts]
    if len(kinds) != 1:
        raise ValueError(f"{where}: needs one '{_STATE}nf4' or '..fp4', has {sorted(parts)}")
    state = parts[_STATE + kinds[0]]
    fields = read_object(state.tobytes(), f"{where}: quant_state")
    block: Any = fields.get("blocksize")
    size: Any = fields.get("shape")
    nested: Any = fields.get("nested_blocksize")
    sizes = isinstance(size, list) and len(size) == 2 and all(map(is_count, size))
    if not sizes or not is_count(block) or fields.get("quant_type") != kinds[0]:
        raise ValueError(f"{where}: quant_state {fields} is none of a matrix in {kinds[0]}")
    n, k = size
    if k % block or k % 2:
        raise ValueError(f"{where}: rows of {k} inputs are no whole blocks of {block}")
    count = n * k // block
    offset: Any = 0.0 if nested is None else fields.get("nested_offset")
    if nested is not None and not (is_count(nested) and isinstance(offset, float)):
        raise ValueError(f"{where}: quant_state {fields} has no blocks of scales")
    check_part(parts, "weight.quant_map", [np.float32], (16,), where)
    if nested is None:
        check_part(parts, "weight.absmax", [np.float32], (count,), where)
    else:
        check_part(parts, "weight.absmax", [np.uint8], (count,), where)
        check_part(parts, "weight.nested_absmax", [np.float32], (-(-count // nested),), where)
        check_part(parts, "weight.nested_quant_map", [np.float32], (256,), where)
    codes = parts.get("weight")
    if codes is None or codes.nbytes != n * k // 2:
        raise ValueError(f"{where}: 'weight' must be {n * k // 2} bytes, is {told(codes)}")
    fmt = _KINDS[kinds[0]]
    values = FORMATS[fmt].decode(jnp.arange(16, dtype=jnp.uint8), jnp.dtype("float32"))
    if not np.array_equal(parts["weight.quant_map"], values):
        raise ValueError(f"{where}: 'weight.quant_map' holds other values than {kinds[0]}'s")
    return State(fmt, block, (n, k), nested, offset)
