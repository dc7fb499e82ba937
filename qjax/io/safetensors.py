"""safetensors files and folders of shards, read through memory maps; and a writer.

Layout: u64 header length (little-endian), a JSON header padded with spaces, the data. The header
maps a name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, relative to the data, and
``__metadata__`` to strings.

The readers return views of the files, so that reading costs no memory; nothing in a header is
believed before it was checked, and a file that lies gives a ``ValueError`` naming file and field.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from qjax.io.replacing import replacing
from qjax.io.strict_json import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The dtypes of a header. Sub-byte types have no numpy view and are refused: pack them into U8.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_METADATA = "__metadata__"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads one safetensors file: ``(tensors, metadata)``.

    The tensors are read-only views of the memory-mapped file; BF16 and FP8 come as ml_dtypes.

    Raises:
      ValueError: the file is no safetensors file, or a field of its header cannot be true.
      OSError: the file cannot be opened.
    """
    name = os.fspath(path)
    size = os.path.getsize(name)
    if size < 8:
        _fail(name, "header length", f"the file has {size} bytes, the length alone takes 8")
    data = np.asarray(np.memmap(name, np.uint8, "r"))
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > min(size - 8, _MAX_HEADER):
        limit = f"of at most {_MAX_HEADER} bytes, the file has {size}"
        _fail(name, "header length", f"is {length}, a header fits the file and is {limit}")
    header = read_object(data[8 : 8 + length].tobytes(), f"{name}: header")
    metadata = header.pop(_METADATA, {})
    _check_metadata(name, metadata)
    body = data[8 + length :]
    spans = {key: _check_tensor(name, key, entry, len(body)) for key, entry in header.items()}
    _check_layout(name, spans, len(body))
    tensors = {
        key: body[begin:end].view(dtype).reshape(shape)
        for key, (dtype, shape, begin, end) in spans.items()
    }
    return tensors, metadata


def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the weights of a Hugging Face folder: one file, or the shards that an index names.

    Shards are plain files of the folder itself: names with a directory part, and links that lead
    out of the folder, are refused. Each tensor lies in exactly the shard that the index names.

    Returns:
      ``(tensors, metadata)`` as `read` does; the metadata of shards is merged in index order.
    """
    folder = pathlib.Path(path)
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        _fail(str(folder), "weights", f"both {SINGLE} and {INDEX} exist; remove the stale one")
    if not index.exists():
        return read(inside(folder, SINGLE, "weights"))
    weight_map = _read_index(inside(folder, INDEX, "index"))
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(weight_map.values()):
        found, shard_metadata = read(inside(folder, shard, f"shard {shard!r} of {INDEX}"))
        _check_shard(str(index), shard, found, weight_map)
        tensors.update(found)
        metadata.update(shard_metadata)
    return {name: tensors[name] for name in weight_map}, metadata


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file atomically: a reader sees the old file or the whole new one.

    The data goes to a temporary file in the same folder, is synced and then renamed. Tensors are
    ordered by item size, largest first, so that each is aligned in the file.

    Raises:
      ValueError: a dtype has no safetensors name (int4 and other sub-byte codes: pack them into
        uint8 first), or a name or metadata is not a string.
    """
    target = pathlib.Path(path)
    metadata = dict(metadata or {})
    _check_metadata(str(target), metadata)
    arrays = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or name == _METADATA:
            _fail(str(target), f"tensor {name!r}", f"a name is a string other than {_METADATA!r}")
        array = np.asarray(value)
        arrays[name] = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if arrays[name].dtype not in _NAMES:
            _fail(
                str(target),
                f"tensor {name!r}",
                f"dtype {array.dtype} has no safetensors name, known are {', '.join(DTYPES)}; "
                "pack codes of less than a byte into uint8",
            )
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    begin = 0
    for name in order:
        array = arrays[name]
        end = begin + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    with replacing(target) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)


def inside(folder: pathlib.Path, name: str, field: str) -> pathlib.Path:
    """Returns the path of a file directly in `folder`; anything that leads elsewhere is refused."""
    if name in ("", ".", "..") or pathlib.PurePosixPath(name).name != name or "\\" in name:
        _fail(str(folder), field, f"{name!r} is not the plain name of a file in the folder")
    path = folder / name
    if not path.exists():
        _fail(str(folder), field, f"the file {name!r} is missing")
    if path.resolve().parent != folder.resolve():
        target = path.resolve()
        _fail(
            str(folder),
            field,
            f"{name!r} is a link out of the folder, to {target}; copy the files into the folder",
        )
    return path


def _fail(path: str, field: str, message: str) -> NoReturn:
    raise ValueError(f"{path}: {field}: {message}")


def _check_metadata(path: str, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()
    ):
        _fail(path, _METADATA, "must map strings to strings")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_tensor(
    path: str, name: str, entry: Any, body: int
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Validates one entry of the header: ``(dtype, shape, begin, end)``."""
    field = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fail(path, field, "must have exactly the keys dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fail(path, f"{field} dtype", f"is {dtype!r}, known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_size, shape)):
        _fail(path, f"{field} shape", f"is {_short(shape)}, must be at most 32 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _fail(path, f"{field} data_offsets", f"is {_short(offsets)}, must be [begin, end]")
    begin, end = offsets
    if not begin <= end <= body:
        _fail(path, f"{field} data_offsets", f"are {offsets}, the data has {body} bytes")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != end - begin:
        _fail(
            path,
            f"{field} data_offsets",
            f"are {offsets}: {end - begin} bytes, but {dtype} {shape} takes {needed}",
        )
    return DTYPES[dtype], tuple(shape), begin, end


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_layout(path: str, spans: dict[str, tuple], body: int) -> None:
    """The tensors fill the data without gap or overlap."""
    position = 0
    for name, (_, _, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position:
            what = "overlap the tensor before" if begin < position else "leave a gap"
            _fail(
                path,
                f"tensor {name!r} data_offsets",
                f"{what}: begin at {begin}, must at {position}",
            )
        position = end
    if position != body:
        _fail(path, "data", f"has {body} bytes, the tensors take {position}")


def _read_index(path: pathlib.Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_HEADER:
        _fail(
            str(path), "index", f"has {path.stat().st_size} bytes, at most {_MAX_HEADER} are read"
        )
    index = read_object(path.read_bytes(), f"{path}: index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(str(path), "weight_map", "must map tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            _fail(str(path), f"weight_map[{name!r}]", f"is {_short(shard)}, must be a file name")
    return weight_map


def _check_shard(
    index: str, shard: str, found: Mapping[str, Any], weight_map: Mapping[str, str]
) -> None:
    promised = {name for name, file in weight_map.items() if file == shard}
    for name in sorted(promised - set(found)):
        _fail(index, f"weight_map[{name!r}]", f"the tensor is not in its shard {shard!r}")
    for name in sorted(set(found) - promised):
        where = weight_map.get(name, "no shard")
        _fail(index, f"weight_map[{name!r}]", f"names {where!r}, the tensor is also in {shard!r}")
