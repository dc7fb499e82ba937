"""How words of codes become registers of two bfloat16, of the A operand of a product.

Each is exact but for a codebook, whose values are rounded to bfloat16. In the order of
`hopper_layout`; the tests carry the instructions out in numpy.

An integer of up to eight bits is a bfloat16 as it is, times 2 ** 133: numbers whose exponent is 0
or 1 lie 2 ** -133 apart. An 8-bit float is one where its bits are moved to, times another power.
So bits in their places (`RAW`) are operands of x times a power of two, or one `fma` makes of them
what is wanted.
"""

# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_codebook import codebook_bytes
from pallas_kernels.quantized_matmul.problem import Weight

# a word, of 4-bit codes also which 32 along k -> the registers of channels r and r + 8
Pairs: TypeAlias = Callable[[ir.Value, int], list[ir.Value]]
BOTH = 0x0001_0001  # a 16-bit number in both halves of a register


def _word(code: str, *args: ir.Value) -> ir.Value:
    return ptx.asm(ir.IntegerType.get_signless(32), code, "=r" + ",r" * len(args), *args)


def pair(value: float) -> ir.Value:
    """A number that is a bfloat16, in both halves of a word."""
    bits = int(np.asarray(value, jnp.bfloat16).view(np.uint16))
    return ptx.number(bits * BOTH)


def fma(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """`a b + c` of pairs of bfloat16, rounded once."""
    return _word("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)


def times(a: ir.Value, b: ir.Value) -> ir.Value:
    """`a b` of pairs of bfloat16, rounded."""
    return _word("mul.rn.bf16x2 $0, $1, $2;", a, b)


def _right(word: ir.Value, bits: int) -> ir.Value:
    return arith.shrui(word, ptx.number(bits)) if bits else word


def _left(word: ir.Value, bits: int) -> ir.Value:
    return arith.shli(word, ptx.number(bits)) if bits else word


def _choose(mask: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """`mask & a | ~mask & b`, one instruction."""
    return _word("lop3.b32 $0, $1, $2, $3, 0xCA;", mask, a, b)


def choose_bytes(a: ir.Value, b: ir.Value, selector: ir.Value) -> ir.Value:
    """The bytes of `b:a` that the nibbles of `selector` name."""
    return _word("prmt.b32 $0, $1, $2, $3;", a, b, selector)


class Raw(NamedTuple):
    """Codes as bits of bfloat16.

    Attributes:
      bits: of a word.
      powers: the registers of channels r and of r + 8 are u 2 ** -power of a stored code u.
    """

    bits: Pairs
    powers: tuple[int, int]

    @property
    def unit(self) -> float:
        """By what sums of products with x GROWN are too small, of channels r."""
        return 2.0 ** self.powers[0] / GROWN

    @property
    def second(self) -> float:
        """Registers of channels r + 8 over those of r, of one code."""
        return 2.0 ** (self.powers[0] - self.powers[1])


def _nibbles(word: ir.Value, block: int) -> list[ir.Value]:
    moved = _right(word, 8 * block)
    return [arith.andi(moved, ptx.number(mask * BOTH)) for mask in (0xF, 0xF0)]


def _bytes(word: ir.Value, block: int) -> list[ir.Value]:
    return [choose_bytes(word, ptx.number(0), ptx.number(s)) for s in (0x4240, 0x4341)]


def _float8(mantissa: int) -> Pairs:
    """The bits of four numbers where bfloat16 has them. NaN and Inf become finite."""
    shift = 7 - mantissa
    kept = (0x8000 | 0x7F << shift) * BOTH

    def bits(word: ir.Value, block: int) -> list[ir.Value]:
        # bytes, and eight times their signs: even, odd ...
        moved = [choose_bytes(word, word, ptx.number(signs)) for signs in (0xA280, 0xB391)]
        return [arith.andi(_left(v, shift), ptx.number(kept)) for v in moved]

    return bits


# by what x is multiplied for m <= 16: |x| >= 2 ** 64 becomes infinite; sums of 4-bit and int8 codes
# times x, before scales, lose bits below 2 ** -57
GROWN = 2.0**64
RAW: Mapping[str, Raw] = {
    "int4": Raw(_nibbles, (133, 129)),
    "int8": Raw(_bytes, (133, 133)),
    "float8_e4m3fn": Raw(_float8(3), (120, 120)),
    "float8_e5m2": Raw(_float8(2), (112, 112)),
}


def decode_of(weight: Weight) -> str:
    """The key of RAW for its codes, or "codebook"."""
    if weight.values is not None:
        return "codebook"
    return weight.code if "8" in weight.code else "int4"


def codebook(values: Sequence[float]) -> Callable[[ir.Value], list[ir.Value]]:
    """A word's eight values, a pair of each byte, by the byte permutation: three bits choose from
    each half of the table, the highest bit between the halves.
    """

    def pairs(word: ir.Value) -> list[ir.Value]:
        table = [ptx.number(v) for v in codebook_bytes(values)]
        three, even = arith.andi(word, ptx.number(0x77777777)), _left(word, 4)
        out = []
        for half, signs in enumerate((0xD9C8, 0xFBEA)):  # of bytes, each eight times: even, odd ...
            selector = _right(three, 16 * half)
            mask = choose_bytes(even, word, ptx.number(signs))
            planes = []
            for at in (0, 4):
                lower = choose_bytes(table[at], table[at + 1], selector)
                upper = choose_bytes(table[at + 2], table[at + 3], selector)
                planes.append(_choose(mask, upper, lower))
            out += [choose_bytes(*planes, ptx.number(s)) for s in (0x5140, 0x7362)]
        return out

    return pairs


def halves(word: ir.Value, dtype: str) -> list[ir.Value]:
    """The two 16-bit floats of a word, as float32."""
    f32 = ir.F32Type.get()
    if dtype == "float16":
        code = "{ .reg .b16 h, l; mov.b32 {l, h}, $1; cvt.f32.f16 $0, SIDE; }"
        return [ptx.asm(f32, code.replace("SIDE", side), "=f,r", word) for side in "lh"]
    high = arith.andi(word, ptx.number(0xFFFF0000))
    return [arith.bitcast(f32, v) for v in (_left(word, 16), high)]
