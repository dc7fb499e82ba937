"""Runs the Hopper kernels for decoding without a GPU: their own code, lane by lane, in numpy.

`on_a_cpu` puts itself between a kernel and Pallas. The kernel's body is called as it is, once for
many blocks: what Pallas gives as a scalar is an array by lane here, and of what the body leaves to
some blocks only their lanes are live. Each piece of inline code is built as MLIR once and its
operations carried out for all lanes at a time (`mlir_code`), inline PTX included (`ptx_code`).

All lanes of all blocks of a cluster run in step, so a wait that is not over when it is reached
never would be: that is an error, as is a barrier that gets more or less than it expects, and memory
that two warps use without a barrier in between (`lane_memory`). Memory begins as NaN, with gaps
that nothing may read or write. Copies are done when they are asked for; to read them before their
barrier says so is an error too, as is to read activations or to write before `follow`. What lanes
of one warp do in turn, or a fence of memory, is not seen.
"""

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func
from lane_memory import GROUP, Machine
from mlir_code import Code

from pallas_kernels.decode_attention import hopper_kernel as attention_kernel
from pallas_kernels.quantized_matmul import hopper_kernel

TOGETHER = 2048  # lanes, or those of a cluster


class Ref:
    """A place in memory, or a part of it; with another address for each lane, perhaps."""

    def __init__(
        self, machine: Machine, address: Any, shape: Sequence[int], dtype: Any, strides: Any = None
    ) -> None:
        self.machine, self.address = machine, address
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
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
        inside = [(i, step, n) for i, step, n, w in pairs if not w]
        live = self.machine.live
        for i, _, n in inside:
            assert ((i >= 0) & (i < n) | ~live).all()
        keep = lambda v: tuple(x for x, w in zip(v, whole, strict=True) if w)
        address = self.address + sum(np.asarray(i, np.int64) * int(step) for i, step, _ in inside)
        return Ref(self.machine, address, keep(self.shape), self.dtype, keep(self.strides))

    @property
    def array(self) -> np.ndarray:
        """The numbers of a buffer; of one in shared memory: those of the first lane's block."""
        begin, size = np.ravel(self.address)[0], int(np.prod(self.shape)) * self.dtype.itemsize
        held = self.machine.bytes[begin : begin + size]
        return held.view(self.dtype).reshape(self.shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        assert index is ...
        self.array[...] = value


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


class Inline:
    """A piece of inline code, built for its operands once."""

    def __init__(self, body: Callable[..., Any], machine: Machine) -> None:
        self.body, self.machine, self.built = body, machine, None

    def __call__(self, *operands: Any) -> Any:
        flat = jax.tree.leaves(operands, is_leaf=_is_ref)
        if self.built is None:
            self.built = self._build(operands, flat)
        code, outs, _ = self.built
        values: list[Any] = []
        for v in flat:
            if isinstance(v, Ref):
                values.append(np.asarray(v.address).astype(np.uint64))
            elif np.ndim(v) < 2:
                values.append(np.asarray(v).astype(np.uint32))
            else:  # registers, of one number of each lane or of several
                values += [[row] if np.ndim(v) == 2 else list(row) for row in v]
        env = dict(zip(code.arguments, values, strict=True))
        live = self.machine.live
        with np.errstate(all="ignore"):
            code.run(env, live)
        whole = lambda numbers: np.stack([np.broadcast_to(v, live.shape) for v in numbers])
        if outs is None:
            return None
        held = np.stack([whole(env[n]) for n in outs])
        return held[:, 0] if held.shape[1] == 1 else held

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
                elif np.ndim(v) < 2:
                    kinds.append(of["int32"])
                else:
                    size = 1 if np.ndim(v) == 2 else len(v[0])
                    kinds += [ir.VectorType.get((size,), of[v.dtype.name])] * len(v)
            with ir.InsertionPoint(module.body):
                block = func.FuncOp("inline", (kinds, [])).add_entry_block()
            given = iter(block.arguments)

            def held(v: Any) -> Any:
                if isinstance(v, Ref):
                    return next(given)
                registers = np.empty(() if np.ndim(v) < 2 else len(v), object)
                for i in np.ndindex(registers.shape):
                    registers[i] = next(given)
                return types.SimpleNamespace(registers=registers)

            with ir.InsertionPoint(block):
                out = self.body(None, *jax.tree.map(held, operands, is_leaf=_is_ref))
            code = Code(block, self.machine)
        outs = None if out is None else [code.names[v] for v in out.registers.flat]
        return code, outs, module


class Launch:
    """What `plgpu.kernel` gives: all clusters of a grid, some at a time."""

    def __init__(self, machine: Machine, body: Callable[..., None], how: dict[str, Any]) -> None:
        self.machine, self.body = machine, body
        (self.grid,) = how["grid"]
        (self.cluster,), self.groups = how.get("cluster", (1,)), how.get("num_threads", 1)
        self.scratch, self.out_type = how.get("scratch_types", {}), how["out_type"]
        self.axes = {
            how.get("grid_names", ("",))[0]: "n",
            how.get("cluster_names", ("",))[0]: "rank",
            how.get("thread_name", ""): "wg",
        }

    def __call__(self, *operands: Any) -> Any:
        machine = self.machine
        new = lambda v, data=None: Ref(
            machine, machine.take(v.shape, v.dtype, data), v.shape, v.dtype
        )
        refs = [v if isinstance(v, Ref) else new(v, np.asarray(v)) for v in operands]
        outs = [new(v) for v in jax.tree.leaves(self.out_type)]
        activations = [v for v in refs if v.dtype.name == "bfloat16" and len(v.shape) > 1]
        span = lambda v: (v.address, v.address + int(np.prod(v.shape)) * v.dtype.itemsize)
        machine.late = [span(v) for v in (*activations, *outs)]
        machine.earlier = {
            v.address: np.asarray(machine.guess, np.uint32)
            for v in refs
            if machine.guess is not None and v.dtype.name == "int32" and len(v.shape) == 1
        }
        at_once = max(1, TOGETHER // (self.cluster * self.groups * GROUP))
        sizes = [int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in self.scratch.values()]
        places = machine.windows(sizes, min(at_once, self.grid) * self.cluster)
        machine.axes = self.axes
        for first in range(0, self.grid, at_once):
            count = min(at_once, self.grid - first)
            machine.begin(first, count, self.cluster, self.groups)
            own = machine.shared + machine.block * machine.window
            shared = {
                name: Ref(machine, own + place, s.shape, s.dtype)
                for place, (name, s) in zip(places, self.scratch.items(), strict=True)
            }
            self.body(*refs, *outs, **shared)
            assert machine.followed or not refs, "never waits for the kernel in front"
            machine.finish()
        results = [jnp.asarray(o.array) for o in outs]
        return results if isinstance(self.out_type, list) else results[0]


def _lax(machine: Machine) -> Any:
    """What the kernels use of `jax.lax`, by lane."""

    def only(live: np.ndarray, act: Callable[[], Any]) -> Any:
        before, machine.live = machine.live, machine.live & live
        try:
            return act() if machine.live.any() else None
        finally:
            machine.live = before

    def loop(begin: int, end: Any, body: Callable[..., Any], value: Any) -> Any:
        assert np.ndim(value) == 0  # a carry that is not used
        for i in range(begin, int(np.max(end))):
            only(np.asarray(i < end), lambda: body(np.int32(i), value))  # noqa: B023
        return value

    def switch(index: Any, branches: Sequence[Callable[[], None]]) -> None:
        for i, act in enumerate(branches):
            only(index == i, act)

    def axis_index(name: str) -> np.ndarray:
        held = {"n": machine.n, "rank": machine.rank, "wg": machine.thread // GROUP}
        return held[machine.axes[name]].astype(np.int32)

    return types.SimpleNamespace(
        axis_index=axis_index,
        fori_loop=loop,
        switch=switch,
        select=np.where,
        rem=np.remainder,
        div=np.floor_divide,
        min=np.minimum,
        broadcast=lambda value, shape: value,
        bitcast_convert_type=jax.lax.bitcast_convert_type,
    )


def _run_state(machine: Machine) -> Callable[..., Any]:
    """`pl.run_state` in place."""

    def run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
        def run(values: Sequence[Any]) -> list[jax.Array]:
            new = lambda v: Ref(machine, machine.take(v.shape, v.dtype, v), v.shape, v.dtype)
            refs = [new(np.asarray(v)) for v in values]
            body(refs)
            return [jnp.asarray(ref.array) for ref in refs]

        return run

    return run_state


def on_a_cpu(monkeypatch: Any, size: int = 2**25) -> Machine:
    """Makes the kernels run here, with `size` bytes of memory."""
    machine = Machine(size)
    inline = lambda arg_types, return_type=None: lambda body: Inline(body, machine)
    monkeypatch.setattr(plgpu, "inline_mgpu", inline)
    monkeypatch.setattr(plgpu, "kernel", lambda body, **how: Launch(machine, body, how))
    for module in (hopper_kernel, attention_kernel):
        monkeypatch.setattr(module, "lax", _lax(machine))
        monkeypatch.setattr(module, "follow", machine.follow)
    by_lane = {**vars(jnp), "broadcast_to": lambda value, shape: value}
    monkeypatch.setattr(attention_kernel, "jnp", types.SimpleNamespace(**by_lane))
    pallas = types.SimpleNamespace(run_state=_run_state(machine))
    monkeypatch.setattr(attention_kernel, "pl", pallas)
    return machine
