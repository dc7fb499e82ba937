"""GGUF files: metadata, tensor infos and raw bytes, read through a memory map.

Layout (little-endian, versions 2 and 3): magic ``GGUF``, u32 version, u64 tensor count, u64 key
count, the key-value pairs, the tensor infos, padding to ``general.alignment``, the data. Tensors
lie one after the other in the order of their infos, each padded to the alignment.

Nothing in a header is believed before it was checked against the size of the file: a file that
lies gives a ``ValueError`` that names file and field, without an allocation of what it claims.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from qjax.io.ggml_types import GGML_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_DIMS = 4
MAX_NAME = 63  # ggml keeps 64 bytes for a name, the closing NUL included
_MAX_KEYS = 1 << 16  # a real file has some tens
_MAX_TENSORS = 1 << 18  # a real file has some thousands
_MAX_STRINGS = 1 << 22  # elements of one string array; the largest vocabularies have 2**18
_MAX_HEADER = 1 << 26  # bytes before the data; a vocabulary with its merges takes some 2**23
_MAX_ELEMENTS = (1 << 63) - 1


# The types whose bytes are plain numbers.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


class Kind(NamedTuple):
    """A key-value type; `layout` is the struct code of a number, None for bool, string, array."""

    name: str
    size: int  # the least number of bytes that a value takes
    layout: str | None


BOOL, STRING, ARRAY = 7, 8, 9
KINDS: dict[int, Kind] = {
    0: Kind("u8", 1, "<B"),
    1: Kind("i8", 1, "<b"),
    2: Kind("u16", 2, "<H"),
    3: Kind("i16", 2, "<h"),
    4: Kind("u32", 4, "<I"),
    5: Kind("i32", 4, "<i"),
    6: Kind("f32", 4, "<f"),
    BOOL: Kind("bool", 1, None),
    STRING: Kind("string", 8, None),
    ARRAY: Kind("array", 12, None),
    10: Kind("u64", 8, "<Q"),
    11: Kind("i64", 8, "<q"),
    12: Kind("f64", 8, "<d"),
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: `shape` in numpy order (rows last but one), `offset` into the file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open GGUF file.

    Attributes:
      path: the file.
      version: 2 or 3.
      alignment: of the data section and of each tensor, in bytes.
      metadata: key to bool, int, float, str, numpy array (numbers and bools) or list of str.
      kinds: key to the type in the file: ``"u32"``, ``"string"``, ``"array[f32]"``, ...
      tensors: name to `TensorInfo`, in file order.
    """

    path: str
    version: int
    alignment: int
    metadata: dict[str, Any] = dataclasses.field(repr=False)
    kinds: dict[str, str] = dataclasses.field(repr=False)
    tensors: dict[str, TensorInfo] = dataclasses.field(repr=False)
    data: np.ndarray = dataclasses.field(repr=False)

    def raw(self, name: str) -> np.ndarray:
        """Returns the bytes of a tensor, uint8 [rows, bytes per row]: a read-only view of the file.

        The rows are those of the last axis; the leading axes are flattened.
        """
        info = self._info(name)
        row_bytes = info.type.row_bytes(info.shape[-1])
        return self.data[info.offset : info.offset + info.nbytes].reshape(-1, row_bytes)

    def array(self, name: str) -> np.ndarray:
        """Returns a tensor of plain numbers (F32, F16, BF16, F64, I8 to I64): a read-only view."""
        info = self._info(name)
        if info.type.name not in DTYPES:
            raise ValueError(
                f"{self.path}: tensor {name!r} has the block type {info.type.name}; array() reads "
                f"{', '.join(DTYPES)}. Decode the bytes of raw({name!r}) instead."
            )
        return self.raw(name).view(DTYPES[info.type.name]).reshape(info.shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]


