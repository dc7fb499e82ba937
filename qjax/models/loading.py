"""`load`: a checkpoint on disk to a model, its parameters and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qjax.io import codecs, folder, gguf, safetensors
from qjax.io.ggml_dense import DENSE_TYPES, to_array
from qjax.io.ggml_types import CODECS, to_qtensor
from qjax.io.groups import alike
from qjax.io.strict_json import read_object
from qjax.models import configs, names, saved, tokenizer
from qjax.models.architecture import Config
from qjax.models.decoder import Decoder
from qjax.qtensor import is_qtensor

Names: TypeAlias = str | tuple[str, ...]

_MAX_JSON = 1 << 24  # bytes of a config.json
_FLOATS = [safetensors.DTYPES[name] for name in ("F32", "F16", "BF16")]


def load(
    path: str | os.PathLike[str], dtype: Any = None
) -> tuple[Decoder, dict[str, Any], tokenizer.Tokenizer]:
    """Loads a language model from a GGUF file, a Hugging Face folder or a folder that qjax wrote.

    Quantized tensors become QTensors that hold the file's own codes and scales; no float copy of
    them is made. Run them with `qjax.quantized`. F32, F16 and BF16 become arrays, and so do the
    IQ1, IQ2 and IQ3 types of GGUF files, which the package `gguf` decodes (the extra
    `qjax[gguf]`). Quantized Hugging Face folders are those of `qjax.io.codecs.CODECS`: GPTQ, AWQ
    ("gemm"), compressed-tensors (packed integers, int8, FP8, NVFP4, MXFP4), ModelOpt (FP8, NVFP4,
    MXFP8, MXFP4, int8, int4), fine-grained FP8 and bitsandbytes; what they say of codes of
    activations or of the KV cache is not taken over.

    Args:
      path: a GGUF file (version 2 or 3; llama with or without experts, qwen2, qwen3, qwen3moe,
        gemma3), or a folder with ``config.json``, safetensors (one file or an index
        with shards) and ``tokenizer.json``, or a folder that qjax wrote.
      dtype: of the arrays, of what the QTensors stand for, and of the computation; float32 if None.
        A folder that qjax wrote keeps its own.

    Returns:
      ``(model, params, tokenizer)``: ``model.apply(params, tokens)`` gives logits.

    Raises:
      ValueError: the file is broken, or the model is none that the decoder can run; the message
        names the file and the tensor or key.

    Example::

      model, params, tokenizer = qjax.models.load("model.gguf")
      tokens = jnp.asarray([tokenizer.encode("Hello")])
      logits = jax.jit(qjax.quantized(model.apply))(params, tokens)
    """
    if folder.is_folder(path):
        if dtype is not None:
            raise ValueError(
                f"load: {os.fspath(path)} keeps the dtypes it was saved with: omit dtype"
            )
        return saved.load_folder(path)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"load: dtype must be a floating-point type, is {dtype}")
    return _load_folder(path, dtype) if os.path.isdir(path) else _load_gguf(path, dtype)


class _Source(NamedTuple):
    """A file as `_assemble` sees it.

    `shapes` are those of its tensors, `names_of` maps a parameter path to the name of its tensor,
    or to a tuple of names where a stacked parameter has a tensor for each of its parts,
    `read(names, transpose, rows)` makes the parameter, `permuted` tells llama's order of q and k,
    and `zeros` are biases that a model which has none loses nothing by.
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    names_of: Callable[[str], Names]
    read: Callable[[Any, bool, np.ndarray | None], Any]
    permuted: bool
    zeros: frozenset[str] = frozenset()


def gguf_config(file: gguf.GGUF) -> Config:
    """The decoder's configuration in a GGUF file."""
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: the tensor 'token_embd.weight' is missing")
    factors = names.rope_factors(file.metadata.get("general.architecture"))
    return configs.from_gguf(
        file.metadata,
        file.path,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        tensors=file.tensors.keys(),
        rope_factors=file.array(factors) if factors in file.tensors else None,
    )


