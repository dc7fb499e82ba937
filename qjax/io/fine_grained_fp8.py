"""Fine-grained FP8 of transformers (DeepSeek-V3's and Qwen3's own checkpoints): E4M3 in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.io import scaled
from qjax.io.groups import told
from qjax.io.strict_json import is_count
from qjax.qtensor import QTensor

MARKS = (SCALE,) = ("weight_scale_inv",)
PARTS = ("weight", "weight_scale_inv")
PARTS += ("activation_scale", "input_scale")  # of the other operand, not taken over


class Settings(NamedTuple):
    """What ``quantization_config`` says of all matrices: outputs and inputs of a tile."""

    block: tuple[int, int]


def settings(config: Mapping[str, Any], where: str) -> Settings:
    """Reads them; `activation_scheme` is not taken over."""
    block: Any = config.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_count, block)):
        raise ValueError(f"{where}: key 'weight_block_size': must be two counts, is {block!r}")
    return Settings((block[0], block[1]))


def shape(parts: Mapping[str, np.ndarray], s: Settings, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    codes = parts.get("weight")
    if codes is None or codes.ndim != 2 or codes.dtype != ml_dtypes.float8_e4m3fn:
        raise ValueError(f"{where}: 'weight' must be a matrix of float8_e4m3fn, is {told(codes)}")
    scaled.check_scale(codes, parts[SCALE], s.block, SCALE, where)
    return codes.shape[0], codes.shape[1]


def read(parts: Mapping[str, np.ndarray], s: Settings, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes; its scales multiply, despite the name.

    Args:
      parts: float8_e4m3fn ``weight [n, k]`` and float ``weight_scale_inv [n / rows, k / columns]``.
      s: from `settings`.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    Raises:
      ValueError: the tensors do not fit each other.
    """
    shape(parts, s, where)
    return scaled.to_qtensor(parts["weight"], parts[SCALE], s.block, dtype)
