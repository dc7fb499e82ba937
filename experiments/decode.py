"""How fast does a Llama-3-8B-shaped decoder decode, in each format, and in how much memory?

Random weights, made and quantized on the device; batch 1 and 8, context 2048, all tokens in one
jit, layers unrolled, weights prepared. A row is printed and written to results/decode_<card>.json
as soon as it is measured; one that fails says why, and the others go on.

    python experiments/decode.py
    python experiments/decode.py --preset tiny --formats bf16 int4_g128 --batches 1
    python experiments/decode.py --workers 4    # compiles that many rows at a time
    python experiments/decode.py --formats int8 --batches 1 --profile   # where a step goes, instead
    python experiments/decode.py --formats int8 --batches 1 --compile-only    # its processor time

Calls of 32 tokens are in flight, 32 of them, so that what a call costs more that begins on an idle
card counts once in 1024 steps; a step of one call alone is beside it. `share` is steps/s times the
bytes that a step must read (weights of matmuls, keys and values) over the rate at which the card
reads 1 GiB. `error` is the largest difference of the logits from those of the bf16 program on the
dequantized weights, after the same tokens, over the largest logit.
`launches` counts the paths of the matmuls as `explain` names them. Memory is what the compiled
program says: arguments and temporaries.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import datetime
import gc
import itertools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import qjax
from qjax.models import Cache, Config, Decoder, Rope, init_cache
from qjax.sizes import nbytes

PRESETS = {  # config, context
    "8b": (
        Config(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope=Rope(500_000.0),
            dtype=jnp.bfloat16,
        ),
        2048,
    ),
    "tiny": (
        Config(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=384,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            dtype=jnp.bfloat16,
        ),
        32,
    ),
}
FORMATS = {
    "bf16": None,
    "int8": "int8",
    "fp8": "fp8_e4m3",
    "int4_g128": "int4_g128",
    "nf4": "nf4_g64",
}
# Kernels that XLA captures into a graph do not start before the one in front of them is done.
OPTIONS = {"xla_gpu_enable_command_buffer": ""}
RUNS, CALLS = 3, 32  # of each program: medians of runs, each of so many calls in flight
NEW = 32  # tokens of a run
GIB = 2**30


def sites_of(config: Config) -> tuple[Any, Any]:
    """The shapes of the parameters in the compute dtype, and their sites."""
    model, tokens = Decoder(config), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, config.dtype), shapes)
    return shapes, qjax.find_sites(model.apply, shapes, tokens)


def weights(config: Config, spec: str | None) -> Any:
    """Random parameters, each quantized and prepared before the next is made."""
    shapes, sites = sites_of(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    made = []
    quantize = jax.jit(lambda w: qjax.quantize(w, spec, 0))  # all kernels are [in, out]
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        value = jnp.ones(leaf.shape, leaf.dtype)
        if len(leaf.shape) == 2:
            std = leaf.shape[0] ** -0.5 if name.endswith("kernel") else 1.0
            value = normal(jax.random.key(i), leaf.shape, leaf.dtype) * jnp.asarray(std, leaf.dtype)
        if spec is not None and name.endswith("kernel"):
            own = {name: sites[name]}
            value = qjax.prepare({name: quantize(value)}, own)[name]
        made.append(value)
    return jax.tree.unflatten(tree, made)


normal = jax.jit(jax.random.normal, static_argnums=(1, 2))


def program(config: Config) -> Callable[..., Any]:
    """`(params, cache, tokens [steps, batch]) -> (logits of the last step, cache)`.

    A token of -1 is the most likely one after the step before.
    """
    apply = qjax.quantized(Decoder(config).apply)

    def run(params: Any, cache: Cache, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        batch = tokens.shape[1]

        def step(carry: Any, token: jax.Array) -> Any:
            logits, cache = carry
            token = jnp.where(token < 0, jnp.argmax(logits, -1).astype(jnp.int32), token)
            logits, cache = apply(params, token[:, None], cache=cache)
            return (logits[:, 0].astype(config.dtype), cache), None  # as the head gives them

        logits = jnp.zeros((batch, config.vocab_size), config.dtype)
        return jax.lax.scan(step, (logits, cache), tokens)[0]

    return run


def compiled(
    config: Config, fmt: str, batch: int, context: int
) -> tuple[Any, float, dict[str, int]]:
    """The program for a format, the seconds that it took to compile, and its paths."""
    given = operands(config, fmt, batch, context)
    began = time.perf_counter()
    done = jax.jit(program(config), donate_argnums=1).lower(*given).compile(OPTIONS)
    return done, time.perf_counter() - began, paths(config, given[0], batch, context)


def operands(config: Config, fmt: str, batch: int, context: int) -> tuple[Any, Any, Any]:
    """The shapes of what the program of a format takes."""
    params = jax.eval_shape(lambda: weights(config, FORMATS[fmt]))
    cache = jax.eval_shape(lambda: init_cache(config, batch, context))
    return params, cache, jax.ShapeDtypeStruct((min(NEW, context), batch), jnp.int32)


def compile_time(config: Config, fmt: str, batch: int, context: int) -> dict[str, float]:
    """Seconds of processor time, of the assemblers that are started too, by stage. What a process
    compiles first pays for what the others find done: compare first ones.
    """
    given, used = operands(config, fmt, batch, context), lambda: sum(os.times()[:4])
    gc.collect()  # what the shapes left behind
    stamps = [used()]
    traced = jax.jit(program(config), donate_argnums=1).trace(*given)
    stamps.append(used())
    lowered = traced.lower()
    stamps.append(used())
    lowered.compile(OPTIONS)
    stamps.append(used())
    stages = ("trace", "lower", "compile")
    return {n: round(b - a, 2) for n, a, b in zip(stages, stamps, stamps[1:], strict=False)}


def paths(config: Config, params: Any, batch: int, context: int) -> dict[str, int]:
    """How many matmuls of a step run on which path; those joined in one launch count once."""
    cache = jax.eval_shape(lambda: init_cache(config, batch, context))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    apply = lambda params, tokens, cache: Decoder(config).apply(params, tokens, cache=cache)
    seen: dict[str, float] = collections.Counter()
    for use in qjax.explain(apply, params, tokens, cache).uses:
        how, _, others = use.how.partition(", in one launch with ")
        joined = 1 + len(others.split(", ")) if others else 1
        seen[how + (f", {joined} weights" if others else "")] += 1 / joined
    return {how: round(count) for how, count in seen.items()}


def read_rate() -> float | None:
    """Bytes per second at which this card reads 1 GiB; None where there is no such kernel."""
    if jax.default_backend() != "gpu":
        return None
    import ceilings

    return GIB / ceilings.best_reader(GIB)[0] * 1e6


def measure(config: Config, params: Any, run: Any, batch: int, context: int) -> dict[str, Any]:
    """Tokens per second of a program, and what it holds."""
    steps = min(NEW, context)
    start = jnp.asarray(context - steps, jnp.int32)
    free = jnp.full((steps, batch), -1, jnp.int32)
    cache = init_cache(config, batch, context)
    seconds: dict[int, list[float]] = {1: [], CALLS: []}
    for i, calls in itertools.product(range(1 + RUNS), seconds):
        jax.block_until_ready(cache)
        began = time.perf_counter()
        for _ in range(calls):
            logits, cache = run(params, cache._replace(length=jnp.array(start)), free)
        jax.block_until_ready((logits, cache))
        if i:  # the first round warms up
            seconds[calls].append((time.perf_counter() - began) / calls)
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError("logits are not finite")
    held = run.memory_analysis()
    peak = held.argument_size_in_bytes + held.temp_size_in_bytes + held.output_size_in_bytes
    alone, step = (statistics.median(v) / steps for v in seconds.values())
    kv = 2 * 2 * config.num_layers * batch * context * config.num_kv_heads * config.head_dim
    read = nbytes(matmul_weights(params)) + kv
    return {
        "tokens_per_s": batch / step,
        "step_ms": 1e3 * step,
        "step_ms_of_one_call": 1e3 * alone,
        "read_bytes": read,
        "memory_bytes": peak - held.alias_size_in_bytes,
        "temporary_bytes": held.temp_size_in_bytes,
    }


def profile(config: Config, params: Any, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of a step by part: durations of kernels (CUPTI), which for those that start
    early count their waiting, so that parts add up to more than the wall clock.
    """
    import ceilings

    steps = 4
    cache = init_cache(config, batch, context)
    cache = cache._replace(length=jnp.asarray(context - steps, jnp.int32))
    tokens = jnp.full((steps, batch), -1, jnp.int32)
    run = jax.jit(program(config)).lower(params, cache, tokens).compile(OPTIONS)
    walls = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run(params, cache, tokens))
        walls.append(1e6 * (time.perf_counter() - began) / steps)
    call, _ = ceilings.timed(run, params, cache, tokens, runs=2)
    scopes = {
        name.replace(".", "_"): scope
        for name, scope in re.findall(r'%?(\S+) = [^\n]*op_name="([^"]*)"', run.as_text())
    }
    spent: dict[str, list[float]] = collections.defaultdict(list)
    matmuls = 0
    for name, us in call:
        if "quantized_matmul" in name:
            of_step, matmuls = matmuls % (4 * config.num_layers + 1), matmuls + 1
            last = of_step == 4 * config.num_layers
            spent["head" if last else ("q, k, v", "o", "gate, up", "down")[of_step % 4]].append(us)
        else:
            spent[part_of(scopes.get(name, name))].append(us)
    parts = {part: (sum(v) / steps, len(v) / steps) for part, v in spent.items()}
    parts = dict(sorted(parts.items(), key=lambda pair: -pair[1][0]))
    names: dict[str, float] = collections.Counter()
    for name, us in call:
        names[name] += us / steps
    step, busy = statistics.median(walls[1:]), sum(us for us, _ in parts.values())
    out: dict[str, Any] = {"wall_us": step, "kernels_us": busy, "launches": len(call) / steps}
    out["parts_us_and_launches"] = {k: [round(v, 1) for v in pair] for k, pair in parts.items()}
    longest = sorted(names.items(), key=lambda pair: -pair[1])[:24]
    return out | {"longest_us": {name: round(us, 1) for name, us in longest}}


