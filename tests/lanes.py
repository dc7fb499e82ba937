"""Runs the Hopper kernel for m <= 16 without a GPU: its own code, lane by lane, in numpy.

`on_a_cpu` puts itself between the kernel and Pallas. The kernel's body is called as it is, once per
warpgroup and block; each piece of inline code is built as MLIR once and its operations carried out
for 128 lanes at a time, inline PTX included (`ptx_code`). All memory is one array of bytes that
begins as NaN, with gaps that nothing may write. Copies are done when they are asked for, so that
barriers of copies hold nothing up, and no races are found; warpgroups are threads, which meet at
`bar.sync`.
"""

import itertools
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ptx_code
from jax._src.interpreters import mlir
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from pallas_kernels.quantized_matmul import hopper_kernel

GAP = 256  # bytes between buffers
LANES = 128  # of a warpgroup
COMPARE = [  # by the number of an arith.cmpi's predicate
    *(np.equal, np.not_equal, None, None, None, None),
    *(np.less, np.less_equal, np.greater, np.greater_equal),
]
BINARY = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.minui": np.minimum,
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.addf": np.add,
    "arith.mulf": np.multiply,
    "llvm.add": np.add,
    "llvm.mul": np.multiply,
}


class Ref:
    """A place in memory, or a part of it."""

    def __init__(self, address: int, shape: Sequence[int], dtype: Any, strides: Any = None) -> None:
        self.address, self.shape, self.dtype = address, tuple(shape), np.dtype(dtype)
        sizes = [self.dtype.itemsize, *(self.shape[:0:-1])]
        self.strides = strides or tuple(itertools.accumulate(sizes, np.multiply))[::-1]

    @property
    def at(self) -> "Ref":
        return self

    def __getitem__(self, index: Any) -> "Ref":
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        whole = [isinstance(i, slice) for i in index]
        pairs = zip(index, self.strides, self.shape, whole, strict=True)
        inside = [(int(i), step, n) for i, step, n, w in pairs if not w]
        assert all(0 <= i < n for i, _, n in inside)
        keep = lambda v: tuple(x for x, w in zip(v, whole, strict=True) if w)
        address = self.address + sum(i * step for i, step, _ in inside)
        return Ref(int(address), keep(self.shape), self.dtype, keep(self.strides))


