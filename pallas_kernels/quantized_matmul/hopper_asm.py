"""What Pallas has no operation for, in Mosaic GPU: numbers, addresses, inline PTX.

Of the lanes of a warp, lane = 4 r + c.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

SCALAR = plgpu.Layout.WG_SPLAT((128,))  # the one form in which inline code takes a scalar


def number(value: int) -> ir.Value:
    """A 32-bit integer."""
    kind = ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value - (1 << 32) * (value >> 31)))


def real(value: float) -> ir.Value:
    """A float32."""
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), value))


def zero() -> ir.Value:
    """0.0."""
    return real(0.0)


def add(x: ir.Value, n: int) -> ir.Value:
    """`x + n`."""
    return arith.addi(x, number(n)) if n else x


def rank(clustered: bool) -> ir.Value:
    """The place of this block in its cluster."""
    kind = ir.IntegerType.get_signless(32)
    return asm(kind, "mov.u32 $0, %cluster_ctarank;", "=r") if clustered else number(0)


def meet() -> Any:
    """All threads of the block wait for each other."""

    @plgpu.inline_mgpu(arg_types=())
    def bar(ctx: Any) -> None:
        run("bar.sync 0;", "~{memory}")

    return bar


def asm(kind: Any, code: str, constraints: str, *args: ir.Value, effects: bool = False) -> Any:
    """Inline PTX with a result."""
    return llvm.inline_asm(kind, list(args), code, constraints, has_side_effects=effects)


def run(code: str, constraints: str, *args: ir.Value) -> None:
    """Inline PTX without a result."""
    asm(ir.Type.parse("!llvm.void"), code, constraints, *args, effects=True)


def thread() -> ir.Value:
    """Of the block."""
    return utils.thread_idx()


def lane() -> tuple[ir.Value, ir.Value]:
    """(warp of the block, lane of the warp)."""
    return arith.shrui(thread(), number(5)), arith.andi(thread(), number(31))


def place(r: ir.Value, c: ir.Value) -> ir.Value:
    """The first word of a lane's unit among those of a warp, in the order of `hopper_layout`."""
    turned = arith.xori(r, arith.muli(c, number(2)))
    return arith.muli(arith.addi(arith.muli(c, number(8)), turned), number(4))


def begin(ref: ir.Value) -> ir.Value:
    """A pointer to a ref, or to what is one already: for a ref it takes ten operations."""
    return ref if isinstance(ref.type, llvm.PointerType) else utils.memref_ptr(ref)


def at(ref: ir.Value, offset: ir.Value, unit: ir.Type) -> ir.Value:
    """A pointer `offset` units behind a ref or pointer."""
    return past(begin(ref), offset, unit)


def past(base: ir.Value, offset: ir.Value, unit: ir.Type) -> ir.Value:
    """A pointer `offset` units behind another."""
    return llvm.getelementptr(
        base.type, base, [offset], [-2147483648], unit, llvm.GEPNoWrapFlags.none
    )


def near(ref: ir.Value, byte: int = 0) -> ir.Value:
    """The 32-bit address of a ref to shared memory."""
    return add(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)), byte)


def far(address: ir.Value, rank: ir.Value) -> ir.Value:
    """The address of the same place in another block of the cluster."""
    kind = ir.IntegerType.get_signless(32)
    return asm(kind, "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", address, rank)


def load(ref: ir.Value, word: ir.Value, n: int, kind: ir.Type) -> list[ir.Value]:
    """`n` neighboring 32-bit words of shared memory, as one vector load."""
    vector = llvm.load(ir.VectorType.get((n,), kind), at(ref, word, kind), alignment=4 * n)
    return [llvm.extractelement(vector, number(i)) for i in range(n)]


def load_lines(address: ir.Value) -> list[ir.Value]:
    """Of four times eight lines of 16 bytes of shared memory, whose 32-bit addresses lane 8 i + r
    gives, word c of line r of each four: `ldmatrix`.
    """
    i32 = ir.IntegerType.get_signless(32)
    got = asm(
        llvm.StructType.get_literal([i32] * 4),
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}",
        address,
        effects=True,
    )
    return [llvm.extractvalue(i32, got, [i]) for i in range(4)]


def flag(condition: ir.Value) -> ir.Value:
    """A condition as 0 or 1."""
    return arith.extui(ir.IntegerType.get_signless(32), condition)


def add_bytes(address: ir.Value, index: ir.Value, size: int) -> ir.Value:
    """`address + index * size`."""
    return arith.addi(address, arith.muli(index, number(size)))


def held(count: int) -> Any:
    """So many 32-bit words of each thread: a result of inline code or, by its layout, operand."""
    layout = plgpu.Layout.WG_STRIDED((count, 128), vec_size=1)
    return plgpu.ShapeDtypeStruct((count, 128), jnp.int32, layout=layout)


def words(held: Any) -> list[ir.Value]:
    """They themselves."""
    return [llvm.extractelement(v, number(0)) for v in held.registers.flat]


def registers(values: list[ir.Value], kind: ir.Type) -> fa.FragmentedArray:
    """One value of each thread per row of `[len(values), 128]`."""
    one = ir.VectorType.get((1,), kind)
    registers = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        registers[i] = llvm.insertelement(llvm.mlir_undef(one), value, number(0))
    return fa.FragmentedArray(
        _registers=registers,
        _layout=fa.WGStridedFragLayout((len(values), 128), vec_size=1),
        _is_signed=None if isinstance(kind, ir.F32Type) else True,
    )


def mma(a: list[ir.Value], b: list[ir.Value], c: list[ir.Value]) -> list[ir.Value]:
    """`c + a b` on the tensor cores: 16 x 16 by 16 x 8 bfloat16."""
    f32 = ir.F32Type.get()
    got = asm(
        llvm.StructType.get_literal([f32] * 4),
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        *a,
        *b,
        *c,
    )
    return [llvm.extractvalue(f32, got, [i]) for i in range(4)]


def store_pair(ref: ir.Value, place: ir.Value, values: list[ir.Value]) -> None:
    """Two neighboring float32 of shared memory, as one vector store."""
    f32 = ir.F32Type.get()
    vector: Any = llvm.mlir_undef(ir.VectorType.get((2,), f32))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, number(i))
    llvm.store(vector, at(ref, place, f32), alignment=8)
