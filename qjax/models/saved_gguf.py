"""Language models as GGUF files, which llama.cpp runs."""

from __future__ import annotations

import collections
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.io import gguf, gguf_writing
from qjax.io.ggml_types import CODECS, GGML_TYPES, GGMLType, from_qtensor
from qjax.models import loading, names
from qjax.prepared import Prepared
from qjax.qtensor import QTensor, is_qtensor
from qjax.tracing import param_path

FORMATS = tuple(name.lower() for name in CODECS)

_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
_PLAIN = {gguf.DTYPES[name]: _TYPES[name] for name in ("F32", "F16", "BF16")}
# What `general.file_type` calls a file most of whose weights have a type; of k-quants the "M" mix.
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"Q8_0": 7, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}
_FILE_TYPES |= {"IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}


def save_gguf(
    path: str | os.PathLike[str],
    params: Any,
    like: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Writes parameters as a GGUF file; settings and tokenizer are those of another one.

    QTensors of ggml's formats are written as its blocks, code for code: what llama.cpp runs is what
    the QTensors stand for. An array keeps the type that `like` has for it if that holds every value
    exactly, else it is written in its own. Parameters loaded from `like` give its bytes again.

    Args:
      path: the file; it appears whole or not at all.
      params: ``{"params": ...}`` of an unrolled decoder, as `load` gives it: QTensors of ggml's
        formats (`FORMATS`: q8_0, q4_k, iq4_nl, mxfp4 and so on), and arrays of float32, float16 or
        bfloat16.
      like: a GGUF file of the same model, in any types. Its metadata are copied, but for
        ``general.file_type`` and what an importance matrix says of its codes, which go where a
        tensor changes its type.
      overwrite: whether to replace a file.

    Raises:
      ValueError: `path` exists; parameters and `like` are not of one model; or a parameter is
        nothing that GGUF can hold. The message names the parameter and the remedy.

    Example::

      model, params, tokenizer = qjax.models.load("model-f16.gguf")
      sites = qjax.find_sites(model.apply, params, tokens)
      qparams = qjax.quantize_params(params, qjax.recipes.named("q4_k_m"), sites)
      qjax.models.save_gguf("model-q4_k_m.gguf", qparams, "model-f16.gguf")
    """
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"{os.fspath(path)}: exists; choose another path, or overwrite=True")
    file = gguf.read(like)
    config = loading.gguf_config(file)
    architecture = file.metadata["general.architecture"]
    factors = names.rope_factors(architecture)
    held: dict[str, tuple[str, Any]] = {}
    for keys, value in jax.tree_util.tree_leaves_with_path(params["params"], is_leaf=is_qtensor):
        where = param_path(keys)
        held[_name(where)] = where, value
    loading.check_names(file.path, set(held), {name for name in file.tensors if name != factors})

    tensors: dict[str, gguf_writing.Tensor] = {}
    for name, info in file.tensors.items():
        if name == factors:
            tensors[name] = gguf_writing.Tensor(
                info.type, info.shape, functools.partial(file.raw, name)
            )
            continue
        where, value = held[name]
        rows = names.permuted_rows(where, config) if architecture == "llama" else None
        tensors[name] = _tensor(where, value, info.type, rows)
        if tensors[name].shape != info.shape:
            raise ValueError(
                f"{where} has shape {tensors[name].shape} as a row-major tensor, {name!r} in "
                f"{file.path} has {info.shape}: they are not of one model"
            )
    same = all(tensors[name].type == info.type for name, info in file.tensors.items())
    metadata, kinds = (file.metadata, file.kinds) if same else _metadata(file, tensors)
    gguf_writing.write(path, metadata, kinds, tensors)


def _name(path: str) -> str:
    try:
        return names.gguf_name(path)
    except KeyError:
        raise ValueError(
            f"{path}: is no parameter of an unrolled decoder; qjax.unstack gives scanned layers a "
            "place each"
        ) from None


def _tensor(path: str, value: Any, like: GGMLType, rows: np.ndarray | None) -> gguf_writing.Tensor:
    """What is written for a parameter."""
    transpose = path.endswith("/kernel")
    turned = lambda shape: (*shape[:-2], shape[-1], shape[-2]) if transpose else tuple(shape)

    def in_file(ours: np.ndarray) -> np.ndarray:
        if rows is None:
            return ours
        theirs = np.empty_like(ours)
        theirs[rows] = ours
        return theirs

    if isinstance(value, Prepared):
        raise ValueError(f"{path}: is prepared for a kernel; save what qjax.unprepare gives")
    if isinstance(value, QTensor):
        if value.format not in FORMATS:
            raise ValueError(
                f"{path}: GGUF has no type for the format {value.format}; quantize to one of "
                f"{', '.join(FORMATS)}, or dequantize it"
            )
        if value.activation is not None:
            raise ValueError(
                f"{path}: GGUF has no place for what its activation says of the other operand; "
                "qjax.models.fold moves an input_scale into other parameters"
            )
        kind = _TYPES[value.format.upper()]

        def blocks() -> np.ndarray:
            try:
                return in_file(from_qtensor(value, transpose))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

        return gguf_writing.Tensor(kind, turned(value.shape), blocks)
    dtype = jnp.dtype(value.dtype)
    if dtype not in _PLAIN:
        raise ValueError(f"{path}: has dtype {dtype}, must be float32, float16 or bfloat16")
    array = np.asarray(value)
    if like.name in gguf.DTYPES and _fits(array, gguf.DTYPES[like.name]):
        dtype = gguf.DTYPES[like.name]

    def plain() -> np.ndarray:
        return in_file((np.swapaxes(array, -1, -2) if transpose else array).astype(dtype))

    return gguf_writing.Tensor(_PLAIN[dtype], turned(array.shape), plain)


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a dtype has every value of an array; NaN is one."""
    if dtype not in _PLAIN or array.dtype == dtype:
        return dtype in _PLAIN
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    wide = np.promote_types(array.dtype, dtype)
    return bool(np.array_equal(narrow.astype(wide), array.astype(wide), equal_nan=True))


def _metadata(
    file: gguf.GGUF, tensors: Mapping[str, gguf_writing.Tensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a file whose tensors have other types."""
    stale = lambda key: key.startswith("quantize.imatrix.")
    metadata = {key: value for key, value in file.metadata.items() if not stale(key)}
    kinds = {key: file.kinds[key] for key in metadata}
    sizes: dict[str, int] = collections.Counter()
    for tensor in tensors.values():
        sizes[tensor.type.name] += math.prod(tensor.shape)
    most = max(sizes, key=lambda name: sizes[name])
    metadata["general.file_type"], kinds["general.file_type"] = _FILE_TYPES[most], "u32"
    if set(sizes) - set(gguf.DTYPES):
        metadata["general.quantization_version"] = 2
        kinds["general.quantization_version"] = "u32"
    return metadata, kinds
