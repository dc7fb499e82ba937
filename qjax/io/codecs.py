"""Quantized matrices of Hugging Face folders, by the ``quant_method`` of their ``config.json``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from qjax.io import awq, bitsandbytes, compressed_tensors, fine_grained_fp8, gptq, modelopt
from qjax.qtensor import QTensor


class Codec(NamedTuple):
    """How a method's files hold a matrix: tensors ``<module>.<part>``.

    Attributes:
      marks: parts of which every quantized matrix has one, and nothing else has.
      parts: all that belong to one.
      settings: (``quantization_config``, where) -> what it says.
      scheme: (settings, module, where) -> what holds for a module.
      shape: (tensors by part, scheme, where) -> (outputs, inputs), checked.
      read: (tensors by part, scheme, dtype, where) -> the QTensor `[inputs, outputs]`.
    """

    marks: tuple[str, ...]
    parts: tuple[str, ...]
    settings: Callable[[Mapping[str, Any], str], Any]
    scheme: Callable[[Any, str, str], Any]
    shape: Callable[[Mapping[str, np.ndarray], Any, str], tuple[int, int]]
    read: Callable[[Mapping[str, np.ndarray], Any, DTypeLike, str], QTensor]


def _codec(module: Any, scheme: Callable[[Any, str, str], Any] = lambda s, name, where: s) -> Codec:
    return Codec(module.MARKS, module.PARTS, module.settings, scheme, module.shape, module.read)


CODECS: dict[str, Codec] = {
    "gptq": _codec(gptq),
    "awq": _codec(awq),
    "compressed-tensors": _codec(compressed_tensors, compressed_tensors.scheme_of),
    "fp8": _codec(fine_grained_fp8),
    "bitsandbytes": _codec(bitsandbytes),
    "modelopt": _codec(modelopt),
}


# of the KV cache, not taken over
_CACHE = (".self_attn.k_scale", ".self_attn.v_scale", ".self_attn.q_scale")
_CACHE += (".k_proj.k_scale", ".v_proj.v_scale")


class Matrices:
    """The quantized matrices among the tensors of a folder.

    Args:
      config: the object ``quantization_config``.
      tensors: all tensors by name.
      where: the file of `config`, for messages.

    Attributes:
      shapes: (outputs, inputs) by ``<module>.weight``.
      used: the names of the tensors that are theirs.

    Raises:
      ValueError: the method is none of `CODECS`, or tensors do not fit what the config says.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
    ) -> None:
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in CODECS:
            raise ValueError(
                f"{where}: key 'quant_method': can be read: {', '.join(CODECS)}, is {method!r}"
            )
        self._codec = codec = CODECS[method]
        self.used: set[str] = {name for name in tensors if name.endswith(_CACHE)}
        settings = codec.settings(config, f"{where}: quantization_config")
        self._held: dict[str, tuple[dict[str, np.ndarray], Any, str]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for name, mark in itertools.product(tensors, codec.marks):
            module = name.removesuffix(f".{mark}")
            if module == name:
                continue
            names = {p: f"{module}.{p}" for p in codec.parts}
            parts = {p: tensors[n] for p, n in names.items() if n in tensors}
            at = f"{where}: matrix {module!r}"
            scheme = codec.scheme(settings, module, at)
            self.shapes[f"{module}.weight"] = size = codec.shape(parts, scheme, at)
            if 0 in size:
                raise ValueError(f"{at}: is empty, {size}")
            if f"{module}.weight" in tensors and "weight" not in parts:
                raise ValueError(f"{at}: there is a tensor 'weight' beside {mark!r}")
            self._held[f"{module}.weight"] = parts, scheme, at
            self.used |= {names[p] for p in parts}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def read(self, name: str, dtype: DTypeLike) -> QTensor:
        """The QTensor `[inputs, outputs]` of ``<module>.weight``."""
        parts, scheme, where = self._held[name]
        return self._codec.read(parts, scheme, dtype, where)