def part_of(scope: str) -> str:
    """The part of the model to which an operation belongs."""
    if "norm" in scope:
        return "norms"
    if "attention" in scope:
        cached = "concatenate" in scope or "dynamic_update" in scope
        return "rotation and cache" if cached else "attention"
    if "/mlp/" in scope or "layers_" in scope or scope.startswith("gated"):
        return "activation and residual"
    return "other: " + scope.rsplit("/", 1)[-1][:40]


def matmul_weights(params: Any) -> list[Any]:
    """What every step reads: all but the table of embeddings."""
    return [v for k, v in params["params"].items() if k != "embed"]


def logits_after(config: Config, params: Any, run: Any, context: int) -> jax.Array:
    """Of given tokens, batch 1."""
    steps = min(NEW, context)
    tokens = jax.random.randint(jax.random.key(7), (steps, 1), 0, config.vocab_size, jnp.int32)
    return run(params, init_cache(config, 1, context), tokens)[0].astype(jnp.float32)


def dense(params: Any) -> Any:
    """The dequantized parameters."""
    one = jax.jit(qjax.dequantize)
    back = lambda v: one(v) if qjax.is_qtensor(v) else v
    return jax.tree.map(back, params, is_leaf=qjax.is_qtensor)


def write(out: pathlib.Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file; rows of other formats and batches that results/ has of this card are kept."""
    known = pathlib.Path(__file__).parent / "results" / out.name
    kept = json.loads(known.read_text())["rows"] if known.exists() else []
    key = lambda row: (row["format"], row["batch"])
    merged = {key(row): row for row in kept} | {key(row): row for row in rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(head | {"rows": list(merged.values())}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measures the rows and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="8b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--layers", type=int, help="of the preset; all by default")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, instead")
    parser.add_argument("--compile-only", action="store_true", help="processor time, instead")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file in place of results/")
    args = parser.parse_args(argv)
    config, context = PRESETS[args.preset]
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers)
    console, card = Console(), jax.devices()[0].device_kind
    if args.compile_only:
        for fmt, batch in itertools.product(args.formats, args.batches):
            with console.status(f"{fmt}, batch {batch}"):
                took = compile_time(config, fmt, batch, context)
            console.print({"format": fmt, "batch": batch, "card": card} | took, soft_wrap=True)
        return []
    name = f"decode_{card.replace(' ', '_')}.json"
    folder = pathlib.Path(os.environ.get("OUT", pathlib.Path(__file__).parent / "results"))
    out = args.out or folder / name
    rate = read_rate()
    console.print(
        f"{card}, jax {jax.__version__}, {args.preset}, reads {rate and rate / 1e12} TB/s"
    )
    if args.profile:
        for fmt in args.formats:
            params = weights(config, FORMATS[fmt])
            for batch in args.batches:
                found = {"card": card, "format": fmt, "batch": batch}
                found |= profile(config, params, batch, context)
                console.print(json.dumps(found, indent=1), soft_wrap=True)
                out.parent.mkdir(exist_ok=True)
                to = out.with_name(f"profile_{fmt}_{batch}_{card.replace(' ', '_')}.json")
                to.write_text(json.dumps(found, indent=1) + "\n")
        return []
    head = {"card": card, "jax": jax.__version__, "preset": args.preset, "context": context}
    head |= {"command": "python experiments/decode.py", "new": NEW}
    made = {"date": str(datetime.date.today()), "read_bytes_per_s": rate}
    rows: list[dict[str, Any]] = []
    pool = concurrent.futures.ThreadPoolExecutor(args.workers)
    with console.status("compiling"):
        jobs = {}
        for fmt in args.formats:
            for batch in args.batches:
                job = jobs[fmt, batch] = pool.submit(compiled, config, fmt, batch, context)
                if FORMATS[fmt] is None:  # its matmuls are chosen by timing: nothing beside it
                    concurrent.futures.wait([job])
    for fmt in args.formats:
        params = None
        for batch in args.batches:
            row: dict[str, Any] = {"format": fmt, "batch": batch, "workers": args.workers} | made
            try:
                with console.status(f"{fmt}, batch {batch}"):
                    run, row["compile_s"], row["launches"] = jobs[fmt, batch].result()
                    params = weights(config, FORMATS[fmt]) if params is None else params
                    row |= measure(config, params, run, batch, context)
                    if rate is not None:
                        row["share"] = row["read_bytes"] / rate / (row["step_ms"] / 1e3)
                    if fmt != "bf16" and batch == 1 and ("bf16", 1) in jobs:
                        truth_run = jobs["bf16", 1].result()[0]
                        mine = logits_after(config, params, run, context)
                        its = logits_after(config, dense(params), truth_run, context)
                        row["error"] = float(abs(mine - its).max() / abs(its).max())
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as why:
                row["failed"] = f"{type(why).__name__}: {why}"[:2000]
            rows.append(row)
            text = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            console.print(text, soft_wrap=True)
            write(out, head, rows)
        del params
    return rows


if __name__ == "__main__":
    main()
