"""GPTQ, HQQ and LLM.int8() beside the peers': same weight, same input, same scales, damping, order.

    python -m venv peers && peers/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 transformers
    peers/bin/pip install --no-deps gptqmodel==7.7.0 llmcompressor==0.14.0.1 \
        compressed-tensors==0.20.0 hqq==0.2.8.post1
    peers/bin/pip install loguru termcolor pypcre logbar threadpoolctl device-smi tokenicer \
        defuser pillow pydantic datasets accelerate requests
    PEERS=peers/bin/python python experiments/compare_ptq.py

Prints the error of each output, ||x (w - q)||^2 in float64, and seconds, second call. GPTQ errors
may be at most 1.01x of the better peer's.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax

SIZE, OUT, TOKENS, GROUP = 1024, 1024, 4096, 128
BAR = 1.01  # of the better peer's error
SEVENS = 7 / 7.5  # the peers' symmetric int4 scale is max|w| / 7.5, that of int4 here max|w| / 7


def problem(seed: int = 0) -> dict[str, np.ndarray]:
    """A weight, and inputs whose features are correlated and of very different size."""
    rng = np.random.default_rng(seed)
    loud = np.exp(rng.normal(size=SIZE))
    mix = np.eye(SIZE) + rng.normal(size=(SIZE, SIZE)) / 30
    x = (rng.normal(size=(TOKENS, SIZE)) @ mix * loud).astype(np.float32)
    w = rng.standard_t(6, (SIZE, OUT)).astype(np.float32) / 30
    outliers = rng.uniform(-4, 4, (64, SIZE)).astype(np.float32)
    outliers[rng.integers(64, size=6), rng.choice(SIZE, 6, replace=False)] = 40
    scale = np.abs(w).reshape(-1, GROUP, OUT).max(1) / np.float32(7.5)
    return {"w": w, "x": x, "hessian": x.T @ x, "outliers": outliers, "scale": scale}


def main() -> None:
    """Runs both sides and prints what was met."""
    p = problem()
    with tempfile.TemporaryDirectory() as folder:
        given, result = pathlib.Path(folder) / "problem.npz", pathlib.Path(folder) / "result.npz"
        np.savez(given, **p)
        script = pathlib.Path(__file__).with_name("peers_ptq.py")
        python = os.environ.get("PEERS", sys.executable)
        subprocess.run([python, script, given, result], check=True, stdout=subprocess.DEVNULL)
        peers = dict(np.load(result))
    for name, text in peers.items():
        if name.endswith(" error"):
            print(f"NOT RUN {name.removesuffix(' error')}: {text}")
    compare_gptq(p, peers)
    compare_hqq(p, peers)
    compare_llm_int8(p, peers)


def compare_gptq(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> None:
    """Output errors and seconds, as rows stand and by falling diagonal."""
    w, h = jnp.asarray(p["w"]), jnp.asarray(p["hessian"])
    exact = p["x"].astype(np.float64)
    error = lambda q: float(np.sum((exact @ (p["w"] - np.asarray(q, np.float64))) ** 2))
    spec, stats = qjax.Spec("int4", GROUP, scale_dtype="float32"), qjax.Stats(hessian=h)
    nearest = qjax.rtn().quantize(w, spec, stats, w * SEVENS)[0]
    print(f"round to nearest: {error(qjax.dequantize(nearest)):.1f}")
    for order, suffix in ((None, ""), ("static", ", act-order")):
        algorithm = qjax.gptq(act_order=order)
        (q, _), seconds = timed(algorithm.quantize, w, spec, stats, w * SEVENS)
        own, found = error(qjax.dequantize(q)), {}
        for peer in ("llm-compressor", "gptqmodel"):
            if f"{peer}{suffix}" in peers:
                found[peer] = error(peers[f"{peer}{suffix}"])
                spent = float(peers[f"{peer}{suffix} seconds"])
                print(f"gptq{suffix}: {peer} {found[peer]:.1f} in {spent:.2f} s")
        share = own / min(found.values(), default=np.nan)
        met = "met" if share <= BAR else "MISSED"
        print(
            f"gptq{suffix}: qjax {own:.1f} in {seconds:.2f} s; {met}: {share:.4f}x, at most {BAR}"
        )


def compare_hqq(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> None:
    """HQQ's objective at three widths."""
    for bits in (4, 3, 2):
        spec = qjax.Spec.parse(f"uint{bits}_g64")._replace(scale_dtype="float32")
        algorithm, w = qjax.hqq(), jnp.asarray(p["w"])
        (q, _), seconds = timed(algorithm.quantize, w, spec, qjax.Stats())
        norm = lambda q: float(np.mean(np.abs(p["w"] - np.asarray(q, np.float64)) ** 0.7))
        own = norm(qjax.dequantize(q))
        if f"hqq{bits}" not in peers:
            continue
        share, spent = own / norm(peers[f"hqq{bits}"]), float(peers[f"hqq{bits} seconds"])
        met = "met" if share <= 1 else "MISSED"
        print(
            f"hqq {bits} bits: mean |e|^0.7 {share:.4f}x of hqq's, {met}; "
            f"{seconds:.2f} s beside {spent:.2f} s"
        )


def compare_llm_int8(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> None:
    """Relative errors of the product, of inputs with a few outlier features."""
    x = jnp.asarray(p["outliers"])
    spec, stats = qjax.Spec.parse("int8/int8_token"), qjax.Stats(max_abs=jnp.abs(x).max(0))
    w = jnp.asarray(np.float16(p["w"]), jnp.float32)  # bitsandbytes takes float16
    algorithm = qjax.llm_int8()
    q = algorithm.finish(*algorithm.quantize(w, spec, stats))
    truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    fn = jax.jit(qjax.quantized(lambda w, x: x @ w))
    off = lambda y: float(np.linalg.norm(np.asarray(y, np.float64) - truth) / np.linalg.norm(truth))
    own, plain = off(fn(q, x)), off(fn(qjax.quantize(w, spec, 0), x))
    print(f"llm_int8: relative error {own:.5f}, of plain int8 {plain:.5f}")
    if "bitsandbytes" in peers:
        peer = off(peers["bitsandbytes"])
        apart = float(np.abs(np.asarray(fn(q, x)) - peers["bitsandbytes"]).max())
        met = "met" if own <= peer * 1.001 else "MISSED"
        print(f"llm_int8: bitsandbytes {peer:.5f}, {met}; largest difference {apart:.4g}")


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """(result, seconds) of the second call."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    return jax.block_until_ready(fn(*args)), time.perf_counter() - start


if __name__ == "__main__":
    main()
