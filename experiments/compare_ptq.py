"""GPTQ, AWQ, HQQ and LLM.int8() beside the peers': same weight, input, scales, damping, order.

    python -m venv peers && peers/bin/pip install torch==2.13.0 bitsandbytes==0.50.2 transformers
    peers/bin/pip install --no-deps gptqmodel==7.7.0 llmcompressor==0.14.0.1 \
        compressed-tensors==0.20.0 hqq==0.2.8.post1
    peers/bin/pip install loguru termcolor pypcre logbar threadpoolctl device-smi tokenicer \
        defuser pillow pydantic datasets accelerate requests
    PEERS=peers/bin/python python experiments/compare_ptq.py

Prints the error of each output, ||x (w - q)||^2 in float64, and seconds, second call. GPTQ errors
may be at most 1.01x of the better peer's, AWQ's and HQQ's objectives no more than the peer's,
LLM.int8() within rounding of bitsandbytes. Ends with 1 if a bar was missed or a peer did not run.
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
    few = (x * np.where(rng.random(SIZE) < 0.02, 30, 1)).astype(np.float32)
    found = {"w": w, "x": x, "hessian": x.T @ x, "outliers": outliers, "scale": scale}
    return found | {"few loud": few}


def main() -> int:
    """Runs both sides and prints what was met; 1 if something was missed or did not run."""
    p = problem()
    with tempfile.TemporaryDirectory() as folder:
        given, result = pathlib.Path(folder) / "problem.npz", pathlib.Path(folder) / "result.npz"
        np.savez(given, **p)
        script = pathlib.Path(__file__).with_name("peers_ptq.py")
        python = os.environ.get("PEERS", sys.executable)
        subprocess.run([python, script, given, result], check=True, stdout=subprocess.DEVNULL)
        peers = dict(np.load(result))
    absent = [name for name in peers if name.endswith(" error")]
    for name in absent:
        print(f"NOT RUN {name.removesuffix(' error')}: {peers[name]}")
    parts = (compare_gptq, compare_awq, compare_hqq, compare_llm_int8)
    held = [part(p, peers) for part in parts]
    return int(not all(held) or bool(absent))


def compare_gptq(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> bool:
    """Output errors and seconds, as rows stand and by falling diagonal."""
    every = True
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
        every &= share <= BAR
        print(
            f"gptq{suffix}: qjax {own:.1f} in {seconds:.2f} s; {verdict(share <= BAR)}: "
            f"{share:.4f}x, at most {BAR}"
        )
    return every


def compare_awq(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> bool:
    """AWQ's objective where 2 % of the features are loud, without clips and with them."""
    x, w = p["few loud"], jnp.asarray(p["w"])
    exact = x.astype(np.float64)
    error = lambda q: float(np.sum((exact @ (p["w"] - np.asarray(q, np.float64))) ** 2))
    stats = qjax.Stats(hessian=jnp.asarray(x.T @ x), mean_abs=jnp.asarray(np.abs(x).mean(0)))
    spec = qjax.Spec.parse(f"uint4_g{GROUP}")._replace(scale_dtype="float32", zero_dtype="uint8")
    print(f"awq: round to nearest {error(qjax.dequantize(qjax.quantize(w, spec, 0))):.1f}")
    found = {}
    for clip in (False, True):
        (q, _), seconds = timed(qjax.awq(clip=clip).quantize, w, spec, stats)
        found[clip] = error(qjax.dequantize(q))
        print(f"awq: qjax{' with clips' if clip else ''} {found[clip]:.1f} in {seconds:.2f} s")
    if "awq" not in peers:
        return False
    start, best = (float(v) for v in peers["awq"])
    alone, share, spent = found[False] / best, found[True] / best, float(peers["awq seconds"])
    print(f"awq: llm-compressor, from {start:.1f}, {best:.1f} in {spent:.2f} s")
    print(
        f"awq: {share:.4f}x of llm-compressor's, {verdict(share <= 1)}, at most 1; without clips "
        f"{alone:.4f}x"
    )
    return share <= 1


def compare_hqq(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> bool:
    """HQQ's objective at three widths."""
    every = True
    for bits in (4, 3, 2):
        spec = qjax.Spec.parse(f"uint{bits}_g64")._replace(scale_dtype="float32")
        algorithm, w = qjax.hqq(), jnp.asarray(p["w"])
        (q, _), seconds = timed(algorithm.quantize, w, spec, qjax.Stats())
        norm = lambda q: float(np.mean(np.abs(p["w"] - np.asarray(q, np.float64)) ** 0.7))
        own = norm(qjax.dequantize(q))
        if f"hqq{bits}" not in peers:
            continue
        share, spent = own / norm(peers[f"hqq{bits}"]), float(peers[f"hqq{bits} seconds"])
        every &= share <= 1
        print(
            f"hqq {bits} bits: mean |e|^0.7 {share:.4f}x of hqq's, {verdict(share <= 1)}; "
            f"{seconds:.2f} s beside {spent:.2f} s"
        )
    return every


def compare_llm_int8(p: dict[str, np.ndarray], peers: dict[str, np.ndarray]) -> bool:
    """The product of inputs with a few outlier features, beside float64 and the peer's.

    bitsandbytes works in float16: the product of the outliers, that of the codes and their sum are
    rounded, 2^-11 each, and so are the weights that the outliers meet. No part is larger than
    |x| @ |w|, so that 2^-9 of it bounds the difference.
    """
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
    if "bitsandbytes" not in peers:
        return False
    peer, size = peers["bitsandbytes"], np.abs(np.asarray(x)) @ np.abs(np.asarray(w))
    apart = float(np.max(np.abs(np.asarray(fn(q, x)) - peer) / size))
    print(
        f"llm_int8: bitsandbytes {off(peer):.5f}; largest difference {apart * 2**9:.3f} of its "
        f"float16 rounding, {verdict(apart <= 2**-9)}, at most 1"
    )
    return apart <= 2**-9


def verdict(held: bool) -> str:
    """How a bar is printed."""
    return "met" if held else "MISSED"


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """(result, seconds) of the second call."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    return jax.block_until_ready(fn(*args)), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
