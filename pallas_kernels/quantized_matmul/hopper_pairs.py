"""The table of a codebook in shared memory: a byte of two codes -> the two bfloat16 of a register.

Word `[byte, lane]`: each lane of a warp reads a bank of its own, whatever the codes.
"""

# The decorator of inline code keeps the type of what it wraps, which takes one argument more.
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

from collections.abc import Sequence
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels.quantized_matmul import hopper_asm as ptx
from pallas_kernels.quantized_matmul.hopper_decode import Pairs, codebook
from pallas_kernels.quantized_matmul.mosaic_gpu import PAIR_TABLE

ENTRIES, LANES = PAIR_TABLE
STRIDE = 4 * LANES  # bytes


def write_pairs(values: Sequence[float], warpgroups: int) -> Any:
    """Writes the table. Eight threads write an entry, 16 bytes each, then one further on."""
    threads = 128 << (warpgroups.bit_length() - 1)  # where there are more, they write the same
    at_once = threads // 8
    decode = codebook(values)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def write(ctx, pairs):
        thread = arith.andi(ptx.thread(), ptx.number(threads - 1))
        first, part = arith.shrui(thread, ptx.number(3)), arith.andi(thread, ptx.number(7))
        start = ptx.add_bytes(ptx.add_bytes(ptx.near(pairs), first, STRIDE), part, 16)
        in_each_byte = arith.muli(first, ptx.number(0x01010101))
        for begin in range(0, ENTRIES, 4 * at_once):
            entries = [begin + i * at_once for i in range(4)]
            word = ptx.add(in_each_byte, sum(entry << 8 * i for i, entry in enumerate(entries)))
            for entry, pair in zip(entries, decode(word), strict=True):
                ptx.run(
                    "st.shared.v4.b32 [$0], {$1, $1, $1, $1};",
                    "r,r,~{memory}",
                    ptx.add(start, entry * STRIDE),
                    pair,
                )

    return write


def looked_up(pairs: ir.Value, lane: ir.Value) -> Pairs:
    """What `hopper_decode` has for a codebook, by the table. `dp4a` takes a byte, times a stride,
    to the lane's own word of an entry. Volatile: the compiler would ask for so many pairs ahead
    that their registers spill.
    """
    i32, own = ir.IntegerType.get_signless(32), ptx.add_bytes(ptx.near(pairs), lane, 4)

    def pair(word: ir.Value, i: int) -> ir.Value:
        code = f"dp4a.u32.u32 place, $1, {STRIDE << 8 * i:#x}, $2;"
        code = f"{{ .reg .b32 place; {code} ld.volatile.shared.b32 $0, [place]; }}"
        return ptx.asm(i32, code, "=r,r,r", word, own)

    return lambda word, block: [pair(word, 2 * block + i) for i in range(2)]
