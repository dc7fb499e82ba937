"""Calibration statistics on disk: a folder of qjax's, each Stats that weights share held once.

The tree of the folder is ``{number: {field: array}}``; its metadata is ``{"kind": "stats", "paths":
{path: number}}``, with the number of the Stats that each parameter has.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from qjax.algorithms.base import Stats
from qjax.io.folder import MANIFEST, read_folder, write_folder

_FIELDS = [f.name for f in dataclasses.fields(Stats)]
_ENDS = {"hessian": 2, "samples": 2, "count": 0}  # axes after the leading ones; others have one


def save_stats(
    path: str | os.PathLike[str], stats: Mapping[str, Stats], *, overwrite: bool = False
) -> None:
    """Writes what `qjax.calibrate` collected into a new folder, atomically.

    Weights that share one Stats object share it in the folder, and again when it is loaded.

    Args:
      path: the folder; its parent exists.
      stats: by path, of concrete arrays.
      overwrite: whether to replace a folder that qjax wrote.

    Raises:
      ValueError: if `path` exists and may not be replaced, or a Stats is not well formed: a field
        is no float32 array, or their shapes do not belong together.
      OSError: if it cannot be written.

    Example:
      >>> import tempfile
      >>> one = qjax.Stats(max_abs=jnp.array([1.0, 5.0]), count=jnp.array(2.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_stats(folder + "/stats", {"q": one, "k": one})
      ...     found = load_stats(folder + "/stats")
      >>> found["q"].max_abs.tolist(), found["q"] is found["k"]
      ([1.0, 5.0], True)
    """
    numbers: dict[int, int] = {}
    tree: dict[int, dict[str, Any]] = {}
    paths: dict[str, int] = {}
    for name, held in stats.items():
        number = numbers.setdefault(id(held), len(numbers))
        paths[name] = number
        if number not in tree:
            leaves = {f: v for f in _FIELDS if (v := getattr(held, f)) is not None}
            _check(leaves, os.fspath(path), name)
            tree[number] = leaves
    metadata = {"kind": "stats", "paths": paths}
    write_folder(path, tree, metadata=metadata, overwrite=overwrite)


def load_stats(path: str | os.PathLike[str]) -> dict[str, Stats]:
    """Reads a folder that `save_stats` wrote: Stats by path, for `quantize_params`.

    Raises:
      ValueError: naming file and field, if it is no such folder, or something of it is missing,
        left over or not well formed.
    """
    found = read_folder(path)
    where = os.path.join(os.fspath(path), MANIFEST)
    if found.metadata.get("kind") != "stats":
        _fail(where, "metadata", "kind must be 'stats'; save_stats did not write this folder")
    paths = found.metadata.get("paths")
    if not isinstance(paths, dict) or found.metadata.keys() != {"kind", "paths"}:
        _fail(where, "metadata", "must have kind and paths, an object, and nothing else")
    if not isinstance(found.params, dict) or found.files:
        _fail(where, "parameters", "must be one dictionary of arrays for each Stats")
    made: dict[Any, Stats] = {}
    for number, leaves in found.params.items():
        if not isinstance(leaves, dict):
            _fail(where, f"parameters {number}", "must be a dictionary of arrays")
        _check(leaves, where, f"parameters {number}")
        made[number] = Stats(**leaves)
    for name, number in paths.items():
        if isinstance(number, bool) or not isinstance(number, int) or number not in made:
            _fail(where, f"metadata paths {name}", f"{str(number)[:80]} is no Stats of the folder")
    unused = made.keys() - set(paths.values())
    if unused:
        _fail(where, f"parameters {min(unused, key=str)}", "belongs to no path")
    return {name: made[number] for name, number in paths.items()}


def _check(leaves: Mapping[str, Any], where: str, name: str) -> None:
    """Raises ValueError unless the fields are those of one Stats."""
    odd = [f for f in leaves if f not in _FIELDS]
    if odd:
        _fail(where, name, f"has {odd[0]!r}; Stats have {', '.join(_FIELDS)}")
    if "count" not in leaves:
        _fail(where, name, "has no count; Stats from calibrate have one")
    lead: tuple[int, ...] | None = None
    size: int | None = None
    for field, leaf in leaves.items():
        if not isinstance(leaf, (jax.Array, np.ndarray)) or leaf.dtype != np.float32:
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            _fail(where, name, f"{field} is {kind}; it must be a float32 array")
        ends = _ENDS.get(field, 1)
        front = leaf.shape[: leaf.ndim - ends]
        back = leaf.shape[leaf.ndim - ends :]
        lead = front if lead is None else lead
        size = back[-1] if back and size is None else size
        if leaf.ndim < ends or front != lead or (back and back[-1] != size):
            _fail(where, name, f"{field} of shape {leaf.shape} does not fit the fields before it")
        if field == "hessian" and back[0] != back[1]:
            _fail(where, name, f"the hessian of shape {leaf.shape} is not square")


def _fail(where: str, field: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {field}: {message}")
