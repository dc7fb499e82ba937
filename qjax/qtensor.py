"""QTensor: an array held in low precision, and the one equation that gives it back."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from qjax import activation, blocks, exact
from qjax.activation import Activation as Activation
from qjax.formats import FORMATS, Codes, join_planes

_NO_ARRAY = (
    "reached a function that expects an array. Wrap the function that takes the parameters: "
    "qjax.quantized(fn)(qparams, ...); or turn this weight back into an array with qjax.dequantize"
)


class Quantized:
    """A weight in low precision, held in several arrays but one leaf to everything in qjax:
    a QTensor, or what `prepare` makes of one.
    """

    format: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def check(self, path: str = "") -> None:
        """Raises ValueError, naming `path` and the remedy, if the arrays belie the rest."""
        raise NotImplementedError

    def dequantized(self) -> jax.Array:
        """The array that it stands for."""
        raise NotImplementedError

    def specs(self, entries: Sequence[Any], shards: Sequence[int], path: str) -> Any:
        """The PartitionSpecs of its arrays, for the entries and shards of each axis."""
        raise NotImplementedError

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError(f"{self!r} {_NO_ARRAY}")

    __jax_array__ = __array__ = __getitem__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __pow__ = _refuse
    __matmul__ = __rmatmul__ = __truediv__ = __rtruediv__ = _refuse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class QTensor(Quantized):
    """An array in low precision: `x = (decode(qvalue) - zero_point) * scale + offset`, by blocks.

    Invariants, checked on first use and never by the constructor (tree maps put anything into
    leaves):
      - `qvalue` has the storage dtype of `format`; with several planes it is a tuple, low bits
        first, and the first plane has the logical shape.
      - `scale`, `zero_point` and `offset` have shape ceil(shape / block). `scale` and `offset` are
        arrays or QTensors.
      - `block` is right-aligned and stored, never inferred: the last block of an axis may be
        ragged, and leading axes (layers, experts) come and go under `scan` and `vmap` without
        touching it.
      - `dtype` is that of the dequantized array; scales keep their own.
      - `param_shape` stands only where the weight differs in shape from its storage; then `block`
        has one entry for each axis of the storage of one weight, and axes before those are stacked.
      - `activation` says in which coordinates the weight is held, and what becomes of the other
        operand of its matmul.
    """

    qvalue: Codes
    scale: "jax.Array | QTensor"
    zero_point: jax.Array | None
    offset: "jax.Array | QTensor | None"
    activation: Activation | None
    format: str = dataclasses.field(metadata={"static": True})
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    param_shape: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def storage_shape(self) -> tuple[int, ...]:
        return tuple((self.qvalue[0] if isinstance(self.qvalue, tuple) else self.qvalue).shape)

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.storage_shape
        if self.param_shape is None:
            return stored
        return stored[: max(len(stored) - len(self.block), 0)] + self.param_shape

    def __repr__(self) -> str:
        try:
            shape = self.shape
        except AttributeError:  # a tree map put something without a shape into the leaves
            shape = "?"
        return f"QTensor({self.format}, shape={shape}, block={self.block}, dtype={self.dtype})"

    def check(self, path: str = "") -> None:
        check(self, path)

    def dequantized(self) -> jax.Array:
        return dequantize(self)

    if not TYPE_CHECKING:  # a missing attribute is an error to the type checker anyway

        def __getattr__(self, name: str) -> NoReturn:
            """Says of `w.T`, `w.astype` and their like what to do instead."""
            known = hasattr(type(self), name)  # a property that raised: say nothing of ours
            teach = hasattr(jax.Array, name) and not known and not name.startswith("_")
            hint = f": {self!r} {_NO_ARRAY}" if teach else ""
            raise AttributeError(f"a QTensor has no attribute {name!r}{hint}")


def is_qtensor(leaf: Any) -> bool:
    """Whether `leaf` is a QTensor, prepared or not: the `is_leaf` of every tree map over quantized
    parameters.
    """
    return isinstance(leaf, Quantized)


def dequantize(q: Quantized) -> jax.Array:
    """The array that a QTensor stands for.

    `x = (decode(qvalue) - zero_point) * scale + offset`, evaluated block-wise in float32, each
    operation rounded once, and the result rounded to `q.dtype`. What an `Activation` did to the
    weight is undone before: the result is in the model's coordinates.

    Args:
      q: a QTensor of any format, prepared or not; scales and offsets that are QTensors are
        dequantized first.

    Returns:
      An array of `q.shape` and `q.dtype`.

    Raises:
      ValueError: if the leaves disagree with the format.

    Example:
      >>> q = qjax.quantize(jnp.array([[1.0, -2.9], [127.0, 254.0]]), "int8", axis=0)
      >>> q.qvalue.tolist(), q.scale.tolist()
      ([[1, -1], [127, 127]], [[1.0, 2.0]])
      >>> qjax.dequantize(q).tolist()
      [[1.0, -2.0], [127.0, 254.0]]
    """
    if not isinstance(q, QTensor):
        return q.dequantized()
    check(q)
    return _dequantize(q)


@functools.partial(jax.jit, inline=True)  # one pass over memory when it is called outside of jit
def _dequantize(q: QTensor) -> jax.Array:
    fmt, act = FORMATS[q.format], q.activation
    elsewhere = activation.changes_coordinates(act)
    per_block = [_open(v) for v in (q.scale, q.zero_point, q.offset) if v is not None]

    def equation(codes: jax.Array, scale: jax.Array, *rest: jax.Array) -> jax.Array:
        x = fmt.decode(codes, jnp.dtype(jnp.float32))
        if q.zero_point is not None:
            x = x - rest[0]
        x = x * scale
        if q.offset is not None:
            x = exact.rounded(x) + rest[-1]
        return x if elsewhere else x.astype(q.dtype)

    x = blocks.apply(equation, join_planes(fmt, q.qvalue), q.block, *per_block)
    x = x if q.param_shape is None else x.reshape(q.shape)
    return activation.from_storage(act, x).astype(q.dtype) if act and elsewhere else x


def _open(per_block: jax.Array | QTensor) -> jax.Array:
    x = _dequantize(per_block) if isinstance(per_block, QTensor) else per_block
    return x.astype(jnp.float32)


def check(q: QTensor, path: str = "") -> None:
    """Raises ValueError, naming `path` and the remedy, if the leaves of `q` belie its format."""
    where = f"{path}: " if path else ""
    if not isinstance(q.format, str) or q.format not in FORMATS:
        raise ValueError(
            f"{where}unknown format {q.format!r}; the formats are {', '.join(FORMATS)}"
        )
    _check_static(q, where)
    _check_codes(q, where)
    if q.activation is not None:
        activation.check(q.activation, q.shape, where)
    needed = blocks.scale_shape(q.storage_shape, q.block)
    for name in ("scale", "zero_point", "offset"):
        leaf: Any = getattr(q, name)
        if leaf is None and name != "scale":
            continue
        if isinstance(leaf, QTensor) and name != "zero_point":
            check(leaf, f"{path}/{name}" if path else name)
        elif not _is_number(leaf, name):
            kind = "an array" if name == "zero_point" else "a floating-point array or a QTensor"
            raise ValueError(f"{where}{name} must be {kind}, got {_kind(leaf)}; {_REMEDY}")
        if (shape := tuple(getattr(leaf, "shape", ()))) != needed:
            raise ValueError(
                f"{where}{name} has shape {shape}, needed {needed} for codes of shape "
                f"{q.storage_shape} in blocks of {q.block}; {_REMEDY}"
            )


def _check_static(q: QTensor, where: str) -> None:
    """What no leaf tells: someone replaced a static field."""
    lengths = {"block": q.block, "param_shape": () if q.param_shape is None else q.param_shape}
    for name, value in lengths.items():
        whole = isinstance(value, tuple) and all(isinstance(n, (int, np.integer)) for n in value)
        if not whole or min(value, default=1) < (name == "block"):
            raise ValueError(
                f"{where}{name} must be a tuple of lengths, got {value!r}; take it from "
                "the QTensor that the codes came from"
            )
    if not isinstance(q.dtype, np.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"{where}dtype must be the floating-point numpy dtype of the dequantized array, "
            f"got {q.dtype!r}"
        )


def _check_codes(q: QTensor, where: str) -> None:
    storage = FORMATS[q.format].storage
    names = (storage,) if isinstance(storage, str) else storage
    planes = q.qvalue if isinstance(q.qvalue, tuple) else (q.qvalue,)
    if isinstance(q.qvalue, tuple) != isinstance(storage, tuple) or len(planes) != len(names):
        raise ValueError(
            f"{where}{q.format} holds its codes as {' and '.join(names)}, got "
            f"{' and '.join(map(_kind, planes))}; {_REMEDY}"
        )
    for plane, name in zip(planes, names, strict=True):
        wanted = jnp.dtype("uint8" if name == "uint1" else name)
        if getattr(plane, "dtype", None) != wanted or not hasattr(plane, "shape"):
            raise ValueError(
                f"{where}{q.format} holds its codes as {wanted}, got {_kind(plane)}; {_REMEDY}"
            )
    shape = q.storage_shape
    if len(shape) < len(blocks.trim(q.block)):
        raise ValueError(
            f"{where}codes of shape {shape} cannot lie in blocks of {q.block}: a block has at most "
            f"one length per axis; {_REMEDY}"
        )
    for plane, name in zip(planes, names, strict=True):
        needed = (*shape[:-1], -(-shape[-1] // 8)) if name == "uint1" else shape
        if tuple(plane.shape) != needed:
            raise ValueError(
                f"{where}the {name} plane of {q.format} codes of shape {shape} has shape "
                f"{tuple(plane.shape)}, needed {needed}; {_REMEDY}"
            )
    if q.param_shape is not None and math.prod(q.param_shape) != math.prod(
        shape[len(shape) - len(q.block) :]
    ):
        raise ValueError(
            f"{where}codes of shape {shape} in blocks of {q.block} cannot take the weight's shape "
            f"{q.param_shape}; the block needs an entry for each axis of one weight's storage"
        )


_REMEDY = (
    "a tree map over quantized parameters must treat QTensors as leaves (is_leaf=qjax.is_qtensor) "
    "or leave their codes and scales alone"
)


def _is_number(leaf: Any, name: str) -> bool:
    kinds = (jnp.floating, jnp.integer) if name == "zero_point" else (jnp.floating,)
    array = hasattr(leaf, "dtype") and hasattr(leaf, "shape") and not is_qtensor(leaf)
    return array and any(jnp.issubdtype(leaf.dtype, k) for k in kinds)


def _kind(leaf: Any) -> str:
    array = hasattr(leaf, "dtype") and not is_qtensor(leaf)
    return str(leaf.dtype) if array else type(leaf).__name__
