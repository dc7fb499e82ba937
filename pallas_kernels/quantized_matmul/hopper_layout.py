"""The order of 4- and 8-bit weights for `mosaic_gpu`: what a thread multiplies lies side by side.

The unit is a tile of 16 output channels by 128 of k, the A operands of eight `mma.m16n8k16`. Codes
are `[n / 16, k / 128, words]` of 32 bits. Of 32 times four words lane = 4 r + c of a warp has those
at place 8 c + (r xor 2 c): the eight lanes of a quarter of a warp read different banks, and so do
those of one c. Word p of a lane's four has pair p of the eight numbers of x that are neighbors in
memory, k = 32 b + 8 c + 2 p + e, for the channels r + 8 h: two registers of an operand. Words 2 i
and 2 i + 1 are an operand of `mma.m16n8k16`, whose k is then four numbers of each lane; words p of
lanes 4 r to 4 r + 3 are two of `wgmma`, whose k is in order: `ldmatrix` gives them to lane 4 r + p.

  - `HOPPER4`, 256 words `[b // 2, place, p]`, of both b, less the lowest code. Integers: (b, h, e)
    is nibble 2 (b mod 2) + h + 4 e, so that a shift and the mask 0x000F000F give a register.
    Codebooks: nibble 4 (b mod 2) + 2 h + e, so that a byte names the pair of a register.
  - `HOPPER8`, 512 words `[b, place, p]`: (h, e) is byte h + 2 e. Integers are held plus 128.
  - scales, zero points and offsets of groups of 32, 64 or 128: 16-bit ones in 8 words per group,
    word r with channels r (low half) and r + 8; float32 ones in 16 words per group, by channel.
    A zero point z is held as the bfloat16 `128 + z - lowest code`, exactly.
  - one scale per channel: float32, `[n / 16, 1, 16]`.

What the padding to whole tiles adds has scale 0.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.layout import Layout
from pallas_kernels.quantized_matmul.problem import Weight

ROWS, DEPTH = 16, 128  # channels and k of a tile
GROUPS = (32, 64, 128)
SIXTEEN = ("bfloat16", "float16")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def is_hopper(device: Device) -> bool:
    """Whether the kernel was compiled and run for such a device."""
    return any(name in device.kind for name in ("H100", "H200"))


def per_channel(weight: Weight) -> bool:
    """Whether each channel has one scale, which lies apart from the tiles."""
    return weight.group not in GROUPS


def code_words(weight: Weight) -> int:
    """Words of the codes of a tile."""
    return ROWS * DEPTH // (8 if weight.code in ("int4", "uint4") else 4)


def group_words(weight: Weight, name: str) -> int:
    """Words of the scales, zero points or offsets of a tile; 0 where there are none."""
    if getattr(weight, name) is None or per_channel(weight):
        return 0
    wide = name != "zero" and getattr(weight, name) == "float32"
    return DEPTH // weight.group * ROWS // (1 if wide else 2)


def lowest(weight: Weight) -> int:
    """The code that is stored as 0."""
    return {"int4": -8, "int8": -128}.get(weight.code, 0)


def _scales_support(weight: Weight) -> str | None:
    extras = [n for n in (weight.zero, weight.offset) if n is not None]
    if per_channel(weight):
        if weight.groups > 1:
            return f"its groups are of {weight.group}, not 32, 64, 128 or a whole channel"
        if extras:
            return "it has zero points or offsets per channel"
    if weight.scale not in (*SIXTEEN, "float32"):
        return f"its scales are {weight.scale}, not bfloat16, float16 or float32"
    return None


def _support4(weight: Weight) -> str | None:
    if weight.code not in ("int4", "uint4"):
        return "its codes are not of 4 bits"
    if weight.values is not None:
        if weight.code != "uint4" or len(weight.values) > 16:
            return "a codebook is indexed by uint4 and has at most 16 values"
        if weight.zero is not None or weight.offset is not None:
            return "it has a codebook, and zero points or offsets"
    if weight.zero is not None and weight.zero not in ("int4", "uint4"):
        return f"its zero points are {weight.zero}, not integers of 4 bits"
    if weight.offset is not None and weight.offset not in SIXTEEN:
        return f"its offsets are {weight.offset}, not of 16 bits"
    if weight.zero is not None and weight.offset is not None:
        return "it has zero points and offsets"
    return _scales_support(weight)


def _support8(weight: Weight) -> str | None:
    if weight.code not in ("int8", *FLOAT8) or weight.values is not None:
        return "its codes are not int8 or float8"
    if weight.zero is not None or weight.offset is not None:
        return "it has zero points or offsets"
    return _scales_support(weight)


def _tiles(weight: Weight) -> tuple[int, int]:
    """How many there are along n and along k."""
    return -(-weight.n // ROWS), -(-weight.k // DEPTH)


def _shifts(codebook: bool) -> jax.Array:
    """Bits by which element (b mod 2, h, e) is shifted, along axes 3, 8 and 7 of nine.

    An iota, since custom_partitioning takes no constants.
    """
    shape = (1, 1, 1, 2, 1, 1, 1, 2, 2)
    b, e, h = (lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (3, 7, 8))
    if codebook:
        return b * 16 + h * 8 + e * 4
    return b * 8 + h * 4 + e * 16


def _cut(codes: jax.Array, weight: Weight) -> jax.Array:
    """Codes `[k, n]` as `[n tile, k tile, b, r, c, p, e, h]`."""
    rows, deep = _tiles(weight)
    whole = jnp.pad(codes, ((0, deep * DEPTH - weight.k), (0, rows * ROWS - weight.n)))
    return whole.reshape(deep, 4, 4, 4, 2, rows, 2, 8).transpose(5, 0, 1, 7, 2, 3, 4, 6)


def _joined(cut: jax.Array, weight: Weight) -> jax.Array:
    """The inverse of `_cut`."""
    rows, deep = _tiles(weight)
    whole = cut.transpose(1, 2, 4, 5, 6, 0, 7, 3).reshape(deep * DEPTH, rows * ROWS)
    return whole[: weight.k, : weight.n]


def _placed(units: jax.Array) -> jax.Array:
    """Units `[..., c, r, words]` with r and r xor 2 c in each other's place: its own inverse."""
    lead, words = units.shape[:-3], units.shape[-1]
    placed = []
    for c in range(4):
        bits = units[..., c, :, :].reshape(*lead, 2, 2, 2, words)
        placed.append(lax.rev(bits, [bits.ndim - 4] * (c // 2) + [bits.ndim - 3] * (c % 2)))
    return jnp.stack(placed, len(lead)).reshape(units.shape)


def _pack4(codes: jax.Array, weight: Weight) -> jax.Array:
    rows, deep = _tiles(weight)
    unsigned = (codes.astype(jnp.int32) - lowest(weight)).astype(jnp.uint32)
    cut = _cut(unsigned, weight).reshape(rows, deep, 2, 2, 8, 4, 4, 2, 2)  # b // 2, b mod 2
    spread = cut << _shifts(weight.values is not None)
    units = jnp.sum(spread, axis=(3, 7, 8), dtype=jnp.uint32).swapaxes(3, 4)
    return lax.bitcast_convert_type(_placed(units).reshape(rows, deep, -1), jnp.int32)


def _unpack4(words: jax.Array, weight: Weight) -> jax.Array:
    rows, deep = _tiles(weight)
    units = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, deep, 2, 4, 8, 4)
    word = jnp.expand_dims(_placed(units).swapaxes(3, 4), (3, 7, 8))
    cut = (word >> _shifts(weight.values is not None)) & jnp.uint32(15)
    cut = cut.reshape(rows, deep, 4, 8, 4, 4, 2, 2)
    codes = _joined(cut, weight).astype(jnp.int32) + lowest(weight)
    return codes.astype(jnp.int8).astype(weight.code)


def _pack8(codes: jax.Array, weight: Weight) -> jax.Array:
    rows, deep = _tiles(weight)
    bits = lax.bitcast_convert_type(codes, jnp.uint8)
    if weight.code == "int8":
        bits = bits ^ jnp.uint8(128)
    units = _cut(bits, weight).reshape(rows, deep, 4, 8, 4, 16).swapaxes(3, 4)
    held = _placed(units).reshape(rows, deep, code_words(weight), 4)
    return lax.bitcast_convert_type(held, jnp.int32)


def _unpack8(words: jax.Array, weight: Weight) -> jax.Array:
    rows, deep = _tiles(weight)
    units = lax.bitcast_convert_type(words, jnp.uint8).reshape(rows, deep, 4, 4, 8, 16)
    bits = _joined(_placed(units).swapaxes(3, 4).reshape(rows, deep, 4, 8, 4, 4, 2, 2), weight)
    if weight.code == "int8":
        bits = bits ^ jnp.uint8(128)
    return lax.bitcast_convert_type(bits, weight.code)


def _pack_scale(values: jax.Array, weight: Weight) -> jax.Array:
    rows, deep = _tiles(weight)
    if per_channel(weight):
        padded = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, rows * ROWS - weight.n)))
        return lax.bitcast_convert_type(padded.reshape(rows, 1, ROWS), jnp.int32)
    if jnp.issubdtype(values.dtype, jnp.integer):
        bias = values.astype(jnp.int8).astype(jnp.float32) + (128 - lowest(weight))
        values = bias.astype(jnp.bfloat16)
    per_tile = DEPTH // weight.group
    wide = values.dtype == jnp.float32
    bits = lax.bitcast_convert_type(values, jnp.uint32 if wide else jnp.uint16).astype(jnp.uint32)
    bits = jnp.pad(bits, ((0, deep * per_tile - bits.shape[0]), (0, rows * ROWS - bits.shape[1])))
    if wide:
        word = bits.reshape(deep, per_tile, rows, ROWS).transpose(2, 0, 1, 3)
    else:
        bits = bits.reshape(deep, per_tile, rows, 2, 8)
        word = (bits[..., 0, :] | (bits[..., 1, :] << jnp.uint32(16))).transpose(2, 0, 1, 3)
    return lax.bitcast_convert_type(word.reshape(rows, deep, -1), jnp.int32)