def _load_gguf(path: str | os.PathLike[str], dtype: np.dtype):
    file = gguf.read(path)
    config = gguf_config(file)
    model = Decoder(dataclasses.replace(config, dtype=dtype))
    tokens = tokenizer.from_gguf(file.metadata, file.path)
    if tokens.vocab_size != config.vocab_size:
        raise ValueError(
            f"{file.path}: the tokenizer has {tokens.vocab_size} tokens, 'token_embd.weight' has "
            f"{config.vocab_size} rows"
        )

    def read(name: str, transpose: bool, rows: np.ndarray | None) -> Any:
        info = file.tensors[name]
        if info.type.name in gguf.DTYPES:
            return _array(file.array(name), transpose, rows, dtype)
        if info.type.name not in (*CODECS, *DENSE_TYPES):
            known = ", ".join([*gguf.DTYPES, *CODECS, *DENSE_TYPES])
            raise ValueError(
                f"{file.path}: tensor {name!r} has type {info.type.name}; can be loaded: {known}"
            )
        if len(info.shape) < 2:
            raise ValueError(f"{file.path}: tensor {name!r} is quantized, but not a matrix")
        raw = file.raw(name).reshape(*info.shape[:-1], -1)
        read = to_array if info.type.name in DENSE_TYPES else to_qtensor
        return read(raw if rows is None else raw[rows], info.type.name, dtype, transpose)

    architecture = file.metadata["general.architecture"]
    factors = names.rope_factors(architecture)
    shapes = {name: info.shape for name, info in file.tensors.items() if name != factors}
    permuted = architecture == "llama"
    source = _Source(file.path, shapes, names.gguf_name, read, permuted)
    return model, _assemble(config, source), tokens


def _load_folder(path: str | os.PathLike[str], dtype: np.dtype):
    root = pathlib.Path(path)
    where = str(root / "config.json")
    values = read_json(root / "config.json")
    config = configs.from_hf(values, where)
    tensors, _ = safetensors.read_folder(root)
    if config.num_layers * config.num_experts > len(tensors):
        raise ValueError(
            f"{where}: names {config.num_experts} experts in each of {config.num_layers} layers; "
            f"the folder holds {len(tensors)} tensors"
        )
    shapes = {
        name: array.shape
        for name, array in tensors.items()
        if not name.endswith(".rotary_emb.inv_freq")  # a constant that old files hold
    }
    held = _matrices(values, tensors, root)
    if held is not None:
        shapes = {name: s for name, s in shapes.items() if name not in held.used} | held.shapes
    if config.tied and _is_copy(tensors, "lm_head.weight", "model.embed_tokens.weight"):
        del shapes["lm_head.weight"]
    plus_one = config.post_norms  # gemma keeps its norms as the difference from one

    def tensor(name: str) -> np.ndarray:
        array = tensors[name]
        if array.dtype not in _FLOATS:
            raise ValueError(
                f"{root}: tensor {name!r} has dtype {array.dtype}, must be F32, F16 or BF16"
            )
        if plus_one and name.endswith("norm.weight"):
            array = array.astype(np.float32) + np.float32(1)
        return array

    def read(found: Names, transpose: bool, rows: np.ndarray | None) -> Any:
        parts = [found] if isinstance(found, str) else found
        quantized = [held is not None and name in held for name in parts]
        if held is not None and any(quantized):
            if not transpose or not all(quantized):
                raise ValueError(
                    f"{root}: {_listed(parts)}: are quantized in part, or no linear layers, which "
                    "alone can be"
                )
            matrices = [held.read(name, dtype) for name in parts]
            if isinstance(found, str):
                return matrices[0]
            matrices = alike(matrices, f"{root}: {_listed(parts)}")
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)
        if isinstance(found, str):
            return _array(tensor(found), transpose, rows, dtype)
        return _stacked([tensor(name) for name in found], transpose, dtype)

    def names_of(path: str) -> Names:
        name = names.hf_name(path, values["model_type"])
        return tuple(map(name.format, range(config.num_experts))) if "{}" in name else name

    zeros = frozenset(  # AutoGPTQ gave every layer that it quantized a bias
        name
        for name in shapes
        if name.endswith(".bias")
        and held is not None
        and f"{name.removesuffix('bias')}weight" in held
        and not tensors[name].any()
    )
    params = _assemble(config, _Source(str(root), shapes, names_of, read, False, zeros))
    tokens = _folder_tokenizer(root)
    if tokens.vocab_size > config.vocab_size:
        raise ValueError(
            f"{root}: the tokenizer has {tokens.vocab_size} tokens, vocab_size in config.json is "
            f"{config.vocab_size}"
        )
    return Decoder(dataclasses.replace(config, dtype=dtype)), params, tokens


def _matrices(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], root: pathlib.Path
) -> codecs.Matrices | None:
    """The quantized ones, if the folder has any."""
    path, key = root / "config.json", "quantization_config"
    found, older = config.get(key), root / "hf_quant_config.json"
    if found is None and older.exists():  # of ModelOpt, which alone writes this file
        path, key = older, "quantization"
        found = read_json(older).get(key)
        found = found | {"quant_method": "modelopt"} if isinstance(found, dict) else found
    elif found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: key {key!r}: must be an object, is {found!r}")
    return codecs.Matrices(found, tensors, str(path))


