"""compressed-tensors (llm-compressor, vLLM): integers and FP4 packed by rows, int8 and FP8 as they
are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.io import bitstream, block_floats, scaled
from qjax.io.groups import FLOATS, Grouped, check_part, from_qtensor, plain, to_qtensor
from qjax.io.strict_json import is_count
from qjax.qtensor import QTensor

MARKS = (SCALE,) = ("weight_scale",)
PARTS = ("weight_scale", "weight_packed", "weight_zero_point", "weight_shape", "weight")
PARTS += ("weight_global_scale",)
# of the other operand, and not taken over
PARTS += ("input_scale", "input_zero_point", "input_global_scale")

_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_FP4 = {"tensor_group": "nvfp4", "group": "mxfp4"}  # strategy of 4-bit floats -> format


class Scheme(NamedTuple):
    """How the weights of a group of modules are held.

    Attributes:
      bits, kind: of a code; "int" or "float".
      strategy: which weights share a scale: "tensor", "channel", "group", "block" or, of NVFP4,
        "tensor_group".
      symmetric: whether there are no zero points.
      group: inputs of a group.
      block: outputs and inputs of a block.
    """

    bits: int
    kind: str
    strategy: str
    symmetric: bool
    group: int
    block: tuple[int, int]


class Settings(NamedTuple):
    """Targets (names, ``re:`` patterns, names of classes) and what holds for them."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]


