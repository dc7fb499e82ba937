"""The order in which a 4-bit weight lies for `mosaic_gpu`: every thread's operands side by side.

The unit is a tile of 16 output channels by 128 of k, the A operands of eight `mma.m16n8k16`. A tile
is `WORDS` 32-bit words:

  - 256 words of codes, `[half of k, lane, 4]`: lane = 4 r + c of a warp reads two 16-byte vectors;
    word i = 4 half + v holds its eight codes of multiplication i, nibble p in bits 4p:
    channel r + 8 (p mod 2) of the tile, k = 32 (i // 2) + 8 c + 4 (i mod 2) + 2 (p // 2 mod 2)
    + p // 4. So `word >> 4 j & 0x000F000F` is register j of the operand, and the eight bfloat16 of
    x that go with a lane are neighbors in memory.
  - per group of k, 8 words of scales: word r holds bfloat16 channels r (low) and r + 8 (high);
  - per group of k, 8 words of biases likewise, where the weight has zero points.

Codes are stored offset binary, u = code - lowest code, and a weight is `(u - bias) * scale`.
Tiles lie `[n / 16, k / 128]`. Whatever the padding adds has scale 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS, DEPTH = 16, 128  # channels and k of a tile
CODES = ROWS * DEPTH // 8  # words of codes in a tile


def words(group: int, zeros: bool) -> int:
    """32-bit words of a tile whose groups along k have `group` elements, at most 128."""
    return CODES + DEPTH // group * ROWS // 2 * (2 if zeros else 1)


def pack(codes: jax.Array, scale: jax.Array, bias: jax.Array | None, group: int) -> jax.Array:
    """Tiles `int32 [ceil(n / 16), ceil(k / 128), words]`.

    Args:
      codes: `[k, n]` unsigned codes 0 .. 15, of any integer dtype.
      scale: bfloat16 `[ceil(k / group), n]`.
      bias: bfloat16 like scale, integers 128 .. 143 exact; None where it is the same everywhere.
      group: 32, 64 or 128.
    """
    k, n = codes.shape
    pad_k, pad_n = -k % DEPTH, -n % ROWS
    codes = jnp.pad(codes.astype(jnp.uint32), ((0, pad_k), (0, pad_n)))
    rows, deep = (n + pad_n) // ROWS, (k + pad_k) // DEPTH
    cut = codes.reshape(deep, 4, 4, 2, 2, 2, rows, 2, 8)  # K, i//2, c, i%2, p//2%2, p//4, N, p%2, r
    shift = (
        4 * np.arange(2)[:, None, None] * 2  # p // 2 % 2
        + 16 * np.arange(2)[None, :, None]  # p // 4
        + 4 * np.arange(2)[None, None, :]  # p % 2
    ).astype(np.uint32)
    cut = cut.transpose(6, 0, 1, 8, 2, 3, 4, 5, 7)  # N, K, i//2, r, c, i%2, p//2%2, p//4, p%2
    word = jnp.sum(cut << shift, axis=(-3, -2, -1), dtype=jnp.uint32)  # N, K, i//2, r, c, i%2
    word = word.reshape(rows, deep, 2, 2, 8, 4, 2)  # N, K, half, i//2%2, r, c, i%2
    word = word.transpose(0, 1, 2, 4, 5, 3, 6).reshape(rows, deep, CODES)
    parts = [word, _pairs(scale, rows, deep, group)]
    if bias is not None:
        parts.append(_pairs(bias, rows, deep, group))
    return lax.bitcast_convert_type(jnp.concatenate(parts, -1), jnp.int32)


def _pairs(values: jax.Array, rows: int, deep: int, group: int) -> jax.Array:
    """`[groups, n]` -> `uint32 [rows, deep, 8 * 128 / group]`: channels r and r + 8 in a word."""
    bits = lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    per_tile = DEPTH // group
    bits = jnp.pad(
        bits, ((0, deep * per_tile - bits.shape[0]), (0, rows * ROWS - bits.shape[1]))
    ).reshape(deep, per_tile, rows, 2, 8)
    word = bits[..., 0, :] | bits[..., 1, :] << 16
    return word.transpose(2, 0, 1, 3).reshape(rows, deep, per_tile * 8)


def unpack(
    tiles: jax.Array, k: int, n: int, group: int, zeros: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What `pack` was given: codes uint8 `[k, n]`, scale and bias bfloat16 `[groups, n]`."""
    rows, deep, _ = tiles.shape
    tiles = lax.bitcast_convert_type(tiles, jnp.uint32)
    word = tiles[..., :CODES].reshape(rows, deep, 2, 8, 4, 2, 2)
    word = word.transpose(0, 1, 2, 5, 3, 4, 6).reshape(rows, deep, 4, 8, 4, 2)
    shift = (
        8 * np.arange(2)[:, None, None]
        + 16 * np.arange(2)[None, :, None]
        + 4 * np.arange(2)[None, None, :]
    ).astype(np.uint32)
    cut = (word[..., None, None, None] >> shift) & np.uint32(15)
    codes = cut.transpose(1, 2, 4, 5, 6, 7, 0, 8, 3).reshape(deep * DEPTH, rows * ROWS)
    per_tile = DEPTH // group

    def values(at: int) -> jax.Array:
        pair = tiles[..., at : at + per_tile * 8].reshape(rows, deep, per_tile, 8)
        both = jnp.stack([pair & 0xFFFF, pair >> 16], -2).astype(jnp.uint16)
        both = both.transpose(1, 2, 0, 3, 4).reshape(deep * per_tile, rows * ROWS)
        return lax.bitcast_convert_type(both[: -(-k // group), :n], jnp.bfloat16)

    bias: Any = values(CODES + per_tile * 8) if zeros else None
    return codes[:k, :n].astype(jnp.uint8), values(CODES), bias
