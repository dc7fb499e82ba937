"""``qjax quantize``: a model in, a folder or GGUF file with its quantized parameters out."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from qjax.algorithms import ALGORITHMS, Algorithm
from qjax.algorithms.awq import awq
from qjax.cli import picture
from qjax.cli.common import (
    Output,
    load_model,
    mebibytes,
    printable,
    progress_console,
    read_text,
    table,
    tracked,
)
from qjax.evaluate import batched, text_windows
from qjax.io.folder import is_folder
from qjax.models.decoder import Decoder
from qjax.models.folding import fold
from qjax.models.saved import save_folder
from qjax.models.saved_gguf import FORMATS, check_target, save_gguf
from qjax.models.saved_hf import save_hf, unfit
from qjax.qtensor import dequantize, is_qtensor
from qjax.recipe import Recipe, Rule, is_gathered
from qjax.reporting import report
from qjax.sequential import quantize_sequential
from qjax.sites import find_sites
from qjax.solving import Solved
from qjax.spec import Spec
from qjax.tracing import param_path
from qjax.transform import Decision, decide, requantize_params


def run(args: argparse.Namespace) -> Output:
    """Quantizes `args.model` into the folder or GGUF file `args.output`."""
    if os.path.exists(args.output) and not args.force:
        raise ValueError(f"{args.output}: exists; choose another --output, or give --force")
    to_gguf = args.output.lower().endswith(".gguf")
    if to_gguf:
        _check_gguf(args)
    if args.codec is not None:
        _check_codec(args)
    algorithm = None if args.algorithm is None else ALGORITHMS[args.algorithm]()
    calibrated = algorithm is not None and bool(algorithm.needs)
    if calibrated != (args.calibration is not None):
        needs = "needs a text: give --calibration FILE" if calibrated else "takes no --calibration"
        raise ValueError(f"--algorithm {args.algorithm or 'none'} {needs}")
    model, params, tokenizer = load_model(args.model)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params, is_leaf=is_qtensor
    )
    sites = find_sites(model.apply, shapes, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    of_o = None
    if args.algorithm == "awq" and (to_gguf or args.codec is not None):
        heads, head_dim = model.config.num_heads // model.config.num_kv_heads, model.config.head_dim
        of_o = awq(shared=(heads, head_dim))  # so that its scales can be folded into v
    recipe = _recipe(args.spec, args.rule, algorithm, args.codec, of_o)
    entries: list[Solved] = []
    log = _logger(entries, quiet=args.json)
    if calibrated:
        text = read_text(args.calibration)
        windows = text_windows(tokenizer, text, args.length, args.windows)
        decisions = decide(_by_path(shapes), recipe, sites)
        params = _dense(params, decisions)
        batches = [jnp.asarray(b) for b in batched(windows, args.batch)]
        progress = lambda visits: tracked(visits, "Quantizing")
        qparams = quantize_sequential(
            model.apply, params, batches, recipe, args.checkpoint, log=log, progress=progress
        )
    else:
        progress = lambda weights: tracked(weights, "Quantizing")
        qparams, decisions = requantize_params(params, recipe, sites, progress, log)
    del params
    if to_gguf or args.codec is not None:
        qparams = _without_scales(qparams, model, args.codec or "GGUF")
    with progress_console().status(f"Writing {args.output}"):
        if args.codec is not None:
            save_hf(args.output, qparams, args.model, args.codec)
        elif to_gguf:
            save_gguf(args.output, qparams, args.model, overwrite=args.force)
        else:
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
        "solved": [entry._asdict() for entry in entries],
        "report": None,
        "picture": None,
    }
    if entries:
        base = args.report or f"{args.output.rstrip('/')}-report"
        data["report"] = f"{base}.json"
        data["picture"] = picture.draw(f"{base}.png", entries)
        with open(f"{base}.json", "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)

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
        if data["report"] is not None:
            drawn = data["picture"] or f"no picture: {picture.MISSING}"
            console.print(f"{data['report']}: error of each weight; {drawn}", markup=False)

    return Output(data, show)


def _check_gguf(args: argparse.Namespace) -> None:
    """What a GGUF file cannot hold is said before anything is computed."""
    if os.path.isdir(args.model):
        raise ValueError(
            f"--output {args.output}: settings and tokenizer of a GGUF file are those of the "
            f"model's, and {args.model} is a folder; write a folder"
        )
    check_target(args.output, args.force)
    given = [args.spec, *(rule.spec for rule in args.rule)]
    for spec in (spec for spec in given if spec is not None):
        if spec.format not in FORMATS or spec.activation is not None:
            raise ValueError(
                f"--output {args.output}: GGUF has no type for {spec}; it has {', '.join(FORMATS)}"
            )


def _check_codec(args: argparse.Namespace) -> None:
    """What a Hugging Face folder needs is said before anything is computed."""
    if not os.path.isdir(args.model) or is_folder(args.model):
        raise ValueError(
            f"--codec {args.codec}: settings and tokenizer of a Hugging Face folder are those of "
            f"the model's, and {args.model} is none"
        )
    if os.path.exists(args.output) or args.output.lower().endswith(".gguf"):
        raise ValueError(f"--codec {args.codec}: --output must be a new folder, is {args.output}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(args.output))):
        raise ValueError(f"--output {args.output}: there is no folder for it")
    specs = [s for s in (args.spec, *(rule.spec for rule in args.rule)) if s is not None]
    for spec in specs:
        why = unfit(Spec.parse(spec), args.codec)
        if why is not None:
            raise ValueError(f"--codec {args.codec}: {why}")


def _for_codec(spec: Spec | str, codec: str | None) -> Spec:
    """With zero points, and for GPTQ and AWQ with scales, as the files hold them."""
    spec = Spec.parse(spec)
    if codec is None:
        return spec
    if not spec.symmetric:
        unsigned = spec.format if spec.format.startswith("u") else f"u{spec.format}"
        spec = spec._replace(format=unsigned, zero_dtype="uint8")
    return spec._replace(scale_dtype="float16") if codec in ("gptq", "awq") else spec


def _without_scales(params: Any, model: Decoder, kind: str) -> Any:
    """Folds the `input_scale`s of AWQ, for which GGUF files and others have no place."""
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    if not any(is_qtensor(leaf) and leaf.activation is not None for leaf in leaves):
        return params
    folded = fold(params, model)
    for path, why in folded.skipped.items():
        more = f" and of {len(folded.skipped) - 1} more" if len(folded.skipped) > 1 else ""
        raise ValueError(
            f"{path}: its input_scale{more} cannot be folded ({why}), and {kind} has no place for "
            f"it; a rule leaves the algorithm out there: --rule '{path}=SPEC'"
        )
    return folded.params


def parse_rule(text: str) -> Rule:
    """A rule from ``PATTERN=SPEC``; the spec ``none`` keeps what matches."""
    pattern, equals, spec = text.rpartition("=")
    if not equals:
        raise ValueError(f"rule {text!r} must be PATTERN=SPEC, such as '.*/down/kernel=int8'")
    return Rule(pattern, None if spec == "none" else spec)


def _recipe(
    spec: Spec,
    rules: list[Rule],
    algorithm: Algorithm | None,
    codec: str | None,
    of_o: Algorithm | None,
) -> Recipe:
    """The rules first; then what a bare spec means, by another algorithm for o where one is given,
    looked-up tables kept, and where a codec's readers expect it the head and routers too.
    """
    tables = Rule(".*", None, where=is_gathered, optional=True)
    head = [] if codec is None else [Rule(".*/(head|router)/kernel", None, optional=True)]
    rules = [
        r if r.spec is None else dataclasses.replace(r, spec=_for_codec(r.spec, codec))
        for r in rules
    ]
    bare = Rule(".*", _for_codec(spec, codec), algorithm, optional=True)
    own = [] if of_o is None else [dataclasses.replace(bare, pattern=".*/o/kernel", algorithm=of_o)]
    return Recipe(*rules, *head, tables, *own, bare)


def _logger(entries: list[Solved], quiet: bool) -> Callable[[Solved], None]:
    """Collects what was solved, and shows it line by line."""
    console = progress_console()

    def log(entry: Solved) -> None:
        entries.append(entry)
        if not quiet:
            console.print(printable(entry), markup=False, soft_wrap=True)

    return log


def _by_path(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {param_path(path): leaf for path, leaf in leaves}


def _dense(params: Any, decisions: Mapping[str, Decision]) -> Any:
    """Dequantizes what is to be quantized anew."""

    def one(path: Sequence[Any], leaf: Any) -> Any:
        again = is_qtensor(leaf) and decisions[param_path(path)].spec is not None
        return dequantize(leaf) if again else leaf

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)
