"""ggml's block types: bytes of a GGUF tensor <-> a QTensor that keeps their codes.

A row of a ggml tensor is a run of blocks; a block is a packed struct of scales and codes
(llama.cpp, `ggml/src/ggml-common.h`). `CODECS` describes each struct as data: a numpy structured
dtype, and for every plane of codes which bytes hold it in which order. One pair of functions reads
and writes them all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.formats import FORMATS, Codes
from qjax.qtensor import QTensor, check

_CODES_AT_ONCE = 1 << 20  # fits the caches of a core
_SMALL = 1 << 25  # codes of a leaf that the host may hold in a byte each
_BITS = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int8": 8}


class GGMLType(NamedTuple):
    """A type id of a GGUF file: `bytes` hold `elements` neighbors of a row."""

    name: str
    elements: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements; ValueError if they are no whole blocks."""
        if columns % self.elements:
            raise ValueError(
                f"a row of {columns} elements is no whole number of {self.name} blocks of "
                f"{self.elements}"
            )
        return columns // self.elements * self.bytes


# Every id in use. 4, 5, 31-33 and 36-38 are retired.
GGML_TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 36),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
    42: GGMLType("Q2_0", 64, 18),
}


class Plane(NamedTuple):
    """A plane of codes in block structs.

    Attributes:
      read: structs [..., blocks] to codes uint8 [..., blocks * elements].
      write: (structs, codes): fills the structs.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray, np.ndarray], None]


def bit_plane(name: str, width: int, bits: int) -> Plane:
    """Codes of `bits` bits in the field `name`, lowest bits of a byte first.

    Byte j of each run of `width` bytes holds the elements j, j + width, j + 2 width, ... of the
    run.
    """
    mask, shifts = np.uint8((1 << bits) - 1), np.arange(0, 8, bits, dtype=np.uint8)[:, None]

    def read(blocks: np.ndarray) -> np.ndarray:
        data = blocks[name]
        runs = data.reshape(*data.shape[:-1], data.shape[-1] // width, 1, width)
        return _flat(((runs >> shifts) & mask).reshape(*blocks.shape, data.shape[-1] * len(shifts)))

    def write(blocks: np.ndarray, codes: np.ndarray) -> None:
        shape = blocks[name].shape
        parts = codes.reshape(*shape[:-1], shape[-1] // width, len(shifts), width)
        blocks[name] = np.bitwise_or.reduce(parts << shifts, axis=-2).reshape(shape)

    return Plane(read, write)


# TQ1_0: (field, first byte, bytes, codes of a byte), in the order of the elements.
_TRITS = (("qs", 0, 32, 5), ("qs", 32, 16, 5), ("qh", 0, 4, 4))


def _read_trits(blocks: np.ndarray) -> np.ndarray:
    """Codes 0 to 2, five or four to a byte.

    A byte is ceil(v * 256 / 243) of the number v whose five base-3 digits are the codes, the first
    one most significant. Byte j of n holds the elements j, j + n, j + 2 n, ...
    """
    parts = []
    for name, first, size, count in _TRITS:
        data = blocks[name][..., None, first : first + size]
        shifted = data * np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
        digits = (shifted.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
        parts.append(digits.astype(np.uint8).reshape(*blocks.shape, size * count))
    return _flat(np.concatenate(parts, axis=-1))


def _write_trits(blocks: np.ndarray, codes: np.ndarray) -> None:
    codes, at = _grouped(codes, blocks), 0
    for name, first, size, count in _TRITS:
        digits = codes[..., at : at + size * count].reshape(*blocks.shape, count, size)
        value = np.sum(digits * np.array([81, 27, 9, 3, 1], np.uint32)[:count, None], axis=-2)
        packed = (value * 256 + 242) // 243
        blocks[name][..., first : first + size] = packed.astype(np.uint8)
        at += size * count


class Codec(NamedTuple):
    """A block struct and what its members are in the equation `x = code * scale + offset`.

    Attributes:
      format: the row of `FORMATS` that holds the codes.
      struct: the block as a numpy dtype; a `d` of a byte is E8M0, others are float16.
      planes: the planes of the codes, low bits first.
      elements: elements of a block.
      group: elements that share a scale.
      sub_scales: how the scales of groups shorter than the block are held, times `d` (and minima,
        times `dmin`); None where `d` is the scale.
    """

    format: str
    struct: np.dtype
    planes: tuple[Plane, ...]
    elements: int
    group: int
    sub_scales: "SubScales | None" = None


class SubScales(NamedTuple):
    """The codes of the scales (and minima) of a block's groups.

    Attributes:
      format: the row of `FORMATS` that holds them.
      read: structs [..., blocks] to the planes uint8 [..., groups] of the scales, and of the minima
        if there are any.
      write: structs, planes of the scales, planes of the minima: fills the structs.
    """

    format: str
    read: Callable[[np.ndarray], tuple[list[np.ndarray], ...]]
    write: Callable[..., None]


def _grouped(x: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Codes [..., groups] as [..., blocks, groups of a block]."""
    return x.reshape(*blocks.shape, x.shape[-1] // blocks.shape[-1])


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _read_int8(blocks: np.ndarray) -> tuple[list[np.ndarray]]:
    return ([_flat(blocks["scales"])],)


def _write_int8(blocks: np.ndarray, scales: list[np.ndarray]) -> None:
    blocks["scales"] = _grouped(scales[0], blocks)


def _read_q2_k(blocks: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scales in the low nibbles, minima in the high ones."""
    return [_flat(blocks["scales"] & 15)], [_flat(blocks["scales"] >> 4)]


def _write_q2_k(blocks: np.ndarray, scales: list[np.ndarray], mins: list[np.ndarray]) -> None:
    blocks["scales"] = _grouped(scales[0], blocks) | _grouped(mins[0], blocks) << 4


def _read_q3_k(blocks: np.ndarray) -> tuple[list[np.ndarray]]:
    """Sixteen of six bits in twelve bytes: low nibbles in 0-7, the high two bits in 8-11.

    Scale i < 8 has the low half of byte i, scale i + 8 its high half; the high bits of scale i are
    the pair i // 4 of byte 8 + i % 4.
    """
    nibbles, pairs = blocks["scales"][..., :8], blocks["scales"][..., 8:]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    high = np.concatenate([(pairs >> s) & 3 for s in (0, 2, 4, 6)], axis=-1)
    return ([_flat(low), _flat(high)],)


def _write_q3_k(blocks: np.ndarray, scales: list[np.ndarray]) -> None:
    low, high = (_grouped(x, blocks) for x in scales)
    pairs = [high[..., i : i + 4] << (i // 2) for i in (0, 4, 8, 12)]
    nibbles = low[..., :8] | low[..., 8:] << 4
    blocks["scales"] = np.concatenate([nibbles, np.bitwise_or.reduce(pairs)], axis=-1)


def _read_iq4_xs(blocks: np.ndarray) -> tuple[list[np.ndarray]]:
    """Eight of six bits: low nibbles in four bytes, high pairs in two, in order."""
    return ([_NIBBLES.read(blocks), _PAIRS.read(blocks)],)


def _write_iq4_xs(blocks: np.ndarray, scales: list[np.ndarray]) -> None:
    _NIBBLES.write(blocks, scales[0])
    _PAIRS.write(blocks, scales[1])


def _read_six_bits(blocks: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The planes (4 and 2 bits) of the eight scales and minima in twelve bytes.

    The first four of each are the low six bits of bytes 0-3 and 4-7. The last four have their low
    nibbles in bytes 8-11 (minima in the upper halves) and their high two bits atop bytes 0-7.
    """
    packed = blocks["scales"]
    first, last = packed[..., :8].reshape(*blocks.shape, 2, 4), packed[..., 8:]
    low = np.concatenate([first & 15, np.stack([last & 15, last >> 4], axis=-2)], axis=-1)
    high = np.concatenate([(first >> 4) & 3, first >> 6], axis=-1)
    scales, mins = ([_flat(plane[..., i, :]) for plane in (low, high)] for i in (0, 1))
    return scales, mins


def _write_six_bits(blocks: np.ndarray, scales: list[np.ndarray], mins: list[np.ndarray]) -> None:
    low, high = (
        np.stack([_grouped(x, blocks) for x in pair], axis=-2)
        for pair in zip(scales, mins, strict=True)
    )
    first = low[..., :4] | (high[..., :4] << 4) | (high[..., 4:] << 6)
    last = low[..., 0, 4:] | (low[..., 1, 4:] << 4)
    blocks["scales"] = np.concatenate([first.reshape(*blocks.shape, 8), last], axis=-1)


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")
_QH, _SIX_BITS = ("qh", "u1", 4), ("scales", "u1", 12)
_HALVES, _HIGH_BITS = bit_plane("qs", 16, 4), bit_plane("qh", 1, 1)
_NIBBLES, _PAIRS = bit_plane("scales_l", 1, 4), bit_plane("scales_h", 1, 2)
_INT8 = SubScales("int8", _read_int8, _write_int8)
_UINT6 = SubScales("uint6", _read_six_bits, _write_six_bits)
_Q2_K = SubScales("uint4", _read_q2_k, _write_q2_k)
_Q3_K = SubScales("int6", _read_q3_k, _write_q3_k)
_IQ4_XS = SubScales("int6", _read_iq4_xs, _write_iq4_xs)

CODECS: dict[str, Codec] = {
    "Q4_0": Codec("q4_0", np.dtype([_D, ("qs", "u1", 16)]), (_HALVES,), 32, 32),
    "Q4_1": Codec("q4_1", np.dtype([_D, _M, ("qs", "u1", 16)]), (_HALVES,), 32, 32),
    "Q5_0": Codec("q5_0", np.dtype([_D, _QH, ("qs", "u1", 16)]), (_HALVES, _HIGH_BITS), 32, 32),
    "Q5_1": Codec("q5_1", np.dtype([_D, _M, _QH, ("qs", "u1", 16)]), (_HALVES, _HIGH_BITS), 32, 32),
    "Q8_0": Codec("q8_0", np.dtype([_D, ("qs", "u1", 32)]), (bit_plane("qs", 32, 8),), 32, 32),
    "Q2_K": Codec(
        "q2_k",
        np.dtype([("scales", "u1", 16), ("qs", "u1", 64), _D, _DMIN]),
        (bit_plane("qs", 32, 2),),
        256,
        16,
        _Q2_K,
    ),
    "Q3_K": Codec(
        "q3_k",
        np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), _SIX_BITS, _D]),
        (bit_plane("qs", 32, 2), bit_plane("hmask", 32, 1)),
        256,
        16,
        _Q3_K,
    ),
    "Q4_K": Codec(
        "q4_k",
        np.dtype([_D, _DMIN, _SIX_BITS, ("qs", "u1", 128)]),
        (bit_plane("qs", 32, 4),),
        256,
        32,
        _UINT6,
    ),
    "Q5_K": Codec(
        "q5_k",
        np.dtype([_D, _DMIN, _SIX_BITS, ("qh", "u1", 32), ("qs", "u1", 128)]),
        (bit_plane("qs", 32, 4), bit_plane("qh", 32, 1)),
        256,
        32,
        _UINT6,
    ),
    "Q6_K": Codec(
        "q6_k",
        np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "u1", 16), _D]),
        (bit_plane("ql", 64, 4), bit_plane("qh", 32, 2)),
        256,
        16,
        _INT8,
    ),
    "IQ4_NL": Codec("iq4_nl", np.dtype([_D, ("qs", "u1", 16)]), (_HALVES,), 32, 32),
    "IQ4_XS": Codec(
        "iq4_xs",
        np.dtype([_D, ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)]),
        (_HALVES,),
        256,
        32,
        _IQ4_XS,
    ),
    "TQ1_0": Codec(
        "tq1_0",
        np.dtype([("qs", "u1", 48), ("qh", "u1", 4), _D]),
        (Plane(_read_trits, _write_trits),),
        256,
        256,
    ),
    "TQ2_0": Codec("tq2_0", np.dtype([("qs", "u1", 64), _D]), (bit_plane("qs", 32, 2),), 256, 256),
    "MXFP4": Codec("mxfp4", np.dtype([("d", "u1"), ("qs", "u1", 16)]), (_HALVES,), 32, 32),
}