class Machine:
    """The memory of a launch, and what its warpgroups share."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, 0xFF, np.uint8)  # floats: NaN
        self.known = np.zeros(size, bool)  # whether a byte is of a buffer
        self.here = threading.local()

    def take(self, shape: Sequence[int], dtype: Any, data: Any = None) -> Ref:
        """A new buffer."""
        begin = -(-(int(np.flatnonzero(self.known).max(initial=0)) + GAP) // 256) * 256
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert begin + size + GAP <= len(self.bytes)
        self.known[begin : begin + size] = True
        if data is not None:
            self.bytes[begin : begin + size] = np.ascontiguousarray(data).view(np.uint8).ravel()
        return Ref(begin, shape, dtype)

    def give(self, ref: Ref) -> np.ndarray:
        """What a buffer holds."""
        size = int(np.prod(ref.shape)) * ref.dtype.itemsize
        return self.bytes[ref.address : ref.address + size].view(ref.dtype).reshape(ref.shape)

    def untouched(self) -> bool:
        """Whether nothing was written between the buffers."""
        return bool((self.bytes[~self.known] == 0xFF).all())

    def load(self, address: np.ndarray, dtype: Any, live: np.ndarray) -> np.ndarray:
        """A number of each live lane; 0 of the others."""
        size = np.dtype(dtype).itemsize
        places = address.astype(np.int64)[live, None] + np.arange(size)
        assert not (places[:, 0] % size).any()
        assert self.known[places].all()
        got = np.zeros(len(live), dtype)
        got[live] = self.bytes[places].view(dtype)[:, 0]
        return got

    def store(self, address: np.ndarray, value: np.ndarray, live: np.ndarray) -> None:
        """Writes a number of each live lane."""
        size = value.dtype.itemsize
        address = address.astype(np.int64)[live]
        assert not (address % size).any()
        parts = np.ascontiguousarray(value[live]).view(np.uint8).reshape(-1, size)
        self.bytes[address[:, None] + np.arange(size)] = parts


class Inline:
    """A piece of inline code, built for its operands once."""

    def __init__(self, body: Callable[..., Any], types: Any, machine: Machine) -> None:
        self.body, self.types, self.machine, self.built = body, types, machine, None

    def __call__(self, *operands: Any) -> Any:
        flat = jax.tree.leaves(operands, is_leaf=lambda v: isinstance(v, Ref))
        if self.built is None:
            self.built = self._build(operands, flat)
        block, outs, _ = self.built
        values = []
        for v in flat:
            if isinstance(v, Ref):
                values.append(v.address)
            elif v.ndim == 0:
                values.append(np.full(LANES, v).astype(np.uint32))
            else:
                values += list(v[..., None])
        env = dict(zip(block.arguments, values, strict=True))
        self._run(block, env, np.ones(LANES, bool))
        return None if outs is None else np.stack([env[v][:, 0] for v in outs])

    def _build(self, operands: Any, flat: Sequence[Any]) -> Any:
        context = mlir.make_ir_context()
        with context, ir.Location.unknown(context):
            module, kinds = ir.Module.create(), []
            of = {"int32": ir.IntegerType.get_signless(32), "float32": ir.F32Type.get()}
            of |= {
                "uint32": of["int32"],
                "bfloat16": ir.BF16Type.get(),
                "float16": ir.F16Type.get(),
            }
            for v in flat:
                if isinstance(v, Ref):
                    kinds.append(ir.MemRefType.get(v.shape, of[v.dtype.name]))
                elif v.ndim == 0:
                    kinds.append(of["int32"])
                else:
                    kinds += [ir.VectorType.get((1,), of[v.dtype.name])] * len(v)
            with ir.InsertionPoint(module.body):
                block = func.FuncOp("inline", (kinds, [])).add_entry_block()
            given = iter(block.arguments)

            def held(v: Any) -> Any:
                if isinstance(v, Ref):
                    return next(given)
                count = () if v.ndim == 0 else len(v)
                registers = np.empty(count, object)
                for i in np.ndindex(registers.shape):
                    registers[i] = next(given)
                return types.SimpleNamespace(registers=registers)

            with ir.InsertionPoint(block):
                args = jax.tree.map(held, operands, is_leaf=lambda v: isinstance(v, Ref))
                out = self.body(None, *args)
        return block, None if out is None else list(out.registers.flat), module

    def _run(self, block: Any, env: dict, live: np.ndarray) -> None:
        for op in block.operations:
            self._step(op.operation, env, live)

    def _step(self, op: Any, env: dict, live: np.ndarray) -> None:
        name, given = op.name, [env[v] for v in op.operands]
        if name == "scf.yield":
            return
        if name == "scf.if":
            taken = live & given[0]
            if taken.any():
                self._run(op.regions[0].blocks[0], env, taken)
            return
        if name == "llvm.store":
            value = given[0]
            for i in range(value.shape[1]):
                self.machine.store(given[1] + 4 * i, value[:, i], live)
            return
        if name == "llvm.inline_asm":
            constraints = ir.StringAttr(op.attributes["constraints"]).value
            code = ir.StringAttr(op.attributes["asm_string"]).value
            outs = ptx_code.run(self.machine, code, constraints, given, live)
            if outs:
                env[op.results[0]] = outs if "struct" in str(op.results[0].type) else outs[0]
            return
        env[op.results[0]] = self._value(name, op, given, live)

    def _value(self, name: str, op: Any, given: list, live: np.ndarray) -> Any:
        """The one result of an operation."""
        if name in BINARY:
            with np.errstate(over="ignore", invalid="ignore"):
                return BINARY[name](*given)
        match name:
            case "arith.constant":
                kind, attribute = str(op.results[0].type), op.attributes["value"]
                if kind == "f32":
                    return np.full(LANES, ir.FloatAttr(attribute).value, np.float32)
                value = ir.IntegerAttr(attribute).value
                mask = (1 << {"i32": 32, "i64": 64, "index": 64}[kind]) - 1
                return np.full(LANES, value & mask, _unsigned(kind))
            case "arith.cmpi":
                number = ir.IntegerAttr(op.attributes["predicate"]).value
                return COMPARE[number](*given)
            case "arith.select":
                return np.where(*given)
            case "arith.extui" | "arith.index_cast" | "arith.trunci" | "llvm.ptrtoint":
                return given[0].astype(_unsigned(str(op.results[0].type)))
            case "llvm.inttoptr" | "builtin.unrealized_conversion_cast":
                if "struct" not in str(op.results[0].type):
                    return given[0]
                address = np.full(LANES, given[0], np.uint64)
                return [address, address, np.zeros(LANES, np.uint64)]
            case "arith.bitcast":
                return given[0].view({"f32": np.float32, "i32": np.uint32}[str(op.results[0].type)])
            case "llvm.extractvalue":
                (at,) = ir.DenseI64ArrayAttr(op.attributes["position"])
                return given[0][at]
            case "llvm.extractelement":
                return given[0][:, int(given[1][0])]
            case "llvm.mlir.undef":
                (n,) = ir.VectorType(op.results[0].type).shape
                element = str(ir.VectorType(op.results[0].type).element_type)
                return np.zeros((LANES, n), np.float32 if element == "f32" else np.uint32)
            case "llvm.insertelement":
                out = given[0].copy()
                out[:, int(given[2][0])] = given[1]
                return out
            case "llvm.getelementptr":
                size = {"i32": 4, "f32": 4, "bf16": 2}[
                    str(ir.TypeAttr(op.attributes["elem_type"]).value)
                ]
                step = given[1].astype(np.int64)
                step = np.where(given[1].dtype == np.uint32, step.astype(np.int32), step)
                return (given[0].astype(np.int64) + size * step).astype(np.uint64)
            case "llvm.load":
                kind = op.results[0].type
                dtype = np.float32 if "f32" in str(kind) else np.uint32
                (n,) = ir.VectorType(kind).shape
                return np.stack(
                    [self.machine.load(given[0] + 4 * i, dtype, live) for i in range(n)], 1
                )
            case "gpu.block_dim":
                return np.ones(LANES, np.uint64)
            case "gpu.thread_id":
                return (np.arange(LANES) + self.machine.here.wg * LANES).astype(np.uint64) * (
                    "x" in str(op.attributes["dimension"])
                )
        raise NotImplementedError(f"{name}: {op}")


def _unsigned(kind: str) -> Any:
    return np.uint32 if kind == "i32" else np.uint64


def on_a_cpu(monkeypatch: Any, size: int = 2**22) -> Machine:
    """Makes the kernel run here, with `size` bytes of memory."""
    machine = Machine(size)
    here = machine.here

    def inline(arg_types: Any, return_type: Any = None) -> Callable[..., Any]:
        return lambda body: Inline(body, arg_types, machine)

    def loop(begin: Any, end: Any, body: Callable[..., Any], value: Any) -> Any:
        for i in range(int(begin), int(end)):
            value = body(np.int32(i), value)
        return value

    lax = types.SimpleNamespace(
        axis_index=lambda name: np.int32(getattr(here, name)),
        fori_loop=loop,
        rem=np.remainder,
        div=np.floor_divide,
        min=np.minimum,
        broadcast=lambda value, shape: np.asarray(value),
        bitcast_convert_type=jax.lax.bitcast_convert_type,
    )

    def kernel(body: Callable[..., None], **how: Any) -> Callable[..., Any]:
        def call(*operands: jax.Array) -> list[jax.Array]:
            given = [np.asarray(x) for x in operands]
            refs = [machine.take(x.shape, x.dtype, x) for x in given]
            outs = [machine.take(o.shape, o.dtype) for o in how["out_type"]]
            shared = {k: machine.take(s.shape, s.dtype) for k, s in how["scratch_types"].items()}
            groups, failed = how.get("num_threads", 1), []
            for block in range(how["grid"][0]):
                for ref in shared.values():
                    machine.give(ref).view(np.uint8)[:] = 0xFF
                machine.meet = threading.Barrier(groups)

                def warpgroup(wg: int) -> None:
                    here.wg, here.n = wg, block  # noqa: B023
                    try:
                        body(*refs, *outs, **shared)
                    except BaseException as error:  # noqa: BLE001
                        failed.append(error)
                        machine.meet.abort()

                threads = [threading.Thread(target=warpgroup, args=(i,)) for i in range(groups)]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                if failed:
                    raise failed[0]
            assert machine.untouched()
            return [jnp.asarray(machine.give(o)) for o in outs]

        return call

    monkeypatch.setattr(plgpu, "inline_mgpu", inline)
    monkeypatch.setattr(plgpu, "kernel", kernel)
    monkeypatch.setattr(hopper_kernel, "lax", lax)
    monkeypatch.setattr(hopper_kernel, "follow", lambda: None)
    return machine
