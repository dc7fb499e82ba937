"""Carries out MLIR that a kernel's inline code builds, in numpy, for all lanes at once.

Numbers are arrays by lane, or one for all; integers have no sign. Vectors and structs are lists.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ptx_code
from jaxlib.mlir import ir

U32, U64, I32 = np.uint32, np.uint64, np.int32
DTYPES = {"i1": np.bool_, "i32": U32, "i64": U64, "index": U64, "f32": np.float32}


def _signed(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *v: f(*(x.view({4: I32, 8: np.int64}[x.dtype.itemsize]) for x in v))


COMPARE = [  # by the number of an arith.cmpi's predicate
    *(np.equal, np.not_equal),
    *map(_signed, (np.less, np.less_equal, np.greater, np.greater_equal)),
    *(np.less, np.less_equal, np.greater, np.greater_equal),
]
PLAIN: Mapping[str, Callable[..., Any]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.minui": np.minimum,
    "arith.maxsi": lambda *v: _signed(np.maximum)(*v).view(U32),
    "arith.minsi": lambda *v: _signed(np.minimum)(*v).view(U32),
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.addf": np.add,
    "arith.subf": np.subtract,
    "arith.mulf": np.multiply,
    "arith.divf": np.divide,
    "arith.maximumf": np.maximum,
    "arith.minimumf": np.minimum,
    "arith.select": np.where,
    "llvm.add": np.add,
    "llvm.mul": np.multiply,
    "llvm.inttoptr": lambda v: v,
}


class Code:
    """A block of operations, made ready once; values go by numbers, which inner blocks share."""

    def __init__(self, block: Any, machine: Any, names: dict | None = None) -> None:
        self.machine, self.names = machine, {} if names is None else names
        self.arguments = [self._name(v) for v in block.arguments]
        self.ends, self.steps = [], []
        for op in block.operations:
            if op.operation.name == "scf.yield":
                self.ends = [self._name(v) for v in op.operation.operands]
            else:
                self.steps.append(self._step(op.operation))

    def run(self, env: dict, live: np.ndarray) -> None:
        """Carries it out for the live lanes."""
        for step in self.steps:
            step(env, live)

    def _name(self, value: Any) -> int:
        return self.names.setdefault(value, len(self.names))

    def _step(self, op: Any) -> Callable[[dict, np.ndarray], None]:
        given, outs = ([self._name(v) for v in vs] for vs in (op.operands, op.results))
        if op.name in ("scf.if", "scf.for"):
            parts = [Code(b, self.machine, self.names) for r in op.regions for b in r.blocks]
            return (_branch if op.name == "scf.if" else _loop)(parts, given, outs)
        if op.name == "llvm.inline_asm":
            code, constraints = (
                ir.StringAttr(op.attributes[name]).value for name in ("asm_string", "constraints")
            )
            struct = bool(outs) and "struct" in str(op.results[0].type)
            program = ptx_code.parse(code)

            def inline(env: dict, live: np.ndarray) -> None:
                values = [env[n] for n in given]
                found = ptx_code.run(self.machine, program, constraints, values, live)
                if found:
                    env[outs[0]] = found if struct else found[0]

            return inline
        if op.name == "llvm.store":
            return lambda env, live: self.machine.store(env[given[1]], env[given[0]], live)
        if op.name == "llvm.load":
            (n,) = ir.VectorType(op.results[0].type).shape
            dtype = DTYPES[str(ir.VectorType(op.results[0].type).element_type)]

            def load(env: dict, live: np.ndarray) -> None:
                env[outs[0]] = list(self.machine.load(env[given[0]], n, live).view(dtype))

            return load
        value, (out,) = PLAIN.get(op.name) or self._value(op), outs

        def plain(env: dict, live: np.ndarray) -> None:
            env[out] = value(*[env[n] for n in given])

        return plain

    def _value(self, op: Any) -> Callable[..., Any]:
        """An operation as a function of its operands."""
        name, kind = op.name, str(op.results[0].type)
        match name:
            case "arith.constant":
                attribute = op.attributes["value"]
                if kind == "f32":
                    constant = np.float32(ir.FloatAttr(attribute).value)
                else:
                    bits = {"i1": 1, "i32": 32, "i64": 64, "index": 64}[kind]
                    number = ir.IntegerAttr(attribute).value & ((1 << bits) - 1)
                    constant = DTYPES[kind](number)
                return lambda: constant
            case "arith.cmpi":
                return COMPARE[ir.IntegerAttr(op.attributes["predicate"]).value]
            case "arith.extui" | "arith.index_cast" | "arith.trunci" | "llvm.ptrtoint":
                return lambda v: v.astype(DTYPES[kind])
            case "arith.bitcast":
                return lambda v: v.view(DTYPES[kind])
            case "vector.from_elements" | "llvm.bitcast" | "vector.bitcast" | "vector.broadcast":
                return lambda v: v if isinstance(v, list) else [v]  # words stay words
            case "builtin.unrealized_conversion_cast":  # of a ref: its pointer twice, an offset
                return lambda v: [v, v, U64(0)] if "struct" in kind else v
            case "llvm.extractvalue":
                (place,) = ir.DenseI64ArrayAttr(op.attributes["position"])
                return lambda v: v[place]
            case "llvm.extractelement":
                return lambda v, place: v[int(place)]
            case "llvm.insertelement":
                return lambda v, x, at: [*v[: int(at)], x, *v[int(at) + 1 :]]
            case "llvm.mlir.undef":
                return lambda: [None] * ir.VectorType(op.results[0].type).shape[0]
            case "llvm.getelementptr":
                unit = str(ir.TypeAttr(op.attributes["elem_type"]).value)
                return lambda v, index: _past(v, index, {"i32": 4, "f32": 4, "bf16": 2}[unit])
            case "gpu.block_dim":
                return lambda: U64(1)
            case "gpu.thread_id":
                along = "x" in str(op.attributes["dimension"])
                return lambda: self.machine.thread.astype(U64) * U64(along)
        raise NotImplementedError(f"{name}: {op}")


def _past(address: Any, index: Any, size: int) -> Any:
    step = index.view(I32) if index.dtype == U32 else index
    return (address.astype(np.int64) + size * step.astype(np.int64)).astype(U64)


def _branch(parts: list[Code], given: list[int], outs: list[int]) -> Callable[..., None]:
    def branch(env: dict, live: np.ndarray) -> None:
        (condition,) = (env[n] for n in given)
        sides = [live & condition, live & ~condition]
        found = []
        for part, taken in zip(parts, sides, strict=False):
            if taken.any():
                part.run(env, taken)
                found.append((taken, [env[n] for n in part.ends]))
        for i, out in enumerate(outs):
            env[out] = found[0][1][i]
            for taken, values in found[1:]:
                env[out] = np.where(taken, values[i], env[out])

    return branch


def _loop(parts: list[Code], given: list[int], outs: list[int]) -> Callable[..., None]:
    (part,) = parts

    def loop(env: dict, live: np.ndarray) -> None:
        at, end, step = (env[n] for n in given[:3])
        carry = [env[n] for n in given[3:]]
        while (taken := live & _signed(np.less)(at, end)).any():
            env.update(zip(part.arguments, [at, *carry], strict=True))
            part.run(env, taken)
            new = [env[n] for n in part.ends]
            carry = [np.where(taken, *pair) for pair in zip(new, carry, strict=True)]
            at = at + step
        env.update(zip(outs, carry, strict=True))

    return loop
