"""``qjax quantize``: a model in, a folder with its quantized parameters out."""

from __future__ import annotations

import argparse
import collections
import os

import jax
import jax.numpy as jnp
from rich.console import Console

from qjax.cli.common import Output, load_model, mebibytes, progress_console, table, tracked
from qjax.models.saved import save_folder
from qjax.qtensor import is_qtensor
from qjax.recipe import Recipe, Rule, is_gathered
from qjax.reporting import report
from qjax.sites import find_sites
from qjax.spec import Spec
from qjax.transform import requantize_params


def run(args: argparse.Namespace) -> Output:
    """Quantizes `args.model` into the folder `args.output`."""
    if os.path.exists(args.output) and not args.force:
        raise ValueError(f"{args.output}: exists; choose another --output, or give --force")
    model, params, tokenizer = load_model(args.model)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params, is_leaf=is_qtensor
    )
    sites = find_sites(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    progress = lambda weights: tracked(weights, "Quantizing")
    recipe = _recipe(args.spec, args.rule)
    qparams, decisions = requantize_params(params, recipe, sites, progress)
    del params
    with progress_console().status(f"Writing {args.output}"):
        save_folder(args.output, model, qparams, tokenizer, overwrite=args.force)
    found = report(qparams)
    data = {
        "output": args.output,
        "bits_per_weight": found.bits_per_weight,
        "bytes": found.nbytes,
        "parameters": [
            {
                "path": row.path,
                "shape": list(row.shape),
                "format": row.format,
                "bits_per_weight": row.bits_per_weight,
                "bytes": row.nbytes,
                "kept": decisions[row.path].kept,
            }
            for row in found.rows
        ],
    }

    def show(console: Console) -> None:
        groups = collections.defaultdict(list)
        for row in found.rows:
            groups[row.format, decisions[row.path].kept].append(row)
        rows = [
            (fmt, len(group), mebibytes(sum(r.nbytes for r in group)), why and f"kept: {why}")
            for (fmt, why), group in groups.items()
        ]
        rows.append(("total", len(found.rows), mebibytes(found.nbytes), ""))
        columns = ("format", "parameters", "MiB", "note")
        console.print(table(columns, rows, right=columns[1:3]))
        console.print(f"\n{args.output}: {found.bits_per_weight:.3f} bits per weight", markup=False)

    return Output(data, show)


def parse_rule(text: str) -> Rule:
    """A rule from ``PATTERN=SPEC``; the spec ``none`` keeps what matches."""
    pattern, equals, spec = text.rpartition("=")
    if not equals:
        raise ValueError(f"rule {text!r} must be PATTERN=SPEC, such as '.*/down/kernel=int8'")
    return Rule(pattern, None if spec == "none" else spec)


def _recipe(spec: Spec, rules: list[Rule]) -> Recipe:
    """The rules first; then what a bare spec means, looked-up tables kept."""
    rest = (Rule(".*", None, where=is_gathered, optional=True), Rule(".*", spec, optional=True))
    return Recipe(*rules, *rest)