def _assemble(config: Config, source: _Source) -> dict[str, Any]:
    """Fills the parameter tree of a decoder from a file, once names and shapes are right."""
    tree = parameters_of(config)
    shapes: dict[str, tuple[int, ...]] = {}  # of each tensor, as a file holds it
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path, shape = _path(keys), leaf.shape
        if path.endswith("/kernel"):
            shape = (*shape[:-2], shape[-1], shape[-2])
        found = source.names_of(path)
        shapes |= {found: shape} if isinstance(found, str) else dict.fromkeys(found, shape[1:])
    _check_names(source.path, set(shapes), set(source.shapes) - (source.zeros - set(shapes)))
    for name, shape in shapes.items():
        if tuple(source.shapes[name]) != shape:
            raise ValueError(
                f"{source.path}: tensor {name!r} has shape {tuple(source.shapes[name])}, the "
                f"configuration says {shape}"
            )

    def fill(keys: tuple[Any, ...], _: Any) -> Any:
        path = _path(keys)
        rows = names.permuted_rows(path, config) if source.permuted else None
        return source.read(source.names_of(path), path.endswith("/kernel"), rows)

    return {"params": jax.tree_util.tree_map_with_path(fill, tree)}


def leaves_of(params: Any, function: str) -> dict[str, Any]:
    """The parameters in ``{"params": ...}`` by path; a ValueError where that is something else."""
    if not isinstance(params, Mapping) or set(params) != {"params"}:
        found = sorted(map(str, params)) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f'{function} takes {{"params": ...}} as load gives it, not {found}')
    leaves = jax.tree_util.tree_leaves_with_path(params["params"], is_leaf=is_qtensor)
    return {_path(keys): leaf for keys, leaf in leaves}


def parameters_of(config: Config) -> dict[str, Any]:
    """The shapes of a decoder's parameters, the layers not stacked."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # All layers have the same shapes: one is traced, whatever number a file claims.
    one = dataclasses.replace(config, num_layers=1, local_layers=config.local_layers[:1])
    tree = dict(jax.eval_shape(Decoder(one).init, jax.random.key(0), tokens)["params"])
    layer = tree.pop("layers_0")
    tree |= {f"layers_{i}": layer for i in range(config.num_layers)}
    return tree


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _array(
    array: np.ndarray, transpose: bool, rows: np.ndarray | None, dtype: np.dtype
) -> jax.Array:
    array = array if rows is None else array[rows]
    return jnp.array(np.swapaxes(array, -1, -2) if transpose else array, dtype)


def _stacked(parts: list[np.ndarray], transpose: bool, dtype: np.dtype) -> jax.Array:
    """One array of several, each cast and copied once."""
    parts = [part.T if transpose else part for part in parts]
    out = np.empty((len(parts), *parts[0].shape), dtype)
    for i, part in enumerate(parts):
        out[i] = part
    return jnp.asarray(out)


def _check_names(where: str, wanted: set[str], available: set[str]) -> None:
    if wanted - available:
        raise ValueError(f"{where}: missing tensors: {_listed(wanted - available)}")
    if available - wanted:
        raise ValueError(
            f"{where}: tensors that this architecture does not have: {_listed(available - wanted)}"
        )


def _listed(found: Iterable[str]) -> str:
    found = sorted(found)
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more


def _is_copy(tensors: Mapping[str, np.ndarray], name: str, other: str) -> bool:
    if name not in tensors or other not in tensors:
        return False
    a, b = tensors[name], tensors[other]
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of a Hugging Face folder."""
    if not path.exists():
        raise ValueError(f"{path}: is missing; a Hugging Face folder has one")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path}: has more than the {_MAX_JSON} bytes that are read")
    return read_object(path.read_bytes(), str(path))


def _folder_tokenizer(folder: pathlib.Path) -> tokenizer.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{path}: is missing; save the folder with its fast tokenizer")
    settings = folder / "tokenizer_config.json"
    special = read_json(settings) if settings.exists() else {}
    text = {key: _token_text(special.get(key), key, settings) for key in ("bos_token", "eos_token")}
    return tokenizer.from_file(path, bos=text["bos_token"], eos=text["eos_token"])


def _token_text(value: Any, key: str, path: pathlib.Path) -> str | None:
    """A token in ``tokenizer_config.json``: its text, or an object with its text, or null."""
    text = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(text, str):
        raise ValueError(f"{path}: key {key!r}: must be a token's text, is {value!r}")
    return text