def _unpack_scale(words: jax.Array, weight: Weight, name: str) -> jax.Array:
    rows, deep = _tiles(weight)
    dtype = getattr(weight, name)
    if per_channel(weight):
        held = lax.bitcast_convert_type(words, jnp.float32).reshape(1, rows * ROWS)
        return held[:, : weight.n].astype(dtype)
    per_tile = DEPTH // weight.group
    bits = lax.bitcast_convert_type(words, jnp.uint32)
    if group_words(weight, name) == per_tile * ROWS:
        both = bits.reshape(rows, deep * per_tile, ROWS)
        both = both.transpose(1, 0, 2).reshape(deep * per_tile, rows * ROWS)
        return lax.bitcast_convert_type(both, jnp.float32)[: weight.groups, : weight.n]
    pair = bits.reshape(rows, deep, per_tile, 8)
    both = jnp.stack([pair & jnp.uint32(0xFFFF), pair >> jnp.uint32(16)], -2).astype(jnp.uint16)
    both = both.transpose(1, 2, 0, 3, 4).reshape(-1, rows * ROWS)[: weight.groups, : weight.n]
    if name == "zero":
        bias = lax.bitcast_convert_type(both, jnp.bfloat16).astype(jnp.float32)
        return (bias - (128 - lowest(weight))).astype(jnp.int8)
    return lax.bitcast_convert_type(both, dtype)


