"""ggml's own matmul (llama.cpp's kernels) on a CPU, by ctypes, from the library that a wheel ships.

`transcribe-cpp-native` ships ggml's CPU backend once per set of instructions, and the one that
scores highest on this CPU is taken, as ggml's own loader does; `xllamacpp`, llama.cpp itself, is
built for AVX2 at most. As in llama.cpp, weights are laid out anew where ggml has kernels for that,
and threads outlive a call; unlike there they sleep between calls, so that others are not slowed.

    pip install transcribe-cpp-native==0.4.1 xllamacpp  # either, or both
    python experiments/ggml_peer.py  # layouts, and errors against numpy's products

"""

import ctypes
import functools
import importlib.util
import os
import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

WHEELS = {  # how rows are called: the package that is asked for, its module and its libraries
    "ggml": ("transcribe-cpp-native", "transcribe_cpp_native", "_native/libggml-cpu-*.so"),
    "xllamacpp": ("xllamacpp", "xllamacpp", "xllamacpp*.so"),
}
F32, TYPES = 0, {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}  # enum ggml_type
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon")
BOUND = 0.01  # of a product's error in the Frobenius norm: ggml rounds blocks of x to int8
CORES = os.cpu_count() or 1
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Params(ctypes.Structure):
    """`ggml_init_params`, the one struct whose fields must be known: it is passed by value."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


PTR, INT, LONG, SIZE, TEXT = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_size_t,
    ctypes.c_char_p,
)
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # result, arguments
    "ggml_version": (TEXT, []),
    "ggml_log_set": (None, [PTR, PTR]),
    "ggml_init": (PTR, [Params]),
    "ggml_free": (None, [PTR]),
    "ggml_tensor_overhead": (SIZE, []),
    "ggml_graph_overhead": (SIZE, []),
    "ggml_new_tensor_2d": (PTR, [PTR, INT, LONG, LONG]),
    "ggml_mul_mat": (PTR, [PTR, PTR, PTR]),
    "ggml_new_graph": (PTR, [PTR]),
    "ggml_build_forward_expand": (None, [PTR, PTR]),
    "ggml_nbytes": (SIZE, [PTR]),
    "ggml_get_data": (PTR, [PTR]),
    "ggml_quantize_chunk": (SIZE, [INT, PTR, PTR, LONG, LONG, LONG, PTR]),
    "dequantize_row_q4_0": (None, [PTR, PTR, LONG]),
    "dequantize_row_q8_0": (None, [PTR, PTR, LONG]),
    "dequantize_row_q4_K": (None, [PTR, PTR, LONG]),
    "ggml_threadpool_params_init": (None, [PTR, INT]),
    "ggml_threadpool_new": (PTR, [PTR]),
    "ggml_threadpool_free": (None, [PTR]),
    "ggml_backend_cpu_reg": (PTR, []),
    "ggml_backend_reg_dev_get": (PTR, [PTR, SIZE]),
    "ggml_backend_reg_get_proc_address": (PTR, [PTR, TEXT]),
    "ggml_backend_dev_init": (PTR, [PTR, TEXT]),
    "ggml_backend_free": (None, [PTR]),
    "ggml_backend_dev_buffer_type": (PTR, [PTR]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [PTR, PTR]),
    "ggml_backend_buft_name": (TEXT, [PTR]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (PTR, [PTR, PTR]),
    "ggml_backend_buffer_free": (None, [PTR]),
    "ggml_backend_tensor_set": (None, [PTR, PTR, SIZE, SIZE]),
    "ggml_backend_cpu_set_n_threads": (None, [PTR, INT]),
    "ggml_backend_cpu_set_threadpool": (None, [PTR, PTR]),
    "ggml_backend_graph_compute": (INT, [PTR, PTR]),
}


@functools.cache
def library(wheel: str) -> ctypes.CDLL | None:
    """The best library of a wheel for this CPU; None if there is none."""
    _, module, pattern = WHEELS[wheel]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    score = lambda lib: lib.ggml_backend_score() if hasattr(lib, "ggml_backend_score") else 1
    found = [ctypes.CDLL(str(p)) for p in sorted(pathlib.Path(spec.origin).parent.glob(pattern))]
    best = max(found, key=score, default=None)
    if best is None or not score(best):
        return None
    for name, (result, arguments) in SIGNATURES.items():
        fn = getattr(best, name)
        fn.restype, fn.argtypes = result, arguments
    best.ggml_log_set(QUIET, None)
    return best


def libraries() -> dict[str, ctypes.CDLL]:
    """By wheel, the libraries that are installed."""
    found = {wheel: library(wheel) for wheel in WHEELS}
    return {wheel: lib for wheel, lib in found.items() if lib is not None}


def about() -> list[str]:
    """A line per wheel: its ggml's version and instructions, or that it is missing."""
    lines = []
    for wheel, (package, _, _) in WHEELS.items():
        if (lib := library(wheel)) is None:
            lines.append(f"{wheel}: {package} is not installed")
        else:
            has = [name for name in INSTRUCTIONS if getattr(lib, f"ggml_cpu_has_{name}")()]
            lines.append(f"{wheel}: ggml {lib.ggml_version().decode()} with {', '.join(has)}")
    return lines


def layouts(lib: ctypes.CDLL, device: int) -> list[int]:
    """Buffer types for weights: those that lay them out for a kernel first, the plain one last."""
    name = b"ggml_backend_dev_get_extra_bufts"
    address = lib.ggml_backend_reg_get_proc_address(lib.ggml_backend_cpu_reg(), name)
    found: list[int] = []
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(PTR), PTR)(address)(device)
        while extra and extra[len(found)]:
            found.append(extra[len(found)])
    return [*found, lib.ggml_backend_dev_buffer_type(device)]