def to_qtensor(raw: np.ndarray, type_name: str, dtype: DTypeLike, transpose: bool) -> QTensor:
    """The QTensor that holds the codes and scales of ggml blocks, unchanged.

    Args:
      raw: uint8 `[..., rows, row_bytes]`, the bytes of the tensor's rows.
      type_name: a key of `CODECS`, such as "Q4_K".
      dtype: of the dequantized array.
      transpose: False keeps the file's `[..., rows, columns]` (an embedding), blocks along the last
        axis; True gives `[..., columns, rows]` (a matmul's `[in, out]`), blocks along the axis
        before the last.

    Returns:
      A QTensor of format `type_name.lower()`. For k-quants and IQ4_XS its `scale` (and `offset`)
      are QTensors too: the file's sub-scale codes under its float16 `d` (and -`dmin`). TQ1_0's
      codes are two bits each, more than the 1.6 of the file.

    Raises:
      ValueError: if the type has no codec or the bytes are not whole rows of its blocks.

    Example:
      >>> raw = np.zeros((4, 2 * 34), np.uint8)  # 4 rows of 2 blocks
      >>> to_qtensor(raw, "Q8_0", np.float32, transpose=True)
      QTensor(q8_0, shape=(64, 4), block=(32, 1), dtype=float32)
    """
    codec = _codec(type_name)
    size = codec.struct.itemsize
    if raw.dtype != np.uint8 or raw.ndim < 2 or raw.shape[-1] % size:
        raise ValueError(
            f"{type_name} bytes must be uint8 [..., rows, row_bytes] with row_bytes a multiple of "
            f"{size}, got {raw.dtype} of shape {raw.shape}"
        )
    blocks = np.ascontiguousarray(raw).view(codec.struct)  # [..., rows, blocks per row]
    d = _outer(blocks["d"])
    scale, offset = _leaf(d, transpose), None
    if codec.sub_scales is not None:
        scales, *mins = codec.sub_scales.read(blocks)
        scale = _sub_scales(codec, scales, d, transpose)
        if mins:
            offset = _sub_scales(codec, mins[0], -_outer(blocks["dmin"]), transpose)
    elif "m" in (codec.struct.names or ()):
        offset = _leaf(_outer(blocks["m"]), transpose)
    reads = [lambda rows, p=plane: p.read(blocks[..., rows, :]) for plane in codec.planes]
    codes = _codes(codec.format, reads, raw.shape[-2], transpose)
    block = _along(codec.group, transpose)
    return QTensor(codes, scale, None, offset, None, codec.format, block, np.dtype(dtype))


