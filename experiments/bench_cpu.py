"""Matmuls of prepared weights on a CPU, as ratios to the float32 dot of that shape, beside peers.

Everything takes turns in one process; the medians count, and ratios of them are printed. Absolute
times say little on a shared machine: the load is printed too. `qwix` is XLA's own handling of a
quantized operand, as `qwix.dot_general` reaches it; torch's int8 is its dynamic quantization
(`quantize_dynamic`); bitsandbytes runs its kernels for CPUs. llama.cpp's are ggml's mul_mat, from
the wheels of `ggml_peer.py`, on one thread or all cores (behind the comma), whichever is faster.
Bars: int4_g128 <= 0.8 at m = 1, about 1 at 16, 1.6 at 256; nf4 <= 1.1 at
m = 1; int8/int8_token <= 0.8 at m = 1, 0.6 at 16; int8 <= 1.3 at 256; int4_g128 at least 3x as fast
as qwix at m = 1.

    # optional: what is missing is named, not timed
    pip install qwix==0.1.8 torch bitsandbytes transcribe-cpp-native==0.4.1 xllamacpp
    python experiments/bench_cpu.py [--pause 0.02]

Threads of OpenMP (torch, bitsandbytes, xllamacpp) spin for some 8 ms after their work, beside what
comes next: the float32 dot at m = 1, for one. A pause lets them fall asleep first, but then every
call pays for waking its own.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = ((4096, 11008), (1536, 576))  # [k, n]: a 7B model's, SmolLM2's
ROWS = (1, 16, 256)
SPECS = ("int8", "int8/int8_token", "int4_g128", "nf4_g64", "uint4_g32")
RUNS = 11  # of each, after one to compile
BARS = {  # (spec, m): ratio to float32 at the first shape
    ("int4_g128", 1): 0.8,
    ("int4_g128", 16): 1.05,
    ("int4_g128", 256): 1.6,
    ("nf4_g64", 1): 1.1,
    ("int8/int8_token", 1): 0.8,
    ("int8/int8_token", 16): 0.6,
    ("int8", 256): 1.3,
}


def medians(
    calls: dict[str, Callable[[], Any]], runs: int = RUNS, pause: float = 0.0
) -> dict[str, float]:
    """Seconds of each call, interleaved, with a pause before each."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(runs):
        for name, call in calls.items():
            time.sleep(pause)
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def compiled(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`fn(*args)`, compiled for these arguments."""
    import jax

    program = jax.jit(fn).lower(*args).compile()
    return lambda: program(*args)


def qwix_call(x: Any, w: Any) -> Callable[[], Any]:
    """Qwix's int4 in groups of 128."""
    from qwix._src.core import dot_general, qarray

    how = qarray.HowToQuantize(qtype="int4", channelwise_axes=[1], tiled_axes={0: 128})
    q = qarray.quantize(w, how)
    return compiled(lambda x, q: dot_general.dot_general(x, q, (((1,), (0,)), ((), ()))), x, q)


def torch_call(x: Any, w: Any) -> Callable[[], Any]:
    """Torch's dynamic int8 linear."""
    import numpy as np
    import torch

    linear = torch.nn.Linear(*w.shape, bias=False)
    linear.weight.data = torch.from_numpy(np.array(w.T))
    q = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})
    row = torch.from_numpy(np.array(x))
    return lambda: q(row).numpy()


def bitsandbytes_call(kind: str, x: Any, w: Any) -> Callable[[], Any]:
    """A linear layer of bitsandbytes: nf4 in blocks of 64, or LLM.int8() without outliers."""
    import bitsandbytes as bnb
    import numpy as np
    import torch

    weight = torch.from_numpy(np.array(w.T))
    if kind == "nf4":
        linear = bnb.nn.Linear4bit(*w.shape, bias=False, quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", blocksize=64
        )
    else:
        linear = bnb.nn.Linear8bitLt(*w.shape, bias=False, has_fp16_weights=False)
        linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    linear, row = linear.to("cpu").eval(), torch.from_numpy(np.array(x))

    def call() -> Any:
        with torch.inference_mode():
            return linear(row).numpy()

    return call


PEERS = {
    "qwix int4_g128": ("qwix", qwix_call),
    "torch dynamic int8": ("torch", torch_call),
    "bitsandbytes nf4": ("bitsandbytes", functools.partial(bitsandbytes_call, "nf4")),
    "bitsandbytes int8": ("bitsandbytes", functools.partial(bitsandbytes_call, "int8")),
}


def matmuls(k: int, n: int, m: int, pause: float = 0.0) -> None:
    """Prints a table of one shape."""
    import ggml_peer
    import jax

    import qjax

    w = jax.random.normal(jax.random.key(0), (k, n)) / k**0.5
    x = jax.random.normal(jax.random.key(1), (m, k))
    calls = {"float32": compiled(lambda x, w: x @ w, x, w)}
    for spec in SPECS:
        if k % 128 and spec.endswith("g128"):
            continue
        fn = qjax.quantized(lambda x, w: x @ w)
        calls[spec] = compiled(fn, x, qjax.prepare(qjax.quantize(w, spec, 0)))
    for name, (module, make) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"  {name}: {module} is not installed")
        else:
            calls[name] = make(x, w)
    found = best_threads(medians(calls | ggml_peer.calls(x, w), pause=pause))
    print(f"m = {m}, [{k}, {n}], load {os.getloadavg()[0]:.1f}")
    for name, seconds in found.items():
        ratio = seconds / found["float32"]
        bar = BARS.get((name, m)) if (k, n) == SHAPES[0] else None
        held = "" if bar is None else f"  bar {bar}: {'met' if ratio <= bar else 'missed'}"
        print(f"  {name:22} {1e3 * seconds:8.3f} ms  {ratio:6.2f} x float32{held}")
    peer = "qwix int4_g128"
    if m == 1 and peer in found and "int4_g128" in found:
        times = found[peer] / found["int4_g128"]
        print(f"  int4_g128 is {times:.1f}x as fast as qwix (bar 3: {verdict(times >= 3)})")


def best_threads(found: dict[str, float]) -> dict[str, float]:
    """Of what ran on several numbers of threads (the number behind a comma), the fastest."""
    best: dict[str, str] = {}
    for name in found:
        row = name.partition(",")[0]
        best[row] = min(best.get(row, name), name, key=found.__getitem__)
    return {name: found[name] for name in best.values()}


def verdict(held: bool) -> str:
    """How a bar is printed."""
    return "met" if held else "missed"


def main() -> None:
    """Prints the tables."""
    import ggml_peer
    import jax

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each call")
    pause = parser.parse_args().pause
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, {os.cpu_count()} cores, pauses of {pause} s")
    print("\n".join(ggml_peer.about()))
    for k, n in SHAPES:
        for m in ROWS:
            matmuls(k, n, m, pause)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    main()
