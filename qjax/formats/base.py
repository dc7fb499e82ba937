"""Format: one frozen row per low-precision element encoding.

A format says how codes are held (`storage`), what they mean (`decode`) and how a normalized value
becomes a code (`encode`). It knows nothing of scales or blocks.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from qjax.formats.row_major import row_major

Codes: TypeAlias = jax.Array | tuple[jax.Array, ...]

# The planes a code may be cut into, low bits first. "uint1" is the one packed plane: eight codes to
# a byte along the last axis, least significant bit first, because no device dtype holds one bit.
PLANE_BITS = {"uint1": 1, "uint2": 2, "uint4": 4}
_NARROW = frozenset({"int2", "uint2", "int4", "uint4"})


class Format(NamedTuple):
    """How one element is encoded.

    Attributes:
      name: the row's key in `FORMATS`.
      storage: dtype name of the codes, or the names of their planes, low bits first.
      decode: (codes, dtype) -> values, elementwise. Codes of several planes arrive joined, as
        uint8.
      encode: normalized float32 values -> codes before they are cut into planes; saturates.
      min, max: smallest and largest value that a code can stand for.
      bits: bits held on the device per element.
      integer: whether all values are integers.
    """

    name: str
    storage: str | tuple[str, ...]
    decode: Callable[[jax.Array, jnp.dtype], jax.Array]
    encode: Callable[[jax.Array], jax.Array]
    min: float
    max: float
    bits: int
    integer: bool = False


def join_planes(fmt: Format, qvalue: Codes) -> jax.Array:
    """Codes of `fmt` as one array: planes are joined into uint8, a single array passes through."""
    if not isinstance(qvalue, tuple):
        return _as_they_lie(qvalue)
    shape = qvalue[0].shape
    codes, shift = jnp.zeros(shape, jnp.uint8), 0
    for name, plane in zip(fmt.storage, qvalue, strict=True):
        packed = name == "uint1"
        bits = unpack_bits(plane, shape[-1]) if packed else _as_they_lie(plane)
        codes = codes | (bits.astype(jnp.uint8) << jnp.uint8(shift))
        shift += PLANE_BITS[name]
    return codes


def move_codes(fn: Callable[..., jax.Array], *planes: jax.Array) -> jax.Array:
    """`fn(*planes)`, which moves codes or planes of them; narrow ones move as whole bytes.

    XLA for a CPU aborts on some concatenations of 2-bit integers (jax 0.10 to 0.12), and XLA for a
    GPU does not compile their transposition.
    """
    name = planes[0].dtype.name
    if name not in _NARROW:
        return fn(*planes)
    byte = "uint8" if name.startswith("u") else "int8"
    return _narrowed(fn(*(_as_they_lie(p).astype(byte) for p in planes)), name)


def _as_they_lie(codes: jax.Array) -> jax.Array:
    """The same codes, which XLA for a GPU may not transpose while they are narrow.

    It would copy a whole stack of 4-bit weights before the loop that reads them (jax 0.11), and
    fails to compile the transposition of 2-bit integers.
    """
    return row_major(codes) if codes.dtype.name in _NARROW else codes


def _narrowed(codes: jax.Array, dtype: str) -> jax.Array:
    """Codes in bytes cast to the dtype that holds them.

    XLA for a GPU writes 2-bit integers from threads that overwrite each other's part of a byte,
    where it also sums what they come from or stand for (jax 0.11): their cast stands alone.
    """
    if dtype not in _NARROW:
        return codes.astype(dtype)
    alone = dtype in ("int2", "uint2")
    held = row_major(codes, alone=alone).astype(dtype)
    return row_major(held, alone=True) if alone else held


def split_planes(fmt: Format, codes: jax.Array) -> Codes:
    """Cuts joined codes into the planes that `fmt` stores; the inverse of `join_planes`."""
    if isinstance(fmt.storage, str):
        return _narrowed(codes, fmt.storage)
    planes, shift = [], 0
    for name in fmt.storage:
        width = PLANE_BITS[name]
        bits = (codes >> jnp.uint8(shift)) & jnp.uint8((1 << width) - 1)
        planes.append(pack_bits(bits) if name == "uint1" else _narrowed(bits, name))
        shift += width
    return tuple(planes)


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs uint8 zeros and ones eight to a byte along the last axis, lowest bit first.

    By halves, not by a sum, beside which XLA for a GPU may not write the plane of 2 bits.
    """
    *rows, length = bits.shape
    padded = jnp.pad(bits, [(0, 0)] * len(rows) + [(0, -length % 8)])
    eights = padded.reshape(*rows, -(-length // 8), 8)
    parts = eights << _bit_numbers(eights.ndim)
    for half in (4, 2, 1):
        parts = parts[..., :half] | parts[..., half:]
    return parts[..., 0]


def unpack_bits(packed: jax.Array, length: int) -> jax.Array:
    """The first `length` bits of each row of `packed`, as uint8 zeros and ones."""
    bits = (packed[..., None] >> _bit_numbers(packed.ndim + 1)) & jnp.uint8(1)
    return bits.reshape(*packed.shape[:-1], 8 * packed.shape[-1])[..., :length]


def _bit_numbers(ndim: int) -> jax.Array:
    return jnp.arange(8, dtype=jnp.uint8).reshape((1,) * (ndim - 1) + (8,))
