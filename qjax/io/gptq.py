"""GPTQ's layout (AutoGPTQ, GPTQModel, vLLM): codes packed along the inputs, a group per input."""

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
PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)


class Settings(NamedTuple):
    """What ``quantization_config`` says of all matrices.

    Attributes:
      bits: of a code.
      group: inputs that share a scale; -1 for all.
      less_one: whether files hold zero points less one (``checkpoint_format`` "gptq", not
        "gptq_v2"); a zero point of 0 has no place there.
    """

    bits: int
    group: int
    less_one: bool = True


def settings(config: Mapping[str, Any], where: str) -> Settings:
    """Reads them; a missing format means "gptq"."""
    bits: Any = config.get("bits")
    group: Any = config.get("group_size", 128)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if not is_count(bits) or bits not in BITS:
        raise ValueError(f"{where}: key 'bits': must be one of {BITS}, is {bits!r}")
    if not is_count(group) and group != -1:
        raise ValueError(f"{where}: key 'group_size': must be -1 or a count, is {group!r}")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{where}: key 'checkpoint_format': must be 'gptq' or 'gptq_v2', is {version!r}"
        )
    if config.get("dynamic"):
        raise ValueError(f"{where}: key 'dynamic': settings of single modules are not read")
    return Settings(bits, group, version == "gptq")


def shape(parts: Mapping[str, np.ndarray], s: Settings, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    words, index = parts["qweight"], parts.get("g_idx")
    if words.ndim != 2:
        raise ValueError(f"{where}: 'qweight' must be a matrix, is {told(words)}")
    k, n = words.shape[0] * 32 // s.bits, words.shape[1]
    if index is not None and index.ndim == 1:
        k = index.shape[0]
    group = neighbors(k, s.group)
    groups = -(-k // group) if k else 0
    about = f"{where}: {n} outputs of {k} inputs, {s.bits} bits in groups of {group}"
    check_part(parts, "qweight", [np.int32], (bitstream.words_of(k, s.bits), n), about)
    check_part(parts, "qzeros", [np.int32], (groups, bitstream.words_of(n, s.bits)), about)
    check_part(parts, "scales", FLOATS, (groups, n), about)
    if index is not None:
        check_part(parts, "g_idx", [np.int32, np.int64], (k,), about)
    return n, k


def read(parts: Mapping[str, np.ndarray], s: Settings, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes, scales and zero points.

    Where groups are not of neighbors (act-order) its rows are sorted by group, and its
    `Activation.permutation` says how.

    Args:
      parts: of `PARTS`: int32 ``qweight [k bits / 32, n]``, ``qzeros [groups, n bits / 32]``,
        ``scales [groups, n]``, and int32 ``g_idx [k]`` where there is one.
      s: from `settings`.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    Raises:
      ValueError: the tensors do not fit each other, or groups have unlike sizes.
    """
    n, k = shape(parts, s, where)
    group = neighbors(k, s.group)
    codes = bitstream.unpack(parts["qweight"].T, s.bits, k).T
    zeros = bitstream.unpack(parts["qzeros"], s.bits, n).astype(np.int32) + s.less_one
    order = None
    index = parts.get("g_idx")
    if index is not None and not np.array_equal(index, np.arange(k) // group):
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], np.arange(k) // group):
            raise ValueError(f"{where}: 'g_idx' does not put {group} inputs into each group")
        codes = codes[order]
    held = Grouped(s.bits, codes, parts["scales"], zeros, group, order)
    return to_qtensor(plain(held), dtype)


def write(q: QTensor, less_one: bool = False) -> dict[str, np.ndarray]:
    """The inverse of `read`: `PARTS` of a matrix `[inputs, outputs]`.

    Args:
      q: int2, int3, int4 or int8, or unsigned with zero points, in groups along its inputs.
      less_one: whether zero points are written less one, as the format "gptq" has them.

    Raises:
      ValueError: `q` is nothing that the layout holds, or has a zero point that it does not.
    """
    held = from_qtensor(q)
    (k, n), bits = held.codes.shape, held.bits
    if bits not in BITS or k * bits % 32 or n * bits % 32:
        raise ValueError(
            f"is {q!r}: GPTQ's files hold {BITS} bits, inputs and outputs that fill words of 32"
        )
    zeros = held.zeros
    if zeros is None:
        zeros = np.full(held.scale.shape, 1 << (bits - 1))
    low, high = int(less_one), (1 << bits) - 1 + less_one
    if zeros.min() < low or zeros.max() > high:
        raise ValueError(
            f"has zero points {zeros.min()} to {zeros.max()}; the format "
            f"{'gptq' if less_one else 'gptq_v2'} holds {low} to {high}"
        )
    codes, index = held.codes, np.arange(k, dtype=np.int32) // held.group
    if held.order is not None:
        codes, sorted_index = np.empty_like(codes), index
        codes[held.order] = held.codes
        index = np.empty_like(sorted_index)
        index[held.order] = sorted_index
    return {
        "qweight": np.ascontiguousarray(bitstream.pack(codes.T, bits).T),
        "qzeros": bitstream.pack((zeros - less_one).astype(np.uint8), bits),
        "scales": held.scale,
        "g_idx": index,
    }
