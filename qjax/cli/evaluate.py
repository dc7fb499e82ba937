"""``qjax eval``: perplexity of a model on a text, alone or beside a reference."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from rich.console import Console

from qjax.cli.common import Output, load_model, read_text, table, tracked
from qjax.evaluate import Perplexity, batched, compare, perplexity, text_windows
from qjax.run import quantized


def run(args: argparse.Namespace) -> Output:
    """Evaluates `args.model`, beside `args.reference` if there is one."""
    text = read_text(args.text)
    model, params, tokenizer = load_model(args.model)
    if args.length > model.config.max_length:
        raise ValueError(
            f"--length {args.length} exceeds the {model.config.max_length} positions of "
            f"{args.model}"
        )
    cut = text_windows(tokenizer, text, args.length, args.windows)
    candidate = (quantized(model.apply), params)
    start = time.perf_counter()
    if args.reference is None:
        found = perplexity(*candidate, tracked(batched(cut, args.batch), "Evaluating"))
        comparison = base = None
    else:
        other, other_params, other_tokenizer = load_model(args.reference)
        if not (text_windows(other_tokenizer, text, args.length, args.windows) == cut).all():
            raise ValueError(
                f"{args.reference} and {args.model} cut the text into different tokens; models are "
                "compared over one tokenizer"
            )
        base, rows = compare(
            (quantized(other.apply), other_params),
            {args.model: candidate},
            tracked(batched(cut, args.batch), "Evaluating"),
        )
        comparison = rows[args.model]
        found = comparison.perplexity
    data: dict[str, Any] = {
        "model": args.model,
        "windows": len(cut),
        "length": args.length,
        "seconds": time.perf_counter() - start,
        **_perplexity(found),
    }
    if comparison is not None and base is not None:
        data |= {
            "reference": {"model": args.reference, **_perplexity(base)},
            "ratio": _number(comparison.ratio),
            "ratio_standard_error": _number(comparison.ratio_standard_error),
            "kl": _number(comparison.kl),
            "kl_standard_error": _number(comparison.kl_standard_error),
            "top1": comparison.top1,
        }

    def show(console: Console) -> None:
        rows = [("perplexity", f"{found.value:.4f}", _plus_minus(found.standard_error))]
        if comparison is not None and base is not None:
            rows += [
                ("reference", f"{base.value:.4f}", _plus_minus(base.standard_error)),
                ("ratio", f"{comparison.ratio:.5f}", _plus_minus(comparison.ratio_standard_error)),
                ("KL (nat)", f"{comparison.kl:.5f}", _plus_minus(comparison.kl_standard_error)),
                ("top-1 agreement", f"{comparison.top1:.4f}", ""),
            ]
        console.print(table(("", "value", "standard error"), rows, right=("value",)))
        console.print(
            f"\n{len(cut)} windows of {args.length} tokens, {found.tokens:,} scored", markup=False
        )

    return Output(data, show)


def _perplexity(found: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": _number(found.value),
        "standard_error": _number(found.standard_error),
        "nll": _number(found.nll),
        "tokens": found.tokens,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN: what is unknown, such as the standard error of one window, is null."""
    return value if math.isfinite(value) else None


def _plus_minus(value: float) -> str:
    return "unknown (one window)" if math.isnan(value) else f"+- {value:.2g}"