def quantized(lib: ctypes.CDLL, kind: str, w: np.ndarray) -> np.ndarray:
    """The bytes of contiguous float32 rows in a type of ggml's."""
    data = np.empty(w.nbytes, np.uint8)
    size = lib.ggml_quantize_chunk(TYPES[kind], w.ctypes.data, data.ctypes.data, 0, *w.shape, None)
    return data[:size].copy()


def dequantized(lib: ctypes.CDLL, kind: str, data: np.ndarray, n: int, k: int) -> np.ndarray:
    """The n rows of k float32 values that those bytes stand for."""
    out = np.empty((n, k), np.float32)
    decode = getattr(lib, f"dequantize_row_{kind.replace('Q', 'q')}")
    decode(data.ctypes.data, out.ctypes.data, out.size)
    return out


class Product:
    """`x @ w.T`, for x [m, k] in float32 and the n rows of w in a type of ggml's.

    `layout` names the buffer type of the weights: CPU_REPACK is laid out anew, CPU as it came.
    """

    def __init__(self, lib: ctypes.CDLL, kind: str, data: np.ndarray, n: int, x: np.ndarray):
        (m, k), x = x.shape, np.ascontiguousarray(x, np.float32)
        self.lib, device = lib, lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0)
        self.backend = self.kept(lib.ggml_backend_dev_init(device, None), "backend_free")
        self.pool = self.threads()
        for layout in layouts(lib, device):  # as llama.cpp does: the first that has a kernel
            weights, others = self.context(), self.context()
            w = lib.ggml_new_tensor_2d(weights, TYPES[kind], k, n)
            self.allocate(weights, layout)
            row = lib.ggml_new_tensor_2d(others, F32, k, m)
            out = lib.ggml_mul_mat(others, w, row)
            if lib.ggml_backend_dev_supports_op(device, out):
                break
        else:
            raise NotImplementedError(f"this ggml has no product with {kind}")
        self.layout = lib.ggml_backend_buft_name(layout).decode()
        self.graph = lib.ggml_new_graph(others)
        lib.ggml_build_forward_expand(self.graph, out)
        self.allocate(others, lib.ggml_backend_dev_buffer_type(device))
        lib.ggml_backend_tensor_set(w, data.ctypes.data, 0, data.nbytes)
        lib.ggml_backend_tensor_set(row, x.ctypes.data, 0, x.nbytes)
        values = ctypes.cast(lib.ggml_get_data(out), ctypes.POINTER(ctypes.c_float))
        self.out = np.ctypeslib.as_array(values, (m, n))

    def kept(self, made: int | None, free: str) -> int:
        """What ggml made, to be freed with this product."""
        if not made:
            raise MemoryError(f"ggml returned nothing that ggml_{free} could free")
        weakref.finalize(self, getattr(self.lib, f"ggml_{free}"), made)
        return made

    def threads(self) -> int:
        """A pool of a thread per core."""
        params = ctypes.create_string_buffer(4096)  # more than the struct has
        self.lib.ggml_threadpool_params_init(params, CORES)
        return self.kept(self.lib.ggml_threadpool_new(params), "threadpool_free")

    def context(self) -> int:
        """Room for what describes a few tensors and a graph."""
        room = 8 * self.lib.ggml_tensor_overhead() + self.lib.ggml_graph_overhead()
        return self.kept(self.lib.ggml_init(Params(room, None, True)), "free")

    def allocate(self, context: int, layout: int) -> None:
        """Gives a context's tensors their memory."""
        made = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
        self.kept(made, "backend_buffer_free")

    def __call__(self, threads: int) -> np.ndarray:
        """The product, in an array that the next call overwrites."""
        lib = self.lib
        lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        lib.ggml_backend_cpu_set_threadpool(self.backend, self.pool if threads > 1 else None)
        status = lib.ggml_backend_graph_compute(self.backend, self.graph)
        lib.ggml_backend_cpu_set_threadpool(self.backend, None)  # sends the pool's threads to sleep
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self.out


def products(x: np.ndarray, w: np.ndarray) -> dict[str, tuple[Product, float]]:
    """By wheel and type, x [m, k] @ w [k, n] and its error against numpy's, at most BOUND."""
    found = {}
    rows = np.ascontiguousarray(w.T, np.float32)
    for kind in TYPES:
        for wheel, lib in libraries().items():
            data = quantized(lib, kind, rows)
            product = Product(lib, kind, data, len(rows), x)
            want = x @ dequantized(lib, kind, data, *rows.shape).T
            errors = []
            for threads in sorted({1, CORES}):
                product.out.fill(np.nan)
                errors.append(np.linalg.norm(product(threads) - want) / np.linalg.norm(want))
            error = float(np.max(errors))  # NaN if one is
            if not error <= BOUND:
                raise ArithmeticError(f"{wheel} {kind}: relative error {error:.2g}")
            found[f"{wheel} {kind}"] = product, error
    return found


def calls(x: Any, w: Any) -> dict[str, Callable[[], Any]]:
    """Each of the products on one thread and on all cores, their number behind its name."""
    return {
        f"{name}, {threads}": functools.partial(product, threads)
        for name, (product, _) in products(np.asarray(x), np.asarray(w)).items()
        for threads in sorted({1, CORES})
    }


def main() -> None:
    """Prints errors."""
    print("\n".join(about()))
    rng = np.random.default_rng(0)
    for k, n in ((4096, 11008), (1536, 576)):
        w = rng.standard_normal((k, n), np.float32) / k**0.5
        for m in (1, 16, 256):
            for name, (product, error) in products(
                rng.standard_normal((m, k), np.float32), w
            ).items():
                print(f"m = {m}, [{k}, {n}], {name}, {product.layout}: relative error {error:.4f}")


if __name__ == "__main__":
    main()
