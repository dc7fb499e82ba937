"""Layouts for CPUs: rows of output channels, `[n, k]`, so that a dot reads both operands along k.

`NIBBLES`: two 4-bit codes to a byte. A run `[c_0 .. c_r-1]` of one channel, a group or an even part
of one, lies as r / 2 bytes, byte i holding c_i in its low half and c_(i + r/2) in its high half
("planar"): both halves decode to neighbors, so nothing is interleaved. Signed codes are stored
plus 8.

`BYTES`: one code to a byte, as it is.

The last group is padded with zeros to the length of the others, an odd single one by one more.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.layout import Layout
from pallas_kernels.quantized_matmul.problem import Weight

MAX_VALUES = 64  # of a codebook: its tree of selects is part of the compiled program
SIGN = 8  # what is added to a signed 4-bit code


def padded_group(weight: Weight, nibbles: bool) -> int:
    """Codes per group as they lie in memory."""
    group = min(weight.group, weight.k)
    return group + group % 2 if nibbles else group


def run_length(weight: Weight) -> int:
    """Codes per run of `NIBBLES`; short ones, so that a mesh can cut between them."""
    group = padded_group(weight, nibbles=True)
    return next((r for r in (128, 64, 32) if group % r == 0), group)


def _nibbles_support(weight: Weight) -> str | None:
    if weight.code not in ("int4", "uint4"):
        return f"{weight.code} codes do not fit half a byte"
    if weight.values is not None and (weight.code != "uint4" or len(weight.values) > 16):
        return "a codebook of 4-bit codes is indexed by uint4 and has at most 16 values"
    if weight.groups > 1 and weight.group % 2:
        return f"groups of {weight.group} codes do not fill bytes"
    return None


def _pack_nibbles(codes: jax.Array, weight: Weight) -> jax.Array:
    # packed before it is turned: a rounding in the same jit then never writes its 4-bit codes
    unsigned = codes.astype(jnp.int8) + jnp.int8(SIGN if weight.code == "int4" else 0)
    length = weight.groups * padded_group(weight, nibbles=True)
    padded = jnp.pad(unsigned.astype(jnp.uint8), ((0, length - weight.k), (0, 0)))
    halves = padded.reshape(-1, 2, run_length(weight) // 2, weight.n)
    packed = halves[:, 0] | (halves[:, 1] << jnp.uint8(4))
    return packed.reshape(-1, weight.n).T


def _unpack_nibbles(packed: jax.Array, weight: Weight) -> jax.Array:
    runs = packed.T.reshape(-1, run_length(weight) // 2, weight.n)
    halves = jnp.stack([runs & jnp.uint8(15), runs >> jnp.uint8(4)], axis=1)
    codes = halves.reshape(-1, weight.n)[: weight.k].astype(jnp.int8)
    return (codes - jnp.int8(SIGN if weight.code == "int4" else 0)).astype(weight.code)


def _bytes_support(weight: Weight) -> str | None:
    if weight.code not in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2"):
        return f"{weight.code} codes are no whole bytes"
    if weight.values is not None and (weight.code != "uint8" or len(weight.values) > MAX_VALUES):
        return f"a codebook is indexed by uint8 and has at most {MAX_VALUES} values"
    return None


def _pack_bytes(codes: jax.Array, weight: Weight) -> jax.Array:
    return _pad(codes.T, weight.groups * padded_group(weight, nibbles=False))


def _unpack_bytes(rows: jax.Array, weight: Weight) -> jax.Array:
    return rows[:, : weight.k].T


def _held(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which scales, zero points and offsets lie: whole bytes."""
    small = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8
    return jnp.dtype("uint8" if dtype == jnp.uint4 else "int8") if small else dtype


def _pack_scale(scale: jax.Array, weight: Weight) -> jax.Array:
    return scale.astype(_held(scale.dtype)).T


def _scale_array(weight: Weight, name: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((weight.n, weight.groups), _held(jnp.dtype(getattr(weight, name))))


def _nibble_array(weight: Weight) -> jax.ShapeDtypeStruct:
    length = weight.groups * padded_group(weight, nibbles=True)
    return jax.ShapeDtypeStruct((weight.n, length // 2), jnp.uint8)


def _byte_array(weight: Weight) -> jax.ShapeDtypeStruct:
    length = weight.groups * padded_group(weight, nibbles=False)
    return jax.ShapeDtypeStruct((weight.n, length), weight.code)


def _unpack_scale(scale: jax.Array, weight: Weight, name: str) -> jax.Array:
    return scale.T


def _pad(rows: jax.Array, length: int) -> jax.Array:
    return jnp.pad(rows, ((0, 0), (0, length - rows.shape[1])))


NIBBLES = Layout(
    supports=_nibbles_support,
    pack_codes=_pack_nibbles,
    unpack_codes=_unpack_nibbles,
    pack_scale=_pack_scale,
    unpack_scale=_unpack_scale,
    code_array=_nibble_array,
    scale_array=_scale_array,
    code_axes=("n", "k"),
    scale_axes=("n", "k"),
    tile=lambda weight: (weight.group if weight.groups > 1 else run_length(weight), 1),
    serves=lambda device: device.platform == "cpu",
)
BYTES = NIBBLES._replace(
    supports=_bytes_support,
    pack_codes=_pack_bytes,
    unpack_codes=_unpack_bytes,
    code_array=_byte_array,
    tile=lambda weight: (weight.group if weight.groups > 1 else 1, 1),
)
