"""QTensor: an array held in low precision, and the one equation that gives it back."""

import dataclasses
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from qjax import blocks
from qjax.formats import FORMATS, Codes, join_planes
from qjax.spec import Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """What happens to the other operand of a matmul: quantized while it runs, as `spec` says."""

    spec: Spec = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QTensor:
    """An array in low precision: `x = (decode(qvalue) - zero_point) * scale + offset`, block by block.

    Invariants, checked on first use and never by the constructor (tree maps put anything into leaves):
      - `qvalue` has the storage dtype of `format`; with several planes it is a tuple, low bits first, and the first plane
        has the logical shape.
      - `scale`, `zero_point` and `offset` have shape ceil(shape / block). `scale` and `offset` are arrays or QTensors.
      - `block` is right-aligned and stored, never inferred: the last block of an axis may be ragged, and leading axes
        (layers, experts) come and go under `scan` and `vmap` without touching it.
      - `dtype` is that of the dequantized array; scales keep their own.
      - `param_shape` stands only where the weight differs in shape from its storage.
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
        return stored[: len(stored) - len(self.block)] + self.param_shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __repr__(self) -> str:
        try:
            shape = self.shape
        except AttributeError:  # a tree map put something without a shape into the leaves
            shape = "?"
        return f"QTensor({self.format}, shape={shape}, block={self.block}, dtype={self.dtype})"

    def __jax_array__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} reached a function that expects an array. Wrap the function that takes the parameters: "
            "qjax.quantized(fn)(qparams, ...); or turn this weight back into an array with qjax.dequantize"
        )


def is_qtensor(leaf: Any) -> bool:
    """Whether `leaf` is a QTensor: the `is_leaf` of every tree map over quantized parameters."""
    return isinstance(leaf, QTensor)


def dequantize(q: QTensor) -> jax.Array:
    """The array that a QTensor stands for.

    `x = (decode(qvalue) - zero_point) * scale + offset`, evaluated block-wise in float32 and rounded once to `q.dtype`.

    Args:
      q: a QTensor of any format; scales and offsets that are QTensors are dequantized first.

    Returns:
      An array of `q.shape` and `q.dtype`.

    Raises:
      ValueError: if the leaves disagree with the format.

    Example:
      >>> q = qjax.quantize(jnp.array([[1.0, -2.0], [0.5, 4.0]]), "int8", axis=0)
      >>> qjax.dequantize(q).round(2).tolist()
      [[1.0, -2.0], [0.5, 4.0]]
    """
    check(q)
    values = join_planes(FORMATS[q.format], q.qvalue)
    decode = FORMATS[q.format].decode
    scale = _open(q.scale)
    terms = [scale.astype(jnp.float32)]
    if q.zero_point is not None:
        terms.append(q.zero_point.astype(jnp.float32))
    if q.offset is not None:
        terms.append(_open(q.offset).astype(jnp.float32))

    def equation(codes, scale, *rest):
        x = decode(codes, jnp.dtype(jnp.float32))
        if q.zero_point is not None:
            x, rest = x - rest[0], rest[1:]
        x = x * scale
        return (x + rest[0] if rest else x).astype(q.dtype)

    x = blocks.apply(equation, values, q.block, *terms)
    return x if q.param_shape is None else x.reshape(q.shape)


def _open(scale: jax.Array | QTensor) -> jax.Array:
    return dequantize(scale) if isinstance(scale, QTensor) else scale


def check(q: QTensor, path: str = "") -> None:
    """Raises ValueError, naming `path` and the remedy, if the leaves of `q` are not what its format says."""
    where = f"{path}: " if path else ""
    if q.format not in FORMATS:
        raise ValueError(f"{where}unknown format {q.format!r}; the formats are {', '.join(FORMATS)}")
    storage = FORMATS[q.format].storage
    planes = q.qvalue if isinstance(q.qvalue, tuple) else (q.qvalue,)
    names = (storage,) if isinstance(storage, str) else storage
    remedy = "a tree map over quantized parameters must treat QTensors as leaves (is_leaf=qjax.is_qtensor) or leave their codes alone"
    if isinstance(q.qvalue, tuple) != isinstance(storage, tuple) or len(planes) != len(names):
        raise ValueError(f"{where}{q.format} holds {len(names)} plane(s) of codes, got {len(planes)}; {remedy}")
    for plane, name in zip(planes, names, strict=True):
        wanted = jnp.dtype("uint8" if name == "uint1" else name)
        if getattr(plane, "dtype", None) != wanted:
            raise ValueError(f"{where}{q.format} holds its codes as {wanted}, got {getattr(plane, 'dtype', type(plane).__name__)}; {remedy}")
    shape = q.storage_shape
    if any(b != 1 for b in q.block[: max(len(q.block) - len(shape), 0)]):
        raise ValueError(f"{where}codes of shape {shape} have fewer axes than the block {q.block}; {remedy}")
    for plane, name in zip(planes, names, strict=True):
        wanted_shape = (*shape[:-1], -(-shape[-1] // 8)) if name == "uint1" else shape
        if tuple(plane.shape) != wanted_shape:
            raise ValueError(f"{where}the {name} plane of {q.format} codes {shape} has shape {tuple(plane.shape)}, needed {wanted_shape}; {remedy}")
    wanted_shape = blocks.scale_shape(shape, q.block)
    for name, leaf in (("scale", q.scale), ("zero_point", q.zero_point), ("offset", q.offset)):
        if leaf is None and name != "scale":
            continue
        if isinstance(leaf, QTensor):
            check(leaf, f"{path}/{name}" if path else name)
        elif not hasattr(leaf, "dtype") or (name != "zero_point" and not jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise ValueError(f"{where}{name} must be a floating-point array or a QTensor, got {getattr(leaf, 'dtype', type(leaf).__name__)}; {remedy}")
        if tuple(leaf.shape) != wanted_shape:
            raise ValueError(f"{where}{name} has shape {tuple(leaf.shape)}, needed {wanted_shape} for codes {shape} in blocks of {q.block}; {remedy}")
