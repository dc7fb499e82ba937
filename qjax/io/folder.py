"""Folders of quantized parameters: ``qjax.json`` and safetensors shards.

``qjax.json`` is the manifest: ``format`` ("qjax"), ``version``, ``shards`` and ``files`` (the names
of all other files of the folder), ``parameters`` (see `qjax.io.manifest`) and ``metadata``, a JSON
object of the caller's. Shards are called ``model-00001-of-00002.safetensors`` and hold each array
in its own dtype, codes of less than a byte packed into uint8 (see `qjax.io.packing`).
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.io import manifest, packing, safetensors

MANIFEST = "qjax.json"
VERSION = 2

_MAX_MANIFEST = 1 << 28  # bytes; a model of 100,000 tensors takes 2**26
_SHARD_BYTES = 1 << 32
_FIELDS = {"format", "version", "shards", "files", "parameters", "metadata"}


class Folder(NamedTuple):
    """What a folder holds: the parameters, the caller's metadata, and paths of the other files."""

    params: Any
    metadata: dict[str, Any]
    files: dict[str, pathlib.Path]


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with a manifest."""
    return (pathlib.Path(path) / MANIFEST).is_file()


def write_folder(
    path: str | os.PathLike[str],
    params: Any,
    *,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes parameters into a new folder, atomically: it appears whole or not at all.

    Everything is written to a temporary folder beside `path`, which is then renamed.

    Args:
      path: the folder; its parent exists.
      params: nested dictionaries (keys str or int) of arrays and QTensors.
      metadata: a JSON object that `read_folder` gives back.
      files: plain file name to content, written as they are.
      overwrite: whether to replace a folder that this function wrote; any other is left alone.
      shard_bytes: a new shard is begun before one grows beyond this.

    Raises:
      ValueError: if `path` exists (and may not be replaced), a leaf is no array, or `files` has
        a name that the folder needs itself.
      OSError: if it cannot be written.

    Example::

      write_folder("out", qparams, metadata={"made by": "me"})
      qparams = read_folder("out").params
    """
    target = pathlib.Path(path)
    _check_target(target, overwrite)
    files = dict(files or {})
    described = manifest.describe(params)
    parts = manifest.parts(described.arrays, shard_bytes)
    shards = [
        f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, _ in enumerate(parts, start=1)
    ]
    for name in files:
        if pathlib.PurePosixPath(name).name != name or name in {"", ".", "..", MANIFEST, *shards}:
            raise ValueError(f"{target}: files: {name!r} cannot be the name of an additional file")
    text = json.dumps(
        {
            "format": "qjax",
            "version": VERSION,
            "shards": shards,
            "files": sorted(files),
            "metadata": dict(metadata or {}),
            "parameters": described.entries,
        },
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        for shard, names in zip(shards, parts, strict=True):
            held = {name: _stored(described.arrays[name]) for name in names}
            safetensors.write(temporary / shard, held)
        for name, content in {**files, MANIFEST: text.encode()}.items():
            _write(temporary / name, content)
        _move_into_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads a folder that `write_folder` wrote; the arrays are copies on the default device.

    Raises:
      ValueError: naming file and field, if the manifest is broken or of an unknown version, a file
        is missing, lies outside of the folder or is not listed, or a tensor is missing, left over
        or not what the manifest says.
    """
    folder = pathlib.Path(path)
    where = folder / MANIFEST
    if not where.is_file():
        raise ValueError(f"{where}: is missing; a folder that qjax wrote has one")
    fields = _read_manifest(folder)
    tensors: dict[str, np.ndarray] = {}
    for name in fields["shards"]:
        found, _ = safetensors.read(safetensors.inside(folder, name, f"{MANIFEST} shards"))
        for key in found:
            if key in tensors:
                raise ValueError(f"{folder / name}: tensor {key!r}: is in an earlier shard too")
        tensors.update(found)
    files = {
        name: safetensors.inside(folder, name, f"{MANIFEST} files") for name in fields["files"]
    }
    params = manifest.restore(fields["parameters"], tensors, str(where))
    return Folder(params, fields["metadata"], files)


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{target}: exists; choose another path, or allow it to be overwritten")
    if target.is_symlink() or not is_folder(target):
        raise ValueError(f"{target}: is no folder that qjax wrote, and is not overwritten")


def _stored(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return packing.pack(array) if array.dtype in packing.BITS else array


def _write(path: pathlib.Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Renames; a folder in the way is moved aside first, and back if the rename fails."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = safetensors.inside(folder, MANIFEST, "manifest")
    size = path.stat().st_size
    if size > _MAX_MANIFEST:
        raise ValueError(f"{path}: has {size} bytes, at most {_MAX_MANIFEST} are read")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice[:80]!r} appears twice")
        return keys

    try:
        fields = json.loads(path.read_bytes().decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no manifest: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != "qjax":
        raise ValueError(f"{path}: format: must be 'qjax'")
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"{path}: version: is {str(version)[:80]}, this version of qjax reads {VERSION}; "
            "update qjax or write the folder again"
        )
    if fields.keys() != _FIELDS:
        odd = min(fields.keys() ^ _FIELDS)
        raise ValueError(f"{path}: {odd}: {'is unknown' if odd in fields else 'is missing'}")
    for key in ("shards", "files"):
        names = fields[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: {key}: must be a list of file names")
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: {key}: names a file twice")
    if not isinstance(fields["metadata"], dict):
        raise ValueError(f"{path}: metadata: must be an object")
    return fields
