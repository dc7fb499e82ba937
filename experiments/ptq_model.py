"""What GPTQ of a whole 8B-shaped decoder costs on this GPU: seconds, their split, device memory.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 JAX_COMPILATION_CACHE_DIR=/tmp/jax-cache \
        python experiments/ptq_model.py [--layers 32] [--shape llama-8b|qwen3-30b-a3b]

Random bfloat16 weights of the shapes of Llama 3 8B, scaled so that activations stay near 1; the
tokens are bytes of a real text, 128 windows of 2,048. `quantize_sequential` with int4_g128 GPTQ.
A run of two layers and one batch compiles first, into the cache; what the timed run still spends
on tracing and compiling is measured and taken off. The parts are measured apart, on the same
shapes; forward is what is left. One solve is held against float64 in torch.
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ptq_gpu import hessian, inputs, measure, verdict

import qjax
from qjax import models
from qjax.algorithms.gptq import _diagonal, _factor, _order
from qjax.statistics import totals

TEXTS = ("moby_dick_calibration.txt", "moby_dick_evaluation.txt")
WINDOWS, LENGTH, BATCH = 128, 2048, 2
BARS = {"NVIDIA H200": 90.0, "NVIDIA H100 80GB HBM3": 110.0}
MIXTURE_LAYERS, MIXTURE_BAR = 4, 60.0  # seconds for so many layers of the mixture
SPARE = 12.0  # GiB beside the weights
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 768,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "qk_norm": True,
        "num_experts": 128,
        "experts_per_token": 8,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
    },
}
RECIPE = qjax.Recipe(
    qjax.Rule(".*", None, where=qjax.is_gathered),
    qjax.Rule(".*(head|router)/kernel", None, optional=True),
    qjax.Rule(".*", "int4_g128", qjax.gptq()),
)


def decoder(shape: str, layers: int) -> models.Decoder:
    """The model, computing in bfloat16."""
    sizes = SHAPES[shape] | {"num_layers": layers, "max_length": LENGTH, "dtype": jnp.bfloat16}
    return models.Decoder(models.Config(**sizes))


def weights(model: models.Decoder, layers: int) -> Any:
    """Random bfloat16 parameters; what a layer adds to the stream shrinks with their number."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def make(index: int, path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.ones(leaf.shape, jnp.bfloat16)
        size = 1.0 if "embed" in name else leaf.shape[-2] ** -0.5
        size *= (2 * layers) ** -0.5 if "'o'" in name or "'down'" in name else 1
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        return draw(jax.random.key(index), leaf.shape, jnp.bfloat16) * jnp.bfloat16(size)

    made = [make(i, path, leaf) for i, (path, leaf) in enumerate(leaves)]
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


def windows(count: int, length: int) -> list[jax.Array]:
    """Bytes of real text as tokens."""
    folder = pathlib.Path(__file__).parent / "data"
    text = b"".join((folder / name).read_bytes() for name in TEXTS)
    tokens = np.frombuffer(text, np.uint8)[: count * length].astype(np.int32)
    cut = tokens.reshape(count, length)
    return [jnp.asarray(cut[i : i + BATCH]) for i in range(0, count, BATCH)]


