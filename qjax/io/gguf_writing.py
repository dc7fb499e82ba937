"""GGUF files, written: the layout that `qjax.io.gguf` reads, in version 3."""

from __future__ import annotations

import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from qjax.io.ggml_types import GGML_TYPES, GGMLType
from qjax.io.gguf import ARRAY, KINDS, MAGIC, MAX_DIMS, MAX_NAME, align, alignment_of
from qjax.io.replacing import replacing

_IDS = {kind.name: i for i, kind in KINDS.items()}
_TYPE_IDS = {kind: i for i, kind in GGML_TYPES.items()}


class Tensor(NamedTuple):
    """What is written: `shape` in numpy order; `make` gives its bytes when their turn has come."""

    type: GGMLType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    kinds: Mapping[str, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes a GGUF file atomically: a reader sees the old file or the whole new one.

    The data goes to a temporary file in the same folder, is synced and then renamed. Tensors are
    made one after the other.

    Args:
      path: the file; one that exists is replaced.
      metadata, kinds: as `qjax.io.gguf.GGUF` has them: the value of each key, and its type.
      tensors: name to tensor, in the order of the file.

    Raises:
      ValueError: a key or tensor is none that GGUF has a place for, or `make` gave other bytes than
        type and shape say; the message names the file and the field.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile
      >>> from qjax.io import gguf
      >>> numbers = Tensor(GGML_TYPES[0], (3,), lambda: np.arange(3, dtype="<f4"))
      >>> path = tempfile.mkdtemp() + "/numbers.gguf"
      >>> write(path, {"answer": 42}, {"answer": "u32"}, {"numbers": numbers})
      >>> gguf.read(path).array("numbers")
      array([0., 1., 2.], dtype=float32)
    """
    target = pathlib.Path(path)
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        if not key or key not in kinds:
            _fail(target, f"key {key!r}", "has no type" if key else "is empty")
        try:
            head += _string(key) + _value(kinds[key], value)
        except (AttributeError, OverflowError, TypeError, ValueError, struct.error) as error:
            found = f"{value!r:.80} is no {kinds[key]}"
            _fail(target, f"key {key!r}", f"{found}: {error}")
    alignment = alignment_of(metadata, kinds, str(target))
    offset = 0
    for name, tensor in tensors.items():
        _check(target, name, tensor)
        dims = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", _TYPE_IDS[tensor.type], offset)
        offset = align(offset + tensor.nbytes, alignment)

    with replacing(target) as file:
        file.write(head + bytes(align(len(head), alignment) - len(head)))
        for name, tensor in tensors.items():
            data = np.ascontiguousarray(tensor.make())
            if data.nbytes != tensor.nbytes:
                _fail(
                    target,
                    f"tensor {name!r}",
                    f"{data.nbytes} bytes were made, {tensor.type.name} {tensor.shape} takes "
                    f"{tensor.nbytes}",
                )
            file.write(data.reshape(-1).view(np.uint8).data)
            file.write(bytes(align(data.nbytes, alignment) - data.nbytes))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: str, value: Any) -> bytes:
    if kind.startswith("array[") and kind.endswith("]"):
        return struct.pack("<I", ARRAY) + _array(kind[len("array[") : -1], value)
    head = struct.pack("<I", _id(kind))
    if kind == "string":
        return head + _string(value)
    if kind == "bool":
        if not isinstance(value, bool | np.bool_):
            raise ValueError("a bool is True or False")
        return head + struct.pack("<?", value)
    return head + struct.pack(_layout(kind), value)


def _array(element: str, values: Any) -> bytes:
    head = struct.pack("<IQ", _id(element), len(values))
    if element == "string":
        return head + b"".join(map(_string, values))
    array = np.asarray(values)
    exact = array.astype(np.bool_ if element == "bool" else _layout(element))
    if array.ndim != 1 or (exact.dtype.kind != "f" and (exact != array).any()):
        raise ValueError(f"not all elements are {element}")
    return head + exact.tobytes()


def _id(kind: str) -> int:
    if kind not in _IDS:
        raise ValueError(f"GGUF has the types {', '.join(_IDS)}")
    return _IDS[kind]


def _layout(kind: str) -> str:
    layout = KINDS[_IDS[kind]].layout
    if layout is None:  # of an array
        raise ValueError(
            "an array says the type of its elements, as in array[u32], and none is one"
        )
    return layout


def _check(target: pathlib.Path, name: str, tensor: Tensor) -> None:
    field = f"tensor {name!r}"
    if not 1 <= len(name.encode()) <= MAX_NAME:
        _fail(target, field, f"a name takes 1 to {MAX_NAME} bytes")
    if not 1 <= len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
        needed = f"must have 1 to {MAX_DIMS} axes, none empty"
        _fail(target, field, f"has shape {tensor.shape}, {needed}")
    if tensor.shape[-1] % tensor.type.elements:
        _fail(
            target,
            field,
            f"has rows of {tensor.shape[-1]}, {tensor.type.name} needs a multiple of "
            f"{tensor.type.elements}",
        )


def _fail(target: pathlib.Path, field: str, message: str) -> NoReturn:
    raise ValueError(f"{target}: {field}: {message}")
