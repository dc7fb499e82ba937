"""``qjax inspect``: what is in a file or folder, without loading it."""

from __future__ import annotations

import argparse
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from qjax.cli.common import Output, mebibytes, printable, table
from qjax.io import folder, gguf, safetensors
from qjax.reporting import report

_LONG = 16  # a longer list in the metadata is shown by its length


class _Tensor(NamedTuple):
    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / max(self.size, 1)


def run(args: argparse.Namespace) -> Output:
    """Reads `args.path` as what it turns out to be."""
    kind, metadata, tensors = _read(pathlib.Path(args.path))
    metadata = {key: _short(value) for key, value in metadata.items()}
    size, nbytes = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)
    data = {
        "path": args.path,
        "kind": kind,
        "metadata": metadata,
        "parameters": size,
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(size, 1),
        "types": {name: _total(group) for name, group in _by_type(tensors).items()},
        "tensors": [
            {
                "name": t.name,
                "type": t.type,
                "shape": list(t.shape),
                "bits_per_weight": t.bits,
                "bytes": t.nbytes,
            }
            for t in tensors
        ],
    }

    def show(console: Console) -> None:
        console.print(f"{printable(args.path)}: {kind}", markup=False)
        if metadata:
            console.print()
            console.print(table(("key", "value"), metadata.items()))
        console.print()
        console.print(
            table(
                ("tensor", "type", "shape", "bits/weight", "MiB"),
                (
                    (t.name, t.type, _shape(t.shape), f"{t.bits:.3f}", mebibytes(t.nbytes))
                    for t in tensors
                ),
                right=("bits/weight", "MiB"),
            )
        )
        console.print()
        rows = [
            (name, len(group), f"{sum(t.size for t in group):,}", *_sizes(group))
            for name, group in _by_type(tensors).items()
        ]
        rows.append(("total", len(tensors), f"{size:,}", *_sizes(tensors)))
        columns = ("type", "tensors", "parameters", "bits/weight", "MiB")
        console.print(table(columns, rows, right=columns[1:]))

    return Output(data, show)


def _read(path: pathlib.Path) -> tuple[str, dict[str, Any], list[_Tensor]]:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if folder.is_folder(path):
        return _qjax(path)
    if path.is_dir():
        tensors, metadata = safetensors.read_folder(path)
        return "Hugging Face folder", dict(metadata), _arrays(tensors)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == gguf.MAGIC:
        file = gguf.read(path)
        found = [_Tensor(t.name, t.type.name, t.shape, t.nbytes) for t in file.tensors.values()]
        return f"GGUF version {file.version}", dict(file.metadata), found
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: is no GGUF file (it begins with {magic!r}), and its name does not end in "
            ".safetensors"
        )
    tensors, metadata = safetensors.read(path)
    return "safetensors", dict(metadata), _arrays(tensors)


def _qjax(path: pathlib.Path) -> tuple[str, dict[str, Any], list[_Tensor]]:
    found = folder.read_folder(path)
    rows = report(found.params).rows
    metadata = {
        f"{key}.{name}" if isinstance(value, dict) else key: item
        for key, value in found.metadata.items()
        for name, item in (value.items() if isinstance(value, dict) else [("", value)])
    }
    return "qjax folder", metadata, [_Tensor(r.path, r.format, r.shape, r.nbytes) for r in rows]


def _arrays(tensors: dict[str, np.ndarray]) -> list[_Tensor]:
    names = {dtype: name for name, dtype in safetensors.DTYPES.items()}
    return [_Tensor(k, names[v.dtype], tuple(v.shape), v.nbytes) for k, v in tensors.items()]


def _by_type(tensors: list[_Tensor]) -> dict[str, list[_Tensor]]:
    groups: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, []).append(tensor)
    return groups


def _total(tensors: list[_Tensor]) -> dict[str, Any]:
    size, nbytes = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)
    bits = 8 * nbytes / max(size, 1)
    return {"tensors": len(tensors), "parameters": size, "bytes": nbytes, "bits_per_weight": bits}


def _sizes(tensors: list[_Tensor]) -> tuple[str, str]:
    total = _total(tensors)
    return f"{total['bits_per_weight']:.3f}", mebibytes(total["bytes"])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: Any) -> Any:
    """A metadata value as JSON; long lists by their length alone."""
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) > _LONG:
            return f"{len(value)} values"
        return value.tolist() if isinstance(value, np.ndarray) else list(value)
    return value
