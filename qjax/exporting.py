"""`jax.export`: how quantized weights among the arguments of a function are written down."""

import json
from typing import Any

import ml_dtypes
import numpy as np
from jax import export

from qjax.formats import FORMATS
from qjax.prepared import Prepared, Weight
from qjax.qtensor import Activation, QTensor
from qjax.spec import Spec

_TUPLES: dict[str, Any] = {"spec": Spec, "weight": Weight}


def _plain(value: Any) -> Any:
    """Static fields as JSON."""
    for name, kind in _TUPLES.items():
        if isinstance(value, kind):
            return {name: [_plain(v) for v in value]}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    return value


def _static(value: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return tuple(_static(v) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in _TUPLES:
        return _TUPLES[kind](*map(_static, content))
    return np.dtype(getattr(ml_dtypes, content, content))


def _to_bytes(fields: tuple[Any, ...]) -> bytes:
    return json.dumps(_plain(fields)).encode()


def _from_bytes(data: bytes | bytearray) -> tuple[Any, ...]:
    return _static(json.loads(bytes(data)))


def _qtensor_to_bytes(fields: tuple[Any, ...]) -> bytes:
    storage = FORMATS[fields[0]].storage
    if {"int2", "uint2"} & {storage, *storage}:
        raise ValueError(
            f"jax.export cannot serialize the 2-bit codes of {fields[0]} (of a weight or its "
            "scales): export the function of qjax.prepare(qparams), whose arrays are bytes"
        )
    return _to_bytes(fields)


def register() -> None:
    """Tells `jax.export` of the types in this module; once per process."""
    writers = {QTensor: _qtensor_to_bytes, Activation: _to_bytes, Prepared: _to_bytes}
    for kind, to_bytes in writers.items():
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"qjax.{kind.__name__}",
            serialize_auxdata=to_bytes,
            deserialize_auxdata=_from_bytes,
        )


register()