def _takes_codes(weight: Weight, codes: str) -> str | None:
    if codes != "int8" or weight.code != "int8" or not per_channel(weight):
        return (
            "of quantized activations its kernels take int8 by int8 with one scale per channel, "
            "and k of more than 128 or of no group's size"
        )
    if weight.n % 8:
        return f"its kernel of int8 activations takes multiples of 8 channels, not {weight.n}"
    return None


def _code_array(weight: Weight) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*_tiles(weight), code_words(weight)), jnp.int32)


def _scale_array(weight: Weight, name: str) -> jax.ShapeDtypeStruct:
    rows, deep = _tiles(weight)
    own = (1, ROWS) if per_channel(weight) else (deep, group_words(weight, name))
    return jax.ShapeDtypeStruct((rows, *own), jnp.int32)


HOPPER4 = Layout(
    supports=_support4,
    pack_codes=_pack4,
    unpack_codes=_unpack4,
    pack_scale=_pack_scale,
    unpack_scale=_unpack_scale,
    code_array=_code_array,
    scale_array=_scale_array,
    code_axes=("n", "k", ""),
    scale_axes=("n", "k", ""),
    tile=lambda weight: (DEPTH, ROWS),
    serves=is_hopper,
    takes_codes=lambda weight, codes: "its kernels take no quantized activations",
)
HOPPER8 = HOPPER4._replace(
    supports=_support8, pack_codes=_pack8, unpack_codes=_unpack8, takes_codes=_takes_codes
)