class Overhead:
    """Seconds that JAX reports for tracing, lowering and compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


def main() -> None:
    """Prints the total, its parts, memory, and the check."""
    args = arguments()
    device, overhead = jax.devices()[0], Overhead()
    layers = args.layers or SHAPES[args.shape]["num_layers"]
    print(f"{device.device_kind}, jax {jax.__version__}, {args.shape}, {layers} layers", flush=True)
    batches = windows(args.windows, args.length)
    start = time.perf_counter()
    few = min(2, layers)
    small = decoder(args.shape, few)
    run(small, weights(small, few), batches[:1])
    print(f"compiling, 2 layers and 1 batch: {time.perf_counter() - start:.1f} s", flush=True)
    model = decoder(args.shape, layers)
    params = weights(model, layers)
    held = sum(v.nbytes for v in jax.tree.leaves(params))
    overhead.seconds, start = 0.0, time.perf_counter()
    run(model, params, batches)
    total = time.perf_counter() - start
    net = total - overhead.seconds
    print(
        f"{args.windows}x{args.length} tokens: {total:.1f} s, tracing and compiling "
        f"{overhead.seconds:.1f} s, without it {net:.1f} s",
        flush=True,
    )
    bar = BARS.get(device.device_kind)
    if args.shape == "llama-8b" and bar is not None:
        kind = "whole" if layers == SHAPES[args.shape]["num_layers"] else "part of the model"
        print(f"bar {bar:.0f} s ({kind}): {verdict(net <= bar)}")
    if args.shape == "qwen3-30b-a3b":
        whole = SHAPES[args.shape]["num_layers"]
        if layers == MIXTURE_LAYERS:
            print(f"bar {MIXTURE_BAR:.0f} s: {verdict(net <= MIXTURE_BAR)}")
        print(f"extrapolated, not measured: {net / layers * whole:.0f} s for {whole} layers")
    memory = device.memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        spare = (memory["peak_bytes_in_use"] - held) / 2**30
        bar = f" (bar {SPARE:.0f}: {verdict(spare <= SPARE)})" if args.shape == "llama-8b" else ""
        print(
            f"peak {memory['peak_bytes_in_use'] / 2**30:.1f} GiB, weights {held / 2**30:.1f}, "
            f"beside them {spare:.1f} GiB{bar}",
            flush=True,
        )
    del params
    if args.shape != "qwen3-30b-a3b" and not args.brief:
        parts(args, layers, net)
        check(SHAPES[args.shape]["hidden_size"])


def run(model: models.Decoder, params: Any, batches: list[jax.Array]) -> None:
    """Quantizes, and waits for it; what comes out is let go."""
    done = qjax.quantize_sequential(model.apply, params, batches, RECIPE)
    jax.block_until_ready(done)


def parts(args: Any, layers: int, net: float) -> None:
    """Hessians, factorizations and columns, timed apart on random inputs of the same shapes."""
    sizes = SHAPES[args.shape]
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    heads, shared = (sizes["head_dim"] * sizes[n] for n in ("num_heads", "num_kv_heads"))
    sites = [(hidden, heads + 2 * shared), (heads, hidden), (hidden, 2 * wide), (wide, hidden)]
    count, spec, solver = args.windows // BATCH, qjax.Spec.parse("int4_g128"), qjax.gptq()
    gram = jax.jit(lambda x: totals(x, 0, None, frozenset({"hessian"})))
    factor = jax.jit(lambda h: _factor(h, _order(_diagonal(h)[0], 1), 0.01))
    seconds: dict[str, float] = {"Hessians": 0.0, "factorization": 0.0, "columns": 0.0}
    for k, n in sites:
        x = inputs(BATCH * args.length, k)
        seconds["Hessians"] += layers * count * measure(lambda x=x: gram(x))[1]
        h = hessian(inputs(4 * k, k))
        w = jax.random.normal(jax.random.key(2), (k, n), jnp.bfloat16)
        stats = qjax.Stats(hessian=h)
        factoring = measure(lambda h=h: factor(h))[1]
        solving = measure(lambda w=w, s=stats: solver.quantize(w, spec, s))[1]
        seconds["factorization"] += layers * factoring
        seconds["columns"] += layers * (solving - factoring)
    seconds["forward and the rest"] = net - sum(seconds.values())
    print("measured apart: " + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()), flush=True)


def check(size: int) -> None:
    """One output error beside that of float64 in torch: same scales, order and damping."""
    import torch  # pyright: ignore[reportMissingImports]

    h = hessian(inputs(4 * size, size))
    w = jax.random.normal(jax.random.key(5), (size, size), jnp.float32)
    spec = qjax.Spec.parse("int4_g128")
    q, _ = qjax.gptq(act_order=None).quantize(w, spec, qjax.Stats(hessian=h))
    place = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = lambda v: torch.tensor(np.asarray(v.astype(jnp.float32)), device=place).double()
    exact, hess, scale = tensor(w), tensor(h), tensor(q.scale)
    damped = hess + 0.01 * hess.diagonal().mean() * torch.eye(size, device=place)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, codes = exact.clone(), torch.empty_like(exact)
    for start in range(0, size, 128):
        stop = min(start + 128, size)
        lost = torch.empty_like(exact[start:stop])
        for k in range(start, stop):
            s = scale[k // 128]
            codes[k] = (left[k] / s).round().clamp(-8, 7) * s
            lost[k - start] = (left[k] - codes[k]) / upper[k, k]
            left[k:stop] -= torch.outer(upper[k, k:stop], lost[k - start])
        left[stop:] -= upper[start:stop, stop:].T @ lost
    error = lambda v: float(((exact - v) * (hess @ (exact - v))).sum())
    share = error(tensor(qjax.dequantize(q))) / error(codes) - 1
    print(
        f"one solve beside float64: {share:+.3%} output error (bar 0.1 %: {verdict(share <= 1e-3)})"
    )


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--brief", action="store_true", help="leave out the parts and the check")
    return parser.parse_args()


if __name__ == "__main__":
    main()
