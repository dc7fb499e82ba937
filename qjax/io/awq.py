"""AWQ's layout (AutoAWQ "gemm", vLLM): 4-bit codes packed along the outputs, interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from qjax.io import bitstream
from qjax.io.groups import (
    FLOATS,
    Grouped,
    check_part,
    from_qtensor,
    neighbors,
    plain,
    to_qtensor,
    told,
)
from qjax.io.strict_json import is_count
from qjax.qtensor import QTensor

MARKS = ("qweight",)
PARTS = ("qweight", "qzeros", "scales")
_COLUMNS = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # of a word's outputs, from its lowest nibble on
_NIBBLES = np.argsort(_COLUMNS)


class Settings(NamedTuple):
    """What ``quantization_config`` says of all matrices: inputs that share a scale, -1 for all."""

    group: int


def settings(config: Mapping[str, Any], where: str) -> Settings:
    """Reads them, in the spelling of transformers or of AutoAWQ."""
    bits: Any = config.get("bits", config.get("w_bit"))
    group: Any = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != 4 or not is_count(bits):
        raise ValueError(f"{where}: key 'bits': AWQ has 4, is {bits!r}")
    if not is_count(group) and group != -1:
        raise ValueError(f"{where}: key 'group_size': must be -1 or a count, is {group!r}")
    if version != "gemm" or config.get("backend") == "llm-awq":
        given = f"{version!r}, backend {config.get('backend')!r}"
        raise ValueError(f"{where}: key 'version': only AutoAWQ's 'gemm' is read, is {given}")
    return Settings(group)


def shape(parts: Mapping[str, np.ndarray], s: Settings, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    if parts["qweight"].ndim != 2:
        raise ValueError(f"{where}: 'qweight' must be a matrix, is {told(parts['qweight'])}")
    k, words = parts["qweight"].shape
    group = neighbors(k, s.group)
    groups = -(-k // group) if k else 0
    about = f"{where}: {8 * words} outputs of {k} inputs in groups of {group}"
    check_part(parts, "qweight", [np.int32], (k, words), about)
    check_part(parts, "qzeros", [np.int32], (groups, words), about)
    check_part(parts, "scales", FLOATS, (groups, 8 * words), about)
    return 8 * words, k


def read(parts: Mapping[str, np.ndarray], s: Settings, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes, scales and zero points.

    Args:
      parts: int32 ``qweight [k, n / 8]`` and ``qzeros [groups, n / 8]``, ``scales [groups, n]``.
      s: from `settings`.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    Raises:
      ValueError: the tensors do not fit each other.
    """
    n, k = shape(parts, s, where)
    group = neighbors(k, s.group)
    codes, zeros = (_reordered(bitstream.unpack(parts[p], 4, n), _NIBBLES) for p in PARTS[:2])
    held = Grouped(4, codes, parts["scales"], zeros.astype(np.int32), group)
    return to_qtensor(plain(held), dtype)


def write(q: QTensor) -> dict[str, np.ndarray]:
    """The inverse of `read`: `PARTS` of a matrix `[inputs, outputs]`.

    Raises:
      ValueError: `q` is nothing that the layout holds.
    """
    held = from_qtensor(q)
    if held.bits != 4 or held.codes.shape[1] % 8 or held.order is not None:
        raise ValueError(
            f"is {q!r}: AWQ's files hold 4 bits, a multiple of 8 outputs, and inputs in their order"
        )
    zeros = np.full(held.scale.shape, 8) if held.zeros is None else held.zeros
    if zeros.min() < 0 or zeros.max() > 15:
        raise ValueError(f"has zero points {zeros.min()} to {zeros.max()}; AWQ's are 0 to 15")
    words = [
        bitstream.pack(_reordered(v, _COLUMNS), 4) for v in (held.codes, zeros.astype(np.uint8))
    ]
    return {"qweight": words[0], "qzeros": words[1], "scales": held.scale}


def _reordered(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Each eight neighbors of a row in another order."""
    return codes.reshape(len(codes), -1, 8)[..., order].reshape(codes.shape)
