"""The JSON that tells how the tensors of files make up a tree of arrays and QTensors.

An array is ``{"tensor": name, "dtype": ..., "shape": [...]}``; a QTensor is ``{"qtensor": format,
"block", "dtype", "param_shape", "activation", "qvalue": [array, ...], "scale", "zero_point",
"offset"}``, whose scale and offset are arrays or QTensors in turn, and whose activation is null or
has the fields of `Activation`, its leaves arrays or null. A tree is a list of those, each with its
``"path"``, a list of dictionary keys; ``{"path": [...], "empty": true}`` is an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activation import LEAVES as ACTIVATION_LEAVES
from qjax.activation import Activation
from qjax.formats import FORMATS
from qjax.io import packing, safetensors
from qjax.qtensor import QTensor, Quantized, check
from qjax.rounding import SCALE_METHODS
from qjax.spec import Spec

# By name, the dtypes that an array may have: those of a safetensors header, and the packed ones.
DTYPES: dict[str, np.dtype] = {
    dtype.name: dtype for dtype in (*safetensors.DTYPES.values(), *packing.BITS)
}
VERSION = 2  # of what is described here
_MAX_DEPTH = 8  # of scales that are QTensors; formats in use have two


def check_version(fields: Any, where: str, again: str) -> dict[str, Any]:
    """The fields of what qjax wrote; `again` is how to have it in this version."""
    if not isinstance(fields, dict) or fields.get("format") != "qjax":
        raise ValueError(f"{where}: format: must be 'qjax'; qjax did not write this")
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"{where}: version: is {str(version)[:80]}, this version of qjax reads {VERSION}; "
            f"update qjax or {again}"
        )
    return fields


class Described(NamedTuple):
    """A tree as JSON, and the arrays that it names."""

    entries: list[dict[str, Any]]
    arrays: dict[str, Any]


def describe(tree: Any) -> Described:
    """Describes a tree of dictionaries that holds arrays and QTensors.

    Args:
      tree: nested mappings with keys of type str or int; or one array or QTensor.

    Raises:
      ValueError: naming the path, if something else is in the tree, a leaf of a QTensor disagrees
        with its format, or two arrays would get the same name.
    """
    arrays: dict[str, Any] = {}

    def array(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
            raise ValueError(
                f"{name}: holds a {type(value).__name__}; a saved tree holds arrays and QTensors "
                "in dictionaries (flax.nnx: save nnx.to_pure_dict(state))"
            )
        dtype = DTYPES.get(str(value.dtype))
        if dtype is None:
            known = ", ".join(DTYPES)
            raise ValueError(f"{name}: dtype {value.dtype} cannot be saved, known are {known}")
        if name in arrays:
            raise ValueError(f"{name}: two arrays of the tree have this name; rename a parameter")
        arrays[name] = value
        return {"tensor": name, "dtype": dtype.name, "shape": list(value.shape)}

    def node(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, QTensor):
            if isinstance(value, Quantized):
                raise ValueError(
                    f"{name}: {value!r} is in a kernel's order; qjax.unprepare it first"
                )
            return array(value, name)
        check(value, name)
        planes = value.qvalue if isinstance(value.qvalue, tuple) else (value.qvalue,)
        optional = lambda x, suffix: None if x is None else node(x, f"{name}.{suffix}")
        return {
            "qtensor": value.format,
            "block": list(value.block),
            "dtype": np.dtype(value.dtype).name,
            "param_shape": None if value.param_shape is None else list(value.param_shape),
            "activation": activation(value.activation, f"{name}.activation"),
            "qvalue": [array(plane, f"{name}.qvalue.{i}") for i, plane in enumerate(planes)],
            "scale": node(value.scale, f"{name}.scale"),
            "zero_point": optional(value.zero_point, "zero_point"),
            "offset": optional(value.offset, "offset"),
        }

    def activation(act: Activation | None, name: str) -> dict[str, Any] | None:
        if act is None:
            return None
        leaves = {n: getattr(act, n) for n in ACTIVATION_LEAVES}
        return {
            "spec": None if act.spec is None else _spec_json(act.spec),
            "axis": list(act.axis),
            "threshold": act.threshold,
            "budget": act.budget,
            **{n: None if v is None else array(v, f"{name}.{n}") for n, v in leaves.items()},
        }

    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[dict[str, Any]]:
        if not isinstance(value, Mapping):
            yield {"path": list(path), **node(value, "/".join(map(str, path)) or "array")}
        elif not value:
            yield {"path": list(path), "empty": True}
        else:
            for key, child in value.items():
                if not _is_key(key):
                    where = "/".join(map(str, path)) or "the tree"
                    raise ValueError(f"{where}: the key {key!r} is neither a string nor an integer")
                yield from walk(child, (*path, key))

    return Described(list(walk(tree, ())), arrays)


class Holding(NamedTuple):
    """How files hold arrays.

    Attributes:
      form: (shape, dtype) of an array to the (shape, dtype) that a file holds.
      load: (what a file holds, its name, shape, dtype) to the array; ValueError if it cannot be.
    """

    form: Callable[[tuple[int, ...], np.dtype], tuple[tuple[int, ...], np.dtype]]
    load: Callable[[Any, str, tuple[int, ...], np.dtype], Any]


def _flat_form(shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    if dtype not in packing.BITS:
        return shape, dtype
    return (packing.packed_size(shape, dtype),), np.dtype(np.uint8)


def _flat_load(found: np.ndarray, _: str, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    packed = dtype in packing.BITS
    return jnp.array(packing.unpack(found, shape, dtype) if packed else found)


# Sub-byte codes are packed into uint8 [bytes]; the rest is held as it is.
FLAT = Holding(_flat_form, _flat_load)


def restore(entries: Any, tensors: Mapping[str, Any], where: str, holding: Holding = FLAT) -> Any:
    """Builds the tree that `describe` was given; every field is checked before it is used.

    Args:
      entries: the JSON.
      tensors: the arrays as files hold them, each with a shape and a dtype.
      where: the file, for error messages.
      holding: how files hold arrays.

    Raises:
      ValueError: naming file and field, if an entry is malformed, names a tensor that does not
        exist or has another dtype or shape, or a tensor is named twice or by no entry.
    """
    if not isinstance(entries, list):
        _fail(where, "parameters", "must be a list")
    reader = _Reader(tensors, where, holding)
    tree: dict[Any, Any] = {}
    for i, entry in enumerate(entries):
        field = f"parameters[{i}]"
        if not isinstance(entry, dict):
            _fail(where, field, "must be an object")
        path = entry.get("path")
        if not isinstance(path, list) or not all(map(_is_key, path)):
            _fail(
                where, f"{field} path", f"is {_short(path)}, must be a list of strings and integers"
            )
        rest = {key: value for key, value in entry.items() if key != "path"}
        name = "/".join(map(str, path)) or "array"
        value = {} if rest == {"empty": True} else reader.node(rest, name, 0)
        if not path:
            if len(entries) > 1:
                _fail(where, f"{field} path", "is empty, but there are more parameters")
            tree = value
        else:
            _insert(tree, path, value, where, name)
    reader.finish()
    return tree


def _insert(tree: dict[Any, Any], path: list[Any], value: Any, where: str, name: str) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            _fail(where, name, "lies below another parameter")
    if path[-1] in tree:
        _fail(where, name, "appears twice")
    tree[path[-1]] = value


class _Reader:
    """Turns nodes into arrays and QTensors, and keeps account of the tensors."""

    def __init__(self, tensors: Mapping[str, Any], where: str, holding: Holding):
        self.tensors, self.where, self.holding = tensors, where, holding
        self.unused = set(tensors)

    def finish(self) -> None:
        if self.unused:
            _fail(self.where, "parameters", f"do not name the tensor {min(self.unused)!r}")

    def node(self, node: Any, name: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            _fail(self.where, name, f"has scales nested more than {_MAX_DEPTH} deep")
        if not isinstance(node, dict) or "qtensor" not in node:
            return self.array(node, name)
        fields = self.fields(
            node,
            name,
            {
                "qtensor": lambda v: isinstance(v, str) and v in FORMATS,
                "block": lambda v: _is_shape(v) and all(v),
                "dtype": lambda v: isinstance(v, str) and v in DTYPES,
                "param_shape": lambda v: v is None or _is_shape(v),
                "activation": lambda v: v is None or isinstance(v, dict),
                "qvalue": lambda v: isinstance(v, list) and 1 <= len(v) <= 8,
                "scale": lambda v: isinstance(v, dict),
                "zero_point": lambda v: v is None or isinstance(v, dict),
                "offset": lambda v: v is None or isinstance(v, dict),
            },
        )
        planes = [self.array(v, f"{name}.qvalue.{i}") for i, v in enumerate(fields["qvalue"])]
        storage = FORMATS[fields["qtensor"]].storage
        zero, offset, activation = fields["zero_point"], fields["offset"], fields["activation"]
        q = QTensor(
            qvalue=tuple(planes) if isinstance(storage, tuple) else planes[0],
            scale=self.node(fields["scale"], f"{name}.scale", depth + 1),
            zero_point=None if zero is None else self.array(zero, f"{name}.zero_point"),
            offset=None if offset is None else self.node(offset, f"{name}.offset", depth + 1),
            activation=None if activation is None else self.activation(activation, name),
            format=fields["qtensor"],
            block=tuple(fields["block"]),
            dtype=DTYPES[fields["dtype"]],
            param_shape=None if fields["param_shape"] is None else tuple(fields["param_shape"]),
        )
        if isinstance(storage, str) and len(planes) != 1:
            _fail(self.where, f"{name} qvalue", f"has {len(planes)} planes, {q.format} has one")
        try:
            check(q, name)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None
        return q

    def activation(self, node: Any, name: str) -> Activation:
        if isinstance(node, dict):
            node = {"budget": None, **node}  # files written before there were budgets
        fields = self.fields(
            node,
            f"{name} activation",
            {
                "spec": lambda v: v is None or isinstance(v, dict),
                "axis": lambda v: isinstance(v, list) and all(type(a) is int for a in v),
                "threshold": lambda v: v is None or isinstance(v, float),
                "budget": lambda v: v is None or type(v) is int,
                **dict.fromkeys(ACTIVATION_LEAVES, lambda v: v is None or isinstance(v, dict)),
            },
        )
        spec, fields["axis"] = fields["spec"], tuple(fields["axis"])
        fields["spec"] = None if spec is None else self.spec(spec, f"{name} activation", 0)
        for leaf in ACTIVATION_LEAVES:
            if fields[leaf] is not None:
                fields[leaf] = self.array(fields[leaf], f"{name}.activation.{leaf}")
        return Activation(**fields)

    def array(self, node: Any, name: str) -> Any:
        fields = self.fields(
            node,
            name,
            {
                "tensor": lambda v: isinstance(v, str),
                "dtype": lambda v: isinstance(v, str) and v in DTYPES,
                "shape": _is_shape,
            },
        )
        tensor, dtype, shape = fields["tensor"], DTYPES[fields["dtype"]], tuple(fields["shape"])
        if tensor not in self.tensors:
            _fail(self.where, f"{name} tensor", f"{tensor!r} is in no shard")
        if tensor not in self.unused:
            _fail(self.where, f"{name} tensor", f"{tensor!r} is named a second time")
        self.unused.remove(tensor)
        found = self.tensors[tensor]
        held_shape, held_dtype = self.holding.form(shape, dtype)
        if (found.dtype, tuple(found.shape)) != (held_dtype, held_shape):
            _fail(
                self.where,
                f"{name} shape",
                f"is {dtype} {shape}, held as {held_dtype} {held_shape}, but the tensor {tensor!r} "
                f"is {found.dtype} {tuple(found.shape)}",
            )
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            _fail(self.where, name, f"is {dtype}; set the JAX option jax_enable_x64 to load it")
        try:
            return self.holding.load(found, tensor, shape, dtype)
        except ValueError as error:
            _fail(self.where, name, str(error))

    def spec(self, node: Any, name: str, depth: int) -> Spec:
        if depth > _MAX_DEPTH:
            _fail(self.where, name, f"is nested more than {_MAX_DEPTH} deep")
        fields = self.fields(
            node,
            name,
            {
                "format": lambda v: isinstance(v, str) and v in FORMATS,
                "block": lambda v: v is None or (_is_size(v) and v > 0) or _is_shape(v),
                "symmetric": lambda v: isinstance(v, bool),
                "scale_dtype": lambda v: isinstance(v, str) and v in DTYPES,
                "scale_spec": lambda v: v is None or isinstance(v, dict),
                "scale_method": lambda v: isinstance(v, str) and v in SCALE_METHODS,
                "zero_dtype": lambda v: v is None or (isinstance(v, str) and v in DTYPES),
                "activation": lambda v: v is None or isinstance(v, dict),
            },
        )
        for key in ("scale_spec", "activation"):
            if fields[key] is not None:
                fields[key] = self.spec(fields[key], f"{name}.{key}", depth + 1)
        if isinstance(fields["block"], list):
            fields["block"] = tuple(fields["block"])
        return Spec(**fields)

    def fields(
        self, node: Any, name: str, checks: Mapping[str, Callable[[Any], bool]]
    ) -> dict[str, Any]:
        """The fields of an object that has exactly those in `checks`, each checked."""
        if not isinstance(node, dict):
            _fail(self.where, name, f"is {_short(node)}, must be an object")
        if node.keys() != checks.keys():
            odd = min(node.keys() ^ checks.keys())
            _fail(self.where, f"{name} {odd}", "is unknown" if odd in node else "is missing")
        for key, holds in checks.items():
            if not holds(node[key]):
                _fail(self.where, f"{name} {key}", f"is {_short(node[key])}, which is not valid")
        return dict(node)


def _spec_json(spec: Spec) -> dict[str, Any]:
    fields = spec._asdict()
    for key in ("scale_spec", "activation"):
        fields[key] = None if fields[key] is None else _spec_json(fields[key])
    fields["block"] = list(spec.block) if isinstance(spec.block, tuple) else spec.block
    return fields


def parts(arrays: Mapping[str, Any], limit: int) -> list[list[str]]:
    """Cuts the names of `arrays`, in order, into shards of at most `limit` bytes as stored.

    An array of more than `limit` bytes gets a shard of its own.
    """
    shards: list[list[str]] = [[]]
    room = limit
    for name, value in arrays.items():
        dtype, shape = np.dtype(value.dtype), tuple(value.shape)
        packed = dtype in packing.BITS
        size = packing.packed_size(shape, dtype) if packed else value.size * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _is_key(key: Any) -> bool:
    return isinstance(key, (str, int)) and not isinstance(key, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(map(_is_size, value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fail(where: str, field: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {field}: {message}")
