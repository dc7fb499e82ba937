"""Codes in a stream of bits: the lowest bits of the first word first, codes across its end too."""

from __future__ import annotations

import numpy as np

_BITS_AT_ONCE = 1 << 24  # a byte each, while codes that straddle bytes are cut


def words_of(count: int, bits: int) -> int:
    """32-bit words that `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of words.

    Args:
      words: int32 or uint32 `[..., words_of(count, bits)]`, or more words.
      bits: of a code, 1 to 8.
      count: codes of a row.

    Returns:
      uint8 `[..., count]`.

    Example:
      >>> unpack(np.array([0x79D8], np.uint32), 4, 4).tolist()
      [8, 13, 9, 7]
    """
    raw = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (raw[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(*raw.shape[:-1], -1)[..., :count]
    rows = raw.reshape(-1, raw.shape[-1])
    out = np.empty((len(rows), count), np.uint8)
    step = max(1, _BITS_AT_ONCE // max(8 * raw.shape[-1], 1))
    for i in range(0, len(rows), step):
        part = np.unpackbits(rows[i : i + step], axis=-1, bitorder="little")[:, : count * bits]
        part = part.reshape(len(part), count, bits)
        out[i : i + step] = np.packbits(part, axis=-1, bitorder="little")[..., 0]
    return out.reshape(*raw.shape[:-1], count)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of each row of codes; what the last one has left is zero.

    Args:
      codes: uint8 `[..., count]`, each below ``2 ** bits``.
      bits: of a code, 1 to 8.

    Returns:
      int32 `[..., words_of(count, bits)]`.

    Example:
      >>> [hex(word) for word in pack(np.array([4, 6, 4, 4], np.uint8), 3).tolist()]
      ['0x934']
    """
    count = codes.shape[-1]
    size = 4 * words_of(count, bits)
    rows = np.ascontiguousarray(codes).reshape(-1, count)
    out = np.zeros((len(rows), size), np.uint8)
    if 8 % bits == 0:
        per_byte = 8 // bits
        for i in range(per_byte):
            part = rows[:, i::per_byte]
            out[:, : part.shape[-1]] |= part << np.uint8(i * bits)
    else:
        step = max(1, _BITS_AT_ONCE // max(8 * count, 1))
        for i in range(0, len(rows), step):
            part = np.unpackbits(
                rows[i : i + step, :, None], axis=-1, count=bits, bitorder="little"
            )
            stream = np.packbits(part.reshape(len(part), -1), axis=-1, bitorder="little")
            out[i : i + step, : stream.shape[-1]] = stream
    return out.view("<i4").reshape(*codes.shape[:-1], size // 4)
