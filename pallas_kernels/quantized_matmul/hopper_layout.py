"""The order of a 4-bit weight for `mosaic_gpu`: what a thread multiplies lies side by side.

The unit is a tile of 16 output channels by 128 of k, the A operands of eight `mma.m16n8k16`. Arrays
are `[n / 16, k / 128, words]`, of 32-bit words:

  - codes, 256 words, `[half of k, lane, 4]`: lane = 4 r + c of a warp reads two 16-byte vectors.
    Word i = 4 half + v has the eight codes of multiplication i, nibble p in bits 4 p: channel
    r + 8 (p mod 2), k = 32 (i // 2) + 8 c + 4 (i mod 2) + 2 (p // 2 mod 2) + p // 4. So
    `word >> 4 j & 0x000F000F` is register j of the operand, and the eight numbers of x that go
    with a lane are neighbors in memory. Codes are stored less the lowest one, 0 .. 15.
  - scales, zero points and offsets, 8 words per group: word r has 16-bit numbers of channels r (low
    half) and r + 8. A zero point z is held as the bfloat16 `128 + z - lowest code`, exactly.

What the padding to whole tiles adds has scale 0.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.layout import Layout
from pallas_kernels.quantized_matmul.problem import Weight

ROWS, DEPTH = 16, 128  # channels and k of a tile
CODES = ROWS * DEPTH // 8  # words of its codes
SIXTEEN = ("bfloat16", "float16")


def _shifts() -> jax.Array:
    """Bits that nibble p is shifted by, along (p // 2 mod 2, p // 4, p mod 2), the last axes
    of nine.

    An iota, since custom_partitioning takes no constants.
    """
    shape = (1, 1, 1, 1, 1, 1, 2, 2, 2)
    p2, p4, p1 = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (6, 7, 8))
    return p1 * 4 + p2 * 8 + p4 * 16


def is_hopper(device: Device) -> bool:
    """Whether the kernel was compiled and run for such a device."""
    return any(name in device.kind for name in ("H100", "H200"))


def scale_words(weight: Weight) -> int:
    """Words of scales in a tile."""
    return DEPTH // weight.group * ROWS // 2


def lowest(weight: Weight) -> int:
    """The code that is stored as 0."""
    return -8 if weight.code == "int4" else 0


def supports(weight: Weight) -> str | None:
    """None, or why a weight cannot lie so."""
    if weight.code not in ("int4", "uint4") or weight.values is not None:
        return "its codes are not integers of 4 bits"
    if weight.group not in (32, 64, 128):
        return f"its groups are of {weight.group}, not 32, 64 or 128"
    if weight.scale not in SIXTEEN:
        return f"its scales are {weight.scale}, not of 16 bits"
    if weight.zero is not None and weight.zero not in ("int4", "uint4"):
        return f"its zero points are {weight.zero}, not integers of 4 bits"
    if weight.offset is not None and weight.offset not in SIXTEEN:
        return f"its offsets are {weight.offset}, not of 16 bits"
    if weight.zero is not None and weight.offset is not None:
        return "it has zero points and offsets"
    return None


def _pack_codes(codes: jax.Array, weight: Weight) -> jax.Array:
    unsigned = codes.astype(jnp.int32) - lowest(weight)
    k, n = weight.k, weight.n
    rows, deep = -(-n // ROWS), -(-k // DEPTH)
    whole = jnp.pad(unsigned.astype(jnp.uint32), ((0, deep * DEPTH - k), (0, rows * ROWS - n)))
    # k tile, i // 2, c, i mod 2, p // 2 mod 2, p // 4; n tile, p mod 2, r
    cut = whole.reshape(deep, 4, 4, 2, 2, 2, rows, 2, 8)
    cut = cut.transpose(6, 0, 1, 8, 2, 3, 4, 5, 7)
    word = jnp.sum(cut << _shifts(), axis=(-3, -2, -1), dtype=jnp.uint32)
    word = word.reshape(rows, deep, 2, 2, 8, 4, 2)  # half, i // 2 mod 2, r, c, i mod 2
    word = word.transpose(0, 1, 2, 4, 5, 3, 6).reshape(rows, deep, CODES)
    return lax.bitcast_convert_type(word, jnp.int32)


def _unpack_codes(words: jax.Array, weight: Weight) -> jax.Array:
    rows, deep, _ = words.shape
    word = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, deep, 2, 8, 4, 2, 2)
    word = word.transpose(0, 1, 2, 5, 3, 4, 6).reshape(rows, deep, 4, 8, 4, 2)
    cut = (word[..., None, None, None] >> _shifts()) & jnp.uint32(15)
    codes = cut.transpose(1, 2, 4, 5, 6, 7, 0, 8, 3).reshape(deep * DEPTH, rows * ROWS)
    codes = codes[: weight.k, : weight.n].astype(jnp.int32) + lowest(weight)
    return codes.astype(jnp.int8).astype(weight.code)


def _pack_scale(values: jax.Array, weight: Weight) -> jax.Array:
    if jnp.issubdtype(values.dtype, jnp.integer):
        bias = values.astype(jnp.int8).astype(jnp.float32) + (128 - lowest(weight))
        values = bias.astype(jnp.bfloat16)
    rows, deep, per_tile = -(-weight.n // ROWS), -(-weight.k // DEPTH), DEPTH // weight.group
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
    bits = jnp.pad(bits, ((0, deep * per_tile - bits.shape[0]), (0, rows * ROWS - bits.shape[1])))
    bits = bits.reshape(deep, per_tile, rows, 2, 8)
    word = (bits[..., 0, :] | (bits[..., 1, :] << jnp.uint32(16))).transpose(2, 0, 1, 3)
    return lax.bitcast_convert_type(word.reshape(rows, deep, per_tile * 8), jnp.int32)


def _unpack_scale(words: jax.Array, weight: Weight, name: str) -> jax.Array:
    rows, deep, _ = words.shape
    pair = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, deep, -1, 8)
    both = jnp.stack([pair & jnp.uint32(0xFFFF), pair >> jnp.uint32(16)], -2).astype(jnp.uint16)
    both = both.transpose(1, 2, 0, 3, 4).reshape(-1, rows * ROWS)[: weight.groups, : weight.n]
    if name == "zero":
        bias = lax.bitcast_convert_type(both, jnp.bfloat16).astype(jnp.float32)
        return (bias - (128 - lowest(weight))).astype(jnp.int8)
    return lax.bitcast_convert_type(both, getattr(weight, name))


HOPPER4 = Layout(
    supports=supports,
    pack_codes=_pack_codes,
    unpack_codes=_unpack_codes,
    pack_scale=_pack_scale,
    unpack_scale=_unpack_scale,
    code_axes=("n", "k", ""),
    scale_axes=("n", "k", ""),
    tile=lambda weight: (DEPTH, ROWS),
    serves=is_hopper,
)
