"""Language models in qjax's own folders: parameters, configuration and tokenizer together."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from qjax.io import folder
from qjax.models.architecture import ACTIVATIONS, Config, Rope
from qjax.models.decoder import Decoder
from qjax.models.tokenizer import Tokenizer, from_file
from qjax.qtensor import is_qtensor
from qjax.tracing import param_path

TOKENIZER = "tokenizer.json"

_MAX_SIZE = 1 << 24
_MAX_HEAD_DIM = 1 << 16


def save_folder(
    path: str | os.PathLike[str],
    model: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a language model into a folder that `load_folder` reads back, bit for bit.

    Args:
      path: the folder; it appears whole or not at all.
      model, params, tokenizer: as `load` returns them, the params quantized or not.
      overwrite: whether to replace a folder that qjax wrote.

    Raises:
      ValueError: if `path` exists, or a parameter is neither array nor QTensor.
    """
    metadata = {
        "model": _config_json(model.config),
        "tokenizer": {
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "stop_ids": list(tokenizer.stop_ids),
        },
    }
    files = {TOKENIZER: tokenizer.backend.to_str().encode()}
    folder.write_folder(path, params, metadata=metadata, files=files, overwrite=overwrite)


def load_folder(path: str | os.PathLike[str]) -> tuple[Decoder, Any, Tokenizer]:
    """Reads ``(model, params, tokenizer)`` from a folder that `save_folder` wrote.

    Raises:
      ValueError: naming file and field, if the folder is broken, or the parameters are not those
        that the configuration needs.
    """
    found = folder.read_folder(path)
    where = os.path.join(path, folder.MANIFEST)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found.params, is_leaf=is_qtensor)
    held = {param_path(keys): tuple(leaf.shape) for keys, leaf in leaves}
    config = _config(_object(found.metadata, "model", where), where)
    if not config.scan and config.num_layers > len(held):
        _fail(where, "model num_layers", f"is {config.num_layers}, of {len(held)} parameters")
    model = Decoder(config)
    _check_parameters(model, held, where)
    return model, found.params, _tokenizer(found, config, where)


def _check_parameters(model: Decoder, held: Mapping[str, tuple[int, ...]], where: str) -> None:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    needed = {
        param_path(keys): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for name in sorted(needed.keys() ^ held.keys()):
        what = "is missing" if name in needed else "is none that the model has"
        _fail(where, f"parameters {name}", what)
    for name, shape in needed.items():
        if held[name] != shape:
            _fail(where, f"parameters {name}", f"has shape {held[name]}, the model needs {shape}")


def _tokenizer(found: folder.Folder, config: Config, where: str) -> Tokenizer:
    if TOKENIZER not in found.files:
        _fail(where, "files", f"does not list {TOKENIZER!r}")
    tokenizer = from_file(found.files[TOKENIZER], bos=None, eos=None)
    size = tokenizer.vocab_size
    if size > config.vocab_size:
        _fail(where, "model vocab_size", f"is {config.vocab_size}, {TOKENIZER} has {size} tokens")
    fields = _object(found.metadata, "tokenizer", where)
    is_id = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < size
    optional = lambda v: v is None or is_id(v)
    checks = {
        "bos_id": optional,
        "eos_id": optional,
        "stop_ids": lambda v: isinstance(v, list) and len(v) <= size and all(map(is_id, v)),
    }
    _check_fields(fields, checks, where, "tokenizer")
    return dataclasses.replace(
        tokenizer,
        bos_id=fields["bos_id"],
        eos_id=fields["eos_id"],
        stop_ids=tuple(fields["stop_ids"]),
    )


def _config_json(config: Config) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("rope", "local_rope"):
        fields[name] = None if fields[name] is None else fields[name]._asdict()
    return fields | {"dtype": jnp.dtype(config.dtype).name}


def _config(fields: Mapping[str, Any], where: str) -> Config:
    # A folder written before Config got a field reads as one that has the field's default.
    _check_fields(fields, _CONFIG, where, "model", optional=_CONFIG.keys() - _required())
    values = dict(fields)
    for name in ("rope", "local_rope"):
        if values.get(name) is not None:
            _check_fields(values[name], _ROPE, where, f"model {name}")
            factors = values[name]["factors"]
            factors = None if factors is None else tuple(factors)
            values[name] = Rope(**{**values[name], "factors": factors})
    if "local_layers" in values:
        values["local_layers"] = tuple(values["local_layers"])
    if "dtype" in values:
        values["dtype"] = jnp.dtype(values["dtype"])
    try:
        return Config(**values)
    except ValueError as error:
        _fail(where, "model", str(error))


def _required() -> set[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(Config)
    return {f.name for f in fields if f.default is missing and f.default_factory is missing}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _size(limit: int, least: int = 1) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= limit


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or check(v)


def _list_of(check: Callable[[Any], bool], limit: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) <= limit and all(map(check, v))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_ROPE: Mapping[str, Callable[[Any], bool]] = {
    "theta": _positive,
    "factor": _positive,
    "factors": _optional(_list_of(_positive, _MAX_HEAD_DIM)),
}

# What each field of Config may be in a file; Config itself checks how they fit together.
_CONFIG: Mapping[str, Callable[[Any], bool]] = {
    "vocab_size": _size(_MAX_SIZE),
    "hidden_size": _size(_MAX_SIZE),
    "intermediate_size": _size(_MAX_SIZE),
    "num_layers": _size(_MAX_SIZE),
    "num_heads": _size(_MAX_SIZE),
    "num_kv_heads": _size(_MAX_SIZE),
    "head_dim": _size(_MAX_HEAD_DIM),
    "max_length": _size(_MAX_SIZE),
    "norm_epsilon": _positive,
    "rope": _is_object,
    "local_rope": _optional(_is_object),
    "sliding_window": _optional(_size(_MAX_SIZE)),
    "local_layers": _list_of(_is_bool, _MAX_SIZE),
    "query_scale": _optional(_positive),
    "embedding_scale": _positive,
    "activation": lambda v: isinstance(v, str) and v in ACTIVATIONS,
    "qkv_bias": _is_bool,
    "qk_norm": _is_bool,
    "post_norms": _is_bool,
    "num_experts": _size(_MAX_SIZE, least=0),
    "experts_per_token": _size(_MAX_SIZE, least=0),
    "normalize_experts": _is_bool,
    "tied": _is_bool,
    "dtype": lambda v: isinstance(v, str) and v in {"float32", "float16", "bfloat16", "float64"},
    "scan": _is_bool,
}


def _check_fields(
    fields: Mapping[str, Any],
    checks: Mapping[str, Callable[[Any], bool]],
    where: str,
    what: str,
    optional: Collection[str] = (),
) -> None:
    for name in sorted(fields.keys() ^ checks.keys()):
        if name in fields:
            _fail(where, f"{what} {name}", "is unknown")
        if name not in optional:
            _fail(where, f"{what} {name}", "is missing")
    for name, holds in checks.items():
        if name in fields and not holds(fields[name]):
            _fail(where, f"{what} {name}", f"is {str(fields[name])[:60]!r}, which is not valid")


def _object(metadata: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = metadata.get(key)
    if not isinstance(value, dict):
        _fail(where, f"metadata {key}", "is missing; this folder holds no language model")
    return value


def _fail(where: str, field: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {field}: {message}")