def settings(config: Mapping[str, Any], where: str) -> Settings:
    """Reads them; what is said of activations and of the KV cache is not taken over."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{where}: key 'config_groups': must be an object, is {groups!r}")
    found = []
    for name, group in groups.items():
        at = f"{where}: key 'config_groups/{name}'"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise ValueError(f"{at}: has no object 'weights'")
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"{at}: 'targets' must be a list of names, is {targets!r}")
        for target in targets:
            _check_pattern(target, at)
        found.append((tuple(targets), _scheme(group["weights"], at)))
    return Settings(tuple(found))


def _check_pattern(target: str, where: str) -> None:
    """Refuses what is no pattern, or one that could take forever on a name."""
    if not target.startswith("re:"):
        return
    text = target[3:]
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as why:
        raise ValueError(f"{where}: target {target[:80]!r} is no pattern: {why}") from None
    if len(text) > 1000 or re.search(r"\)[*+?{]", text) or len(re.findall(r"[*+{]", text)) > 5:
        raise ValueError(
            f"{where}: target {target[:80]!r} repeats a group, or too often, to be matched safely"
        )


def _scheme(weights: Mapping[str, Any], where: str) -> Scheme:
    bits: Any = weights.get("num_bits")
    kind, strategy = weights.get("type"), weights.get("strategy")
    symmetric = weights.get("symmetric", True)
    known = (kind == "int" and bits in range(2, 9)) or (kind == "float" and bits in (4, 8))
    if not known or not is_count(bits):
        raise ValueError(
            f"{where}: weights of {bits!r} bits of type {kind!r}; read are int of 2 to 8 and float "
            "of 4 and 8"
        )
    if strategy not in _STRATEGIES:
        raise ValueError(f"{where}: 'strategy' must be one of {_STRATEGIES}, is {strategy!r}")
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise ValueError(f"{where}: 'symmetric' must be true or, of int, false, is {symmetric!r}")
    if weights.get("actorder") not in (None, "static", "weight", False):
        raise ValueError(f"{where}: 'actorder' {weights['actorder']!r} is not read")
    of_fp4 = kind == "float" and bits == 4
    if of_fp4 != (strategy == "tensor_group") and not (of_fp4 and strategy == "group"):
        raise ValueError(f"{where}: {kind} of {bits} bits have no 'strategy' {strategy!r}")
    group: Any = 0
    block: Any = (0, 0)
    if strategy in ("group", "tensor_group"):
        group = weights.get("group_size")
        if not is_count(group):
            raise ValueError(f"{where}: 'group_size' must be a count, is {group!r}")
        if of_fp4 and group != block_floats.GROUPS[_FP4[str(strategy)]]:
            raise ValueError(f"{where}: {_FP4[str(strategy)]} has no groups of {group}")
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2 or not all(map(is_count, block)):
            raise ValueError(f"{where}: 'block_structure' must be two counts, is {block!r}")
    return Scheme(bits, str(kind), strategy, symmetric, group, (block[0], block[1]))


def scheme_of(s: Settings, module: str, where: str) -> Scheme:
    """That of a linear layer: its name counts before a pattern, a pattern before its class."""
    for rank in ("name", "pattern", "class"):
        for targets, scheme in s.groups:
            if any(_matches(target, module, rank) for target in targets):
                return scheme
    raise ValueError(f"{where}: no group of 'config_groups' has it as a target")


def _matches(target: str, module: str, rank: str) -> bool:
    if rank == "name":
        return target == module
    if rank == "pattern":
        return target.startswith("re:") and re.match(target[3:], module) is not None
    return target == "Linear"


def shape(parts: Mapping[str, np.ndarray], scheme: Scheme, where: str) -> tuple[int, int]:
    """(outputs, inputs) of the matrix; ValueError where its tensors do not fit each other."""
    if (scheme.kind, scheme.bits) == ("float", 4):
        return block_floats.shape(parts, _FP4[scheme.strategy], where)
    codes = parts.get("weight")
    if codes is not None:
        wanted = np.dtype(np.int8 if scheme.kind == "int" else ml_dtypes.float8_e4m3fn)
        if codes.ndim != 2 or codes.dtype != wanted or "weight_packed" in parts:
            raise ValueError(
                f"{where}: 'weight' is {codes.dtype} {codes.shape}, must be a matrix of {wanted}"
            )
        if scheme.bits != 8 or not scheme.symmetric:
            raise ValueError(f"{where}: {scheme} is read in packed form only")
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.any():
            raise ValueError(f"{where}: has zero points, which {scheme} does not")
        block = _block(scheme, codes.shape)
        scaled.check_scale(codes, _in_rows(parts[SCALE]), block, SCALE, where)
        return codes.shape[0], codes.shape[1]
    words, size = parts.get("weight_packed"), parts.get("weight_shape")
    if words is None or size is None or scheme.kind != "int" or scheme.strategy == "block":
        raise ValueError(f"{where}: {sorted(parts)} are no tensors of {scheme}")
    if size.shape != (2,) or size.dtype.kind != "i" or words.ndim != 2:
        raise ValueError(
            f"{where}: 'weight_packed' and 'weight_shape' must be a matrix and 2 sizes"
        )
    n, k = (int(v) for v in size)
    group = _block(scheme, (n, k))[1]
    groups = -(-k // group) if group else 0
    if scheme.symmetric and "weight_zero_point" in parts:
        raise ValueError(f"{where}: has zero points, which {scheme} does not")
    about = f"{where}: {n} outputs of {k} inputs, {scheme.bits} bits in groups of {group}"
    check_part(parts, "weight_packed", [np.int32], (n, bitstream.words_of(k, scheme.bits)), about)
    if not scheme.symmetric:
        packed = (bitstream.words_of(n, scheme.bits), groups)
        check_part(parts, "weight_zero_point", [np.int32], packed, about)
    whole = scheme.strategy == "tensor"
    held = {SCALE: _in_rows(parts[SCALE])}
    check_part(held, SCALE, FLOATS, (1, 1) if whole else (n, groups), about)
    return n, k


def read(parts: Mapping[str, np.ndarray], scheme: Scheme, dtype: DTypeLike, where: str) -> QTensor:
    """The QTensor `[inputs, outputs]` of the file's codes, scales and zero points.

    Args:
      parts: of `PARTS`: int32 ``weight_packed [n, k bits / 32]`` with int64 ``weight_shape [2]``
        and, where not symmetric, int32 ``weight_zero_point [n bits / 32, groups]``; or ``weight
        [n, k]`` in int8 or float8_e4m3fn; and ``weight_scale [n, groups]``, ``[n, 1]``, ``[1]`` or
        one per block. FP4: see `block_floats.read`.
      scheme: from `scheme_of`.
      dtype: of the dequantized matrix.
      where: the file and matrix, for messages.

    Raises:
      ValueError: the tensors do not fit each other.
    """
    n, k = shape(parts, scheme, where)
    if (scheme.kind, scheme.bits) == ("float", 4):
        return block_floats.read(parts, _FP4[scheme.strategy], dtype)
    scale = _in_rows(parts[SCALE])
    if "weight" in parts:
        return scaled.to_qtensor(parts["weight"], scale, _block(scheme, (n, k)), dtype)
    group, bits = _block(scheme, (n, k))[1], scheme.bits
    codes, zeros = bitstream.unpack(parts["weight_packed"], bits, k).T, None
    if not scheme.symmetric:
        zeros = bitstream.unpack(parts["weight_zero_point"].T, bits, n).astype(np.int32)
    scale = np.ascontiguousarray(np.broadcast_to(scale.T, (-(-k // group), n)))
    return to_qtensor(plain(Grouped(bits, codes, scale, zeros, group)), dtype)


def write(q: QTensor) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a matrix `[inputs, outputs]`, and what ``weights`` of its group says.

    Integers and FP4 are packed (formats "pack-quantized", "nvfp4-pack-quantized" and
    "mxfp4-pack-quantized"), FP8 is written as it is ("float-quantized").

    Raises:
      ValueError: `q` is nothing that the layout holds.
    """
    if q.format == "fp8_e4m3":
        return _write_float(q)
    if q.format in block_floats.GROUPS:
        return block_floats.write(q), _about_fp4(q.format)
    held = from_qtensor(q)
    (k, n), bits = held.codes.shape, held.bits
    if held.order is not None:
        raise ValueError(f"is {q!r}: compressed-tensors has its inputs in their order")
    if held.zeros is not None and (held.zeros.min() < 0 or held.zeros.max() >= 1 << bits):
        raise ValueError(f"has zero points {held.zeros.min()} to {held.zeros.max()}")
    parts = {
        "weight_packed": bitstream.pack(held.codes.T, bits),
        "weight_scale": np.ascontiguousarray(held.scale.T),
        "weight_shape": np.array([n, k], np.int64),
    }
    if held.zeros is not None:
        packed = bitstream.pack(held.zeros.astype(np.uint8), bits)
        parts["weight_zero_point"] = np.ascontiguousarray(packed.T)
    whole = held.group >= k
    about = {"num_bits": bits, "type": "int", "symmetric": held.zeros is None, "dynamic": False}
    about |= {"strategy": "channel"} if whole else {"strategy": "group", "group_size": held.group}
    return parts, about