def from_qtensor(q: QTensor, transpose: bool) -> np.ndarray:
    """The ggml blocks of a QTensor: the inverse of `to_qtensor`, byte for byte.

    Args:
      q: a QTensor of one of the formats of `CODECS`, with concrete leaves.
      transpose: whether `q` is `[..., columns, rows]`, as `to_qtensor(..., transpose=True)` gives.

    Returns:
      uint8 `[..., rows, row_bytes]`.

    Raises:
      ValueError: if the format, the blocks or the scales of `q` are not those of a ggml type.
    """
    codec = _codec(q.format.upper())
    _check_ggml(q, codec, transpose)
    planes = _planes(codec.format, q, transpose)
    *rows, columns = planes[0].shape
    blocks = np.zeros((*rows, columns // codec.elements), codec.struct)
    for codes, plane in zip(planes, codec.planes, strict=True):
        plane.write(blocks, codes)
    if codec.sub_scales is None:
        blocks["d"] = _host(q.scale, transpose).view(codec.struct["d"])
        if q.offset is not None:
            blocks["m"] = _host(q.offset, transpose)
        return blocks.view(np.uint8)
    nested = [v for v in (q.scale, q.offset) if isinstance(v, QTensor)]
    sub_codes = (_planes(codec.sub_scales.format, v, transpose) for v in nested)
    codec.sub_scales.write(blocks, *sub_codes)
    blocks["d"] = _host(nested[0].scale, transpose)
    if nested[1:]:
        blocks["dmin"] = -_host(nested[1].scale, transpose)
    return blocks.view(np.uint8)


def _codec(type_name: str) -> Codec:
    if type_name not in CODECS:
        raise ValueError(
            f"ggml type {type_name!r} has no codec; those that do: {', '.join(CODECS)}"
        )
    return CODECS[type_name]


def _along(length: int, transpose: bool) -> tuple[int, ...]:
    return (length, 1) if transpose else (length,)


# Leaves of a QTensor and their planes on the host, as uint8 [..., rows, columns].


def _leaf(x: np.ndarray, transpose: bool) -> jax.Array:
    return jnp.asarray(np.swapaxes(x, -1, -2) if transpose else x)


def _host(leaf: Any, transpose: bool) -> np.ndarray:
    x = np.asarray(leaf)
    return np.swapaxes(x, -1, -2) if transpose else x


def _names(storage: str | tuple[str, ...]) -> tuple[str, ...]:
    return (storage,) if isinstance(storage, str) else storage


def _codes(
    format: str, reads: list[Callable[[slice], np.ndarray]], rows: int, transpose: bool
) -> Codes:
    """The leaf or leaves that hold file codes; `reads` gives some rows of each of the planes."""
    storage = FORMATS[format].storage
    leaves = [
        _packed_leaf(read, rows, name, transpose)
        for name, read in zip(_names(storage), reads, strict=True)
    ]
    return leaves[0] if isinstance(storage, str) else tuple(leaves)


def _packed_leaf(
    read: Callable[[slice], np.ndarray], rows: int, storage: str, transpose: bool
) -> jax.Array:
    """A leaf from `read`, which gives uint8 codes [..., some rows, columns].

    Some rows are unpacked at a time. A large leaf of 2- or 4-bit codes is packed again and crosses
    to the device as bytes, so that what the host holds beside it does not grow to a byte per code;
    for a small one that would only be slower.
    """
    *leading, _, columns = read(slice(0, 0)).shape
    per_row = math.prod(leading) * columns
    length = rows if transpose else columns
    bits = _BITS[storage]
    if bits in (2, 4) and rows * per_row <= _SMALL:
        bits = 8
    step = 8 * max(1, _CODES_AT_ONCE // max(8 * per_row, 1))
    held = -(-length * bits // 8)
    out = _aligned((*leading, columns if transpose else rows, held))
    in_file_order = np.swapaxes(out, -1, -2) if transpose else out
    for first in range(0, rows, step):
        codes = read(slice(first, first + step))
        if storage == "int4":  # ggml stores q + 8; a byte of q, sign extended, is what int4 holds
            codes = codes - np.uint8(8)
        part = _pack(codes, bits, axis=-2 if transpose else -1)
        at = first * bits // 8 if transpose else first  # steps of 8 rows never cut a byte
        in_file_order[..., at : at + part.shape[-2], :] = part
    if bits == 8:
        return jax.device_put(out.view(storage))
    packed = jax.device_put(out)
    return packed if storage == "uint1" else _as_codes(packed, storage, length)


def _pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes of `bits` bits, several to a byte along `axis`, lowest bits first."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, axis=axis, bitorder="little")
    codes = np.swapaxes(codes, axis, -1)
    out = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)), np.uint8)
    for i in range(8 // bits):
        part = codes[..., i :: 8 // bits] & np.uint8((1 << bits) - 1)
        out[..., : part.shape[-1]] |= part << np.uint8(i * bits)
    return np.swapaxes(out, axis, -1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _as_codes(packed: jax.Array, storage: str, length: int) -> jax.Array:
    codes = jax.lax.bitcast_convert_type(packed, jnp.dtype(storage))
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * codes.shape[-1])[..., :length]


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty uint8 array at a multiple of 64 bytes: JAX takes it over on CPU, without a copy."""
    size = math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].reshape(shape)


def _planes(format: str, q: QTensor, transpose: bool) -> list[np.ndarray]:
    """The inverse of `_codes`, all rows of each plane at once."""
    storage = FORMATS[format].storage
    if isinstance(storage, str):
        codes = _host(q.qvalue, transpose).view(np.uint8)
        return [(codes + np.uint8(8)) & np.uint8(15) if storage == "int4" else codes]
    planes = []
    for name, plane in zip(storage, q.qvalue, strict=True):
        x = _host(plane, transpose).view(np.uint8)
        if name == "uint1":
            axis = -2 if transpose else -1
            count = q.storage_shape[-1]
            x = np.unpackbits(x, axis=axis, count=count, bitorder="little")
        planes.append(x)
    return planes


def _outer(member: np.ndarray) -> np.ndarray:
    """A scale of whole blocks: float16, or E8M0 where the struct has a byte."""
    return member.view(ml_dtypes.float8_e8m0fnu) if member.dtype == np.uint8 else member


def _sub_scales(codec: Codec, planes: list[np.ndarray], d: np.ndarray, transpose: bool) -> QTensor:
    assert codec.sub_scales is not None
    name, reads = (
        codec.sub_scales.format,
        [lambda rows, p=plane: p[..., rows, :] for plane in planes],
    )
    codes = _codes(name, reads, d.shape[-2], transpose)
    block = _along(codec.elements // codec.group, transpose)
    return QTensor(codes, _leaf(d, transpose), None, None, None, name, block, np.dtype("f4"))


def _check_ggml(q: QTensor, codec: Codec, transpose: bool) -> None:
    check(q)
    if q.param_shape is not None:
        raise ValueError(
            f"{q!r} is held as {q.storage_shape}, not as its weight is: dequantize and quantize it"
        )
    shape, name = q.storage_shape, q.format.upper()
    block = _along(codec.group, transpose)
    axis = -2 if transpose else -1
    if len(shape) < 2 or q.block != block or shape[axis] % codec.elements:
        raise ValueError(
            f"{name} blocks need a tensor of at least two axes in blocks of {block}, axis {axis} a "
            f"multiple of {codec.elements}; got {q!r}"
        )
    held = {"scale": q.scale, "offset": q.offset, "zero_point": q.zero_point}
    given = {
        n: (x.format, x.block, str(x.scale.dtype)) if isinstance(x, QTensor) else str(x.dtype)
        for n, x in held.items()
        if x is not None
    }
    outer = _outer(np.empty(0, codec.struct["d"])).dtype.name
    needed: dict[str, Any] = {"scale": outer}
    if codec.sub_scales is not None:
        along = _along(codec.elements // codec.group, transpose)
        needed["scale"] = (codec.sub_scales.format, along, outer)
    if {"m", "dmin"} & set(codec.struct.names or ()):
        needed["offset"] = needed["scale"]
    if given != needed:
        raise ValueError(f"{name} blocks hold {needed}, got {given}")