def read(path: str | os.PathLike[str]) -> GGUF:
    """Reads the header of a GGUF file and maps its data.

    Raises:
      ValueError: the file is no GGUF of version 2 or 3, or a field of it cannot be true.
      OSError: the file cannot be opened.

    Example::

      file = gguf.read("model.gguf")
      file.metadata["general.architecture"]
      file.raw("blk.0.attn_q.weight")
    """
    name = os.fspath(path)
    if os.path.getsize(name) < 24:
        _fail(name, "header", f"the file has {os.path.getsize(name)} bytes, a header takes 24")
    data = np.asarray(np.memmap(name, np.uint8, "r"))
    cursor = _Cursor(name, data[:_MAX_HEADER].data)
    version = _read_version(cursor)
    n_tensors = cursor.number("<Q", "tensor count")
    n_keys = cursor.number("<Q", "key count")
    _check_count(cursor, "key count", n_keys, least=13, limit=_MAX_KEYS)
    _check_count(cursor, "tensor count", n_tensors, least=24, limit=_MAX_TENSORS)

    metadata: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    for i in range(n_keys):
        key = cursor.string(f"name of key {i}")
        if not key:
            cursor.fail(f"name of key {i}", "is empty")
        if key in metadata:
            cursor.fail(f"key {key!r}", "appears twice")
        kinds[key], metadata[key] = _read_value(cursor, f"key {key!r}")

    alignment = alignment_of(metadata, kinds, name)
    infos = [_read_info(cursor, i) for i in range(n_tensors)]
    start = align(cursor.position, alignment)
    tensors = _place(name, infos, start, alignment, len(data))
    return GGUF(name, version, alignment, metadata, kinds, tensors, data)