def format_of(weights: Mapping[str, Any]) -> str:
    """What the library calls the layout of a group, from what `write` says of it."""
    if weights["type"] == "int":
        return "pack-quantized"
    if weights["num_bits"] == 4:
        return f"{_FP4[weights['strategy']]}-pack-quantized"
    return "float-quantized"


def _about_fp4(format: str) -> dict[str, Any]:
    strategy, group = {v: k for k, v in _FP4.items()}[format], block_floats.GROUPS[format]
    about = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    about |= {"strategy": strategy, "group_size": group}
    return about | {"scale_dtype": "torch.float8_e4m3fn" if format == "nvfp4" else "torch.uint8"}


def _write_float(q: QTensor) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    matrix = q.ndim == 2 and len(q.block) == 2 and q.param_shape is None and q.activation is None
    if not matrix or isinstance(q.scale, QTensor) or q.zero_point is not None:
        raise ValueError(f"is {q!r}: a matrix in FP8 with scales of one level is needed")
    (k, n), (columns, rows) = q.storage_shape, q.block
    scale = np.ascontiguousarray(np.asarray(q.scale).T)
    about: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    if columns >= k and rows >= n:
        about |= {"strategy": "tensor"}
        scale = scale.reshape(1)
    elif columns >= k and rows == 1:
        about |= {"strategy": "channel"}
    elif columns > 1 and rows > 1:
        about |= {"strategy": "block", "block_structure": [rows, columns]}
    else:
        raise ValueError(f"is {q!r}: FP8 has a scale per matrix, per output or per block")
    codes = np.ascontiguousarray(np.asarray(q.qvalue).T)
    return {"weight": codes, "weight_scale": scale}, about


def _block(scheme: Scheme, size: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    n, k = size
    return {
        "tensor": (n, k),
        "channel": (1, k),
        "group": (1, min(scheme.group, k)),
        "block": scheme.block,
    }[scheme.strategy]


def _in_rows(scale: np.ndarray) -> np.ndarray:
    """A single scale as a matrix."""
    return scale.reshape(1, 1) if scale.shape in ((), (1,)) else scale
