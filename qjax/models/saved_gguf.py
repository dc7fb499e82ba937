"""Language models as GGUF files, which llama.cpp runs."""

from __future__ import annotations

import collections
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qjax.io import gguf, gguf_writing
from qjax.io.ggml_types import CODECS, GGML_TYPES, GGMLType, from_qtensor
from qjax.models import loading, names
from qjax.prepared import Prepared
from qjax.qtensor import QTensor

FORMATS = tuple(name.lower() for name in CODECS)

_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
_PLAIN = {gguf.DTYPES[name]: _TYPES[name] for name in ("F32", "F16", "BF16")}
# What `general.file_type` calls a file most of whose matrices have a type; of k-quants the "M" mix.
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
    exactly, else it is written in its own. What `load` made of a file gives its bytes again, but
    for IQ1, IQ2 and IQ3 tensors, which it decodes.

    Args:
      path: the file; it appears whole or not at all.
      params: ``{"params": ...}`` of an unrolled decoder, as `load` gives it: QTensors of ggml's
        formats (`FORMATS`: q8_0, q4_k, iq4_nl, mxfp4 and so on), and arrays of float32, float16 or
        bfloat16. All are on the host in the end.
      like: a GGUF file of the same model, in any types. Its metadata are copied; where tensors
        change their types ``general.file_type`` says the commonest one of matrices, and what an
        importance matrix made goes with the bytes that it made.
      overwrite: whether to replace a file.

    Raises:
      ValueError: `path` exists; parameters and `like` are not of one model; or a parameter is
        nothing that GGUF can hold. The message names the parameter and the remedy.
      OSError: the file cannot be written.

    Example::

      model, params, tokenizer = qjax.models.load("model-f16.gguf")
      sites = qjax.find_sites(model.apply, params, tokens)
      qparams = qjax.quantize_params(params, qjax.recipes.named("q4_k_m"), sites)
      qjax.models.save_gguf("model-q4_k_m.gguf", qparams, "model-f16.gguf")
    """
    check_target(path, overwrite)
    file = gguf.read(like)
    config = loading.gguf_config(file)
    architecture = file.metadata["general.architecture"]
    constant = names.rope_factors(architecture)
    held = _by_name(params)
    for name, (where, _) in held.items():
        if name not in file.tensors:
            raise ValueError(
                f"params/{where}: {file.path} has no {name!r}: they are not of one model"
            )
    tensors: dict[str, gguf_writing.Tensor] = {}
    for name, info in file.tensors.items():
        if name == constant:
            raw = functools.partial(file.raw, name)
            tensors[name] = gguf_writing.Tensor(info.type, info.shape, raw)
            continue
        if name not in held:
            raise ValueError(f"{file.path} has {name!r}, which is not among the parameters")
        where, value = held[name]
        rows = names.permuted_rows(where, config) if architecture == "llama" else None
        tensors[name] = _tensor(f"params/{where}", value, info.type, rows)
        if tensors[name].shape != info.shape:
            raise ValueError(
                f"params/{where} has shape {tensors[name].shape} as a row-major tensor, {name!r} "
                f"in {file.path} has {info.shape}: they are not of one model"
            )
    gguf_writing.write(path, *_metadata(file, tensors), tensors)


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises a `ValueError` where `save_gguf` would not write."""
    target = pathlib.Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{target}: exists; choose another path, or allow it to be overwritten")
    if target.is_symlink() or not target.is_file():
        raise ValueError(f"{target}: is no file, and is not overwritten")


def _by_name(params: Any) -> dict[str, tuple[str, Any]]:
    """The name in a file of each parameter -> its path and value."""
    held = {}
    for where, value in loading.leaves_of(params, "save_gguf").items():
        try:
            held[names.gguf_name(where)] = where, value
        except KeyError:
            scanned = where.startswith("layers/")
            remedy = (
                "; unstack the layers, and call them layers_0, layers_1, ..." if scanned else ""
            )
            raise ValueError(
                f"params/{where}: is no parameter of an unrolled decoder{remedy}"
            ) from None
    return held


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
        kind = _block_type(path, value)

        def blocks() -> np.ndarray:
            try:
                return in_file(from_qtensor(value, transpose))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

        return gguf_writing.Tensor(kind, turned(value.shape), blocks)
    if not isinstance(value, jax.Array | np.ndarray):
        raise ValueError(f"{path}: is {type(value).__name__}, neither array nor QTensor")
    array = np.asarray(value)
    dtype = array.dtype
    if dtype not in _PLAIN:
        raise ValueError(f"{path}: has dtype {dtype}, must be float32, float16 or bfloat16")
    theirs = gguf.DTYPES.get(like.name, dtype)
    if theirs in _PLAIN and _fits(array, theirs):
        dtype = theirs

    def plain() -> np.ndarray:
        return in_file((np.swapaxes(array, -1, -2) if transpose else array).astype(dtype))

    return gguf_writing.Tensor(_PLAIN[dtype], turned(array.shape), plain)


def _block_type(path: str, q: QTensor) -> GGMLType:
    if q.format not in FORMATS:
        raise ValueError(
            f"{path}: GGUF has no type for the format {q.format}; quantize to one of "
            f"{', '.join(FORMATS)}, or dequantize it"
        )
    if q.activation is not None:
        remedy = "dataclasses.replace(q, activation=None) leaves the input as it is"
        if q.activation.input_scale is not None:
            remedy = "qjax.models.fold moves an input_scale into other parameters"
        raise ValueError(
            f"{path}: GGUF has no place for what its activation does to the input; {remedy}"
        )
    return _TYPES[q.format.upper()]


def _fits(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether a dtype has every value of an array, NaN as one; float32 has those of all three."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    wide = narrow.astype(np.float32), array.astype(np.float32)
    return array.dtype == dtype or np.array_equal(*wide, equal_nan=True)


def _metadata(
    file: gguf.GGUF, tensors: Mapping[str, gguf_writing.Tensor]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a file with these tensors, and their types."""
    metadata, kinds = dict(file.metadata), dict(file.kinds)
    types = collections.Counter(t.type.name for t in tensors.values() if len(t.shape) > 1)
    if any(tensors[name].type != info.type for name, info in file.tensors.items()):
        most = types.most_common(1)[0][0]
        metadata["general.file_type"], kinds["general.file_type"] = _FILE_TYPES[most], "u32"
        if set(types) - set(gguf.DTYPES):
            metadata["general.quantization_version"] = 2
            kinds["general.quantization_version"] = "u32"
    made = [key for key in metadata if key.startswith("quantize.imatrix.")]
    if made and not all(_same(tensors[name], file.raw(name)) for name in tensors):
        for key in made:
            del metadata[key], kinds[key]
    return metadata, kinds


def _same(tensor: gguf_writing.Tensor, raw: np.ndarray) -> bool:
    return tensor.nbytes == raw.nbytes and tensor.make().tobytes() == raw.tobytes()