class _Cursor:
    """A position in the header's bytes; every read is checked against their end."""

    def __init__(self, path: str, data: memoryview):
        self.path, self.data, self.position = path, data, 0

    def fail(self, field: str, message: str) -> NoReturn:
        _fail(self.path, field, message)

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def number(self, layout: str, field: str) -> Any:
        size = struct.calcsize(layout)
        if size > self.left:
            self.fail(field, f"needs {size} bytes at {self.position}, {self.left} are left")
        (value,) = struct.unpack_from(layout, self.data, self.position)
        self.position += size
        return value

    def take(self, size: int, field: str) -> memoryview:
        if size > self.left:
            self.fail(field, f"claims {size} bytes at {self.position}, {self.left} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def string(self, field: str) -> str:
        raw = self.take(self.number("<Q", f"length of {field}"), field)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            self.fail(field, f"is not UTF-8 ({error.reason} at byte {error.start})")


def _fail(path: str, field: str, message: str) -> NoReturn:
    raise ValueError(f"{path}: {field}: {message}")


def alignment_of(metadata: Mapping[str, Any], kinds: Mapping[str, str], path: str) -> int:
    """What metadata say of the alignment of data, checked."""
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    kind = kinds.get("general.alignment", "u32")
    if kind != "u32" or alignment < 1 or alignment & (alignment - 1):
        found = f"{alignment!r} ({kind})"
        _fail(path, "key 'general.alignment'", f"is {found}, must be a u32 power of two")
    return alignment


def align(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return (position + alignment - 1) // alignment * alignment


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.take(4, "magic"))
    if magic != MAGIC:
        cursor.fail("magic", f"is {magic!r}, a GGUF file starts with {MAGIC!r}")
    version = cursor.number("<I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            cursor.fail(
                "version", "is byte-swapped: a big-endian file; convert it to little-endian"
            )
        cursor.fail("version", f"is {version}; versions 2 and 3 are read, convert the model again")
    return version


def _check_count(cursor: _Cursor, field: str, count: int, least: int, limit: int) -> None:
    if count > limit:
        cursor.fail(field, f"is {count}, more than the {limit} that are accepted")
    if count * least > cursor.left:
        cursor.fail(field, f"is {count}, but only {cursor.left} bytes follow")


def _read_value(cursor: _Cursor, field: str) -> tuple[str, Any]:
    kind_id = cursor.number("<I", f"type of {field}")
    if kind_id == ARRAY:
        return _read_array(cursor, field)
    kind = _kind(cursor, field, kind_id)
    if kind_id == STRING:
        return kind.name, cursor.string(field)
    if kind_id == BOOL:
        value = cursor.number("<B", field)
        if value > 1:
            cursor.fail(field, f"is a bool of value {value}, must be 0 or 1")
        return kind.name, bool(value)
    assert kind.layout is not None
    return kind.name, cursor.number(kind.layout, field)


def _read_array(cursor: _Cursor, field: str) -> tuple[str, Any]:
    kind_id = cursor.number("<I", f"element type of {field}")
    if kind_id == ARRAY:
        cursor.fail(field, "is an array of arrays, which GGUF readers do not accept")
    kind = _kind(cursor, field, kind_id)
    count = cursor.number("<Q", f"length of {field}")
    limit = _MAX_STRINGS if kind_id == STRING else _MAX_HEADER
    _check_count(cursor, f"length of {field}", count, least=kind.size, limit=limit)
    name = f"array[{kind.name}]"
    if kind_id == STRING:
        return name, _read_strings(cursor, field, count)
    raw = cursor.take(count * kind.size, field)
    if kind_id == BOOL:
        flags = np.frombuffer(raw, np.uint8)
        if count and flags.max() > 1:
            cursor.fail(field, f"holds a bool of value {flags.max()}, must be 0 or 1")
        return name, flags.astype(np.bool_)
    assert kind.layout is not None
    return name, np.frombuffer(raw, np.dtype(kind.layout))


def _read_strings(cursor: _Cursor, field: str, count: int) -> list[str]:
    """A string array: the one loop that runs over a vocabulary, so it is written for speed."""
    data, position, end = cursor.data, cursor.position, len(cursor.data)
    unpack_length = struct.Struct("<Q").unpack_from
    values = []
    for i in range(count):
        if end - position < 8:
            cursor.fail(f"element {i} of {field}", f"the file ends within its length, at {end}")
        (size,) = unpack_length(data, position)
        position += 8
        if size > end - position:
            cursor.fail(
                f"element {i} of {field}", f"claims {size} bytes, {end - position} are left"
            )
        try:
            values.append(str(data[position : position + size], "utf-8"))
        except UnicodeDecodeError as error:
            cursor.fail(f"element {i} of {field}", f"is not UTF-8 ({error.reason})")
        position += size
    cursor.position = position
    return values


def _kind(cursor: _Cursor, field: str, kind_id: int) -> Kind:
    if kind_id not in KINDS:
        known = ", ".join(f"{i} {kind.name}" for i, kind in KINDS.items())
        cursor.fail(f"type of {field}", f"is {kind_id}, known are {known}")
    return KINDS[kind_id]


def _read_info(cursor: _Cursor, i: int) -> TensorInfo:
    """One tensor info, its offset still relative to the data section."""
    length = cursor.number("<Q", f"length of the name of tensor {i}")
    if not 1 <= length <= MAX_NAME:
        cursor.fail(f"length of the name of tensor {i}", f"is {length}, must be 1 to {MAX_NAME}")
    cursor.position -= 8
    name = cursor.string(f"name of tensor {i}")
    field = f"tensor {name!r}"
    n_dims = cursor.number("<I", f"{field} n_dims")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"{field} n_dims", f"is {n_dims}, must be 1 to {MAX_DIMS}")
    dims = [cursor.number("<Q", f"{field} dims[{d}]") for d in range(n_dims)]
    elements = math.prod(dims)
    if not 1 <= elements <= _MAX_ELEMENTS:
        cursor.fail(f"{field} dims", f"are {dims}: the number of elements must be 1 to 2**63 - 1")
    type_id = cursor.number("<I", f"{field} type")
    if type_id not in GGML_TYPES:
        known = ", ".join(f"{i} {kind.name}" for i, kind in GGML_TYPES.items())
        cursor.fail(f"{field} type", f"is {type_id}, known are {known}")
    kind = GGML_TYPES[type_id]
    if dims[0] % kind.elements:
        cursor.fail(
            f"{field} dims[0]", f"is {dims[0]}, {kind.name} needs a multiple of {kind.elements}"
        )
    offset = cursor.number("<Q", f"{field} offset")
    return TensorInfo(
        name, kind, tuple(reversed(dims)), offset, elements // kind.elements * kind.bytes
    )


def _place(
    path: str, infos: list[TensorInfo], start: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """Checks that the tensors fill the data section one after the other; makes offsets absolute."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for info in infos:
        field = f"tensor {info.name!r}"
        if info.name in tensors:
            _fail(path, field, "appears twice")
        if info.offset != expected:
            _fail(
                path,
                f"{field} offset",
                f"is {info.offset}, must be {expected}: tensors follow each other, "
                f"padded to {alignment} bytes",
            )
        if start + info.offset + info.nbytes > size:
            _fail(
                path,
                f"{field} offset",
                f"its {info.nbytes} bytes at {start + info.offset} end after the file's {size}",
            )
        tensors[info.name] = info._replace(offset=start + info.offset)
        expected = align(info.offset + info.nbytes, alignment)
    return tensors
