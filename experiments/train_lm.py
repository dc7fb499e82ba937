"""Does a language model train as well in low precision? Llama-shaped, the same data for every run.

    python experiments/train_lm.py                  # 3 M parameters, two CPU cores: under an hour
    python experiments/train_lm.py --preset gpu     # 98 M parameters, one GPU: under ten minutes
    python experiments/train_lm.py --preset dense --export DIR     # weights for experiments
    python experiments/train_lm.py --preset experts --export DIR    # the same with experts

Runs are a recipe of `qjax.training`, or `base`: the model in its own dtype (bfloat16 on a GPU,
float32 on a CPU). `base/1` is `base` from another initialization. What counts is the mean training
loss of the last tenth of the steps, on batches that are the same in every run. `cpu` and `gpu` make
less than one pass over the text: each batch is seen for the first time, and no run can learn it by
heart. The loss on chapters of their own stands beside it.

After each run OUT/results.json is written anew and OUT/loss.png drawn (the extra `plot`). A run
that was interrupted goes on from its last checkpoint, and one in results.json is not run again.
"""

import argparse
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

# Tuning XLA's Triton matmuls for FP8 takes minutes per program.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")

import hf_folder
import jax
import jax.numpy as jnp
import lm_data
import ml_dtypes
import numpy as np
import optax
import smollm2

from qjax import evaluate, training
from qjax.models import Config, Decoder

DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0  # AdamW as for GPT-3 and Llama
WARMUP, END = 0.1, 0.1  # of the steps; of the rate, which falls as a cosine
LAST = 0.1  # the share of the steps whose mean loss counts
BAR = 0.0025  # of the base's loss, for the FP8 recipes
FP8 = ("current", "delayed", "rowwise", "block")
OTHERS = ("mxfp8", "nvfp4", "int8")  # reported, no bar


class Preset(NamedTuple):
    """A model and how it trains.

    Attributes:
      batch, length: windows of a step, tokens of a window.
      chunk: steps of one call, which one compiled program runs.
      checkpoint: steps between checkpoints; 0 for none.
    """

    config: Config
    runs: tuple[str, ...]
    batch: int
    length: int
    steps: int
    rate: float
    chunk: int
    checkpoint: int


SMALL = Config(
    vocab_size=lm_data.VOCAB,
    hidden_size=256,  # a multiple of every block in use, k-quants' 256 included
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_length=512,
)
EXPERTS = SMALL.__class__(
    **{**vars(SMALL), "intermediate_size": 256, "num_experts": 4, "experts_per_token": 2}
)
LARGE = SMALL.__class__(
    **{
        **vars(SMALL),
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 12,
        "dtype": jnp.bfloat16,
        "scan": True,  # one layer to compile
    }
)
PRESETS = {
    "cpu": Preset(SMALL, ("base", *FP8, "base/1", "base/2", *OTHERS), 8, 128, 300, 2e-3, 1, 50),
    "gpu": Preset(
        LARGE,
        ("base", "current", "delayed", "rowwise", "block", "base/1", "base/2", *OTHERS),
        *(8, 128, 800, 5e-4, 25, 0),
    ),
    # five passes over the text
    "dense": Preset(SMALL, ("base",), 32, 256, 500, 2e-3, 25, 0),
    "experts": Preset(EXPERTS, ("base",), 32, 256, 500, 2e-3, 25, 0),
}


class Carry(NamedTuple):
    """What goes from step to step."""

    params: Any
    moments: Any
    state: Any  # of `training.fp8`; None for the base


def optimizer(preset: Preset) -> optax.GradientTransformation:
    """AdamW on clipped gradients, warmed up, its rate falling as a cosine."""
    warmup = int(WARMUP * preset.steps)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, preset.rate, warmup, preset.steps, END * preset.rate
    )
    matrices = lambda params: jax.tree.map(lambda v: v.ndim > 1, params)
    adamw = optax.adamw(rate, *BETAS, weight_decay=DECAY, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(CLIP), adamw)


def loss_of(model: Decoder) -> Any:
    """(params, inputs, targets) -> mean negative log-likelihood."""

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.apply(params, inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    return loss


def program(preset: Preset, recipe: str) -> tuple[Any, Any]:
    """(seed -> the first Carry, (Carry, tokens, starts [steps, batch]) -> (Carry, losses))."""
    model, tx = Decoder(preset.config), optimizer(preset)
    loss = loss_of(model)
    low = None if recipe == "base" else training.fp8(loss, recipe)
    shape = jax.ShapeDtypeStruct((preset.batch, preset.length), jnp.int32)

    @jax.jit
    def start(key: jax.Array) -> Carry:
        params = model.init(key, jnp.zeros((1, 8), jnp.int32))
        state = None if low is None else low.init(params, shape, shape)
        return Carry(params, tx.init(params), state)

    def step(carry: Carry, batch: jax.Array) -> tuple[Carry, jax.Array]:
        pair = batch[:, :-1], batch[:, 1:]
        params, state = carry.params, carry.state
        if low is None:
            value, grads = jax.value_and_grad(loss)(params, *pair)
        else:
            value, grads, state = low.value_and_grad(params, state, *pair)
        updates, moments = tx.update(grads, carry.moments, params)
        return Carry(optax.apply_updates(params, updates), moments, state), value

    @jax.jit
    def run(carry: Carry, tokens: jax.Array, starts: jax.Array) -> tuple[Carry, jax.Array]:
        window = jnp.arange(preset.length + 1)
        return jax.lax.scan(lambda c, s: step(c, tokens[s[:, None] + window]), carry, starts)

    return start, run


def starts_of(preset: Preset, count: int) -> np.ndarray:
    """Where the windows of every step begin, int32 [steps, batch]: the same for all runs.

    A pass over the text takes each window once, in random order; the next pass cuts it elsewhere.
    """
    rng, starts = np.random.default_rng(0), []
    while sum(map(len, starts)) < preset.steps * preset.batch:
        first = rng.integers(preset.length)
        starts.append(rng.permutation(np.arange(first, count - preset.length, preset.length)))
    whole = np.concatenate(starts)[: preset.steps * preset.batch]
    return whole.reshape(preset.steps, preset.batch).astype(np.int32)


def train(run: str, preset: Preset, tokens: lm_data.Tokens, out: pathlib.Path) -> tuple[dict, Any]:
    """Trains one run: what results.json says of it, and its parameters."""
    recipe, _, seed = run.partition("/")
    start, steps = program(preset, recipe)
    ids, starts = jnp.asarray(tokens.training), starts_of(preset, len(tokens.training))
    begin = time.perf_counter()
    first = jax.jit(start).lower(jax.random.key(0)).compile()
    carry = first(jax.random.key(int(seed or 0)))
    compiled = steps.lower(carry, ids, starts[: preset.chunk]).compile()
    build = time.perf_counter() - begin
    losses: list[float] = []
    saved = out / f"{run.replace('/', '-')}.npz"
    if saved.exists():
        carry, losses = restore(saved, carry)
    elif recipe == "delayed":  # scales from real amax: the first steps are taken twice
        carry = carry._replace(state=compiled(carry, ids, starts[: preset.chunk])[0].state)
    begin = time.perf_counter()
    with smollm2.steps(run, preset.steps // preset.chunk) as advance:
        for i in range(len(losses), preset.steps, preset.chunk):
            carry, values = compiled(carry, ids, starts[i : i + preset.chunk])
            losses += np.asarray(values, np.float64).tolist()
            if preset.checkpoint and len(losses) % preset.checkpoint == 0:
                save(saved, carry, losses)
            advance()
    seconds = time.perf_counter() - begin
    last = max(1, int(LAST * preset.steps))
    result = {
        "final": float(np.mean(losses[-last:])),
        "held_out": held_out(preset, carry.params, tokens),
        "seconds": seconds,
        "compile_seconds": build,
        "fp8_calls": len(
            re.findall(r"custom_call_target=\"__cublas\$lt\$matmul\$f8\"", compiled.as_text())
        ),
        "parameters": sum(v.size for v in jax.tree.leaves(carry.params)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "losses": [round(v, 5) for v in losses],
    }
    saved.unlink(missing_ok=True)
    return result, carry.params


def held_out(preset: Preset, params: Any, tokens: lm_data.Tokens) -> float:
    """The loss on the text that was not trained on, of the weights in the model's own dtype."""
    batches = evaluate.batched(evaluate.windows(tokens.held_out, preset.length), preset.batch)
    return evaluate.perplexity(Decoder(preset.config).apply, params, batches[:-1]).nll


def save(path: pathlib.Path, carry: Carry, losses: Sequence[float]) -> None:
    """Writes a checkpoint, whole or not at all."""
    arrays = {f"leaf{i}": np.asarray(v) for i, v in enumerate(jax.tree.leaves(carry))}
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, losses=np.array(losses), **arrays)
    path.with_suffix(".tmp").replace(path)


def restore(path: pathlib.Path, like: Carry) -> tuple[Carry, list[float]]:
    """Reads a checkpoint."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as file:
        loaded = [jnp.asarray(file[f"leaf{i}"], v.dtype) for i, v in enumerate(leaves)]
        return jax.tree.unflatten(structure, loaded), file["losses"].tolist()


def export(folder: pathlib.Path, config: Config, params: Any, tokenizer: pathlib.Path) -> None:
    """Writes a Hugging Face folder in bfloat16 that `qjax.models.load` reads."""
    hf_folder.write(folder, config, params, ml_dtypes.bfloat16)
    if tokenizer.exists():
        (folder / "tokenizer.json").write_text(tokenizer.read_text())


def show(results: dict[str, dict]) -> None:
    """Prints a line per run, and the bars."""
    base = results.get("base")
    print(
        f"{'run':10} {'loss':>8} {'of base':>9} {'held out':>9} {'s':>6} {'compile':>8} fp8 calls"
    )
    for name, r in results.items():
        gap = r["final"] / base["final"] - 1 if base else float("nan")
        bar = f"  bar {BAR:.2%}: {'met' if abs(gap) <= BAR else 'MISSED'}" if name in FP8 else ""
        print(
            f"{name:10} {r['final']:8.4f} {gap:+9.3%} {r['held_out']:9.4f} {r['seconds']:6.0f} "
            f"{r['compile_seconds']:8.0f} {r['fp8_calls']}{bar}",
            flush=True,
        )


def draw(results: dict[str, dict], path: pathlib.Path) -> None:
    """Loss curves, and their distance to the base's."""
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 2))
    base = np.array(results["base"]["losses"])
    width = max(1, len(base) // 50)
    smooth = lambda v: np.convolve(v, np.ones(width) / width, "valid")
    at = np.arange(width, len(base) + 1)
    for name, r in results.items():
        values = np.array(r["losses"])
        style = {"color": "0.6", "lw": 1, "ls": ":"} if name.startswith("base/") else {"lw": 1.2}
        style |= {"color": "black"} if name == "base" else {}
        upper.plot(at, smooth(values), label=f"{name} ({r['final']:.4f})", **style)
        if name != "base":
            lower.plot(at, 100 * (smooth(values) / smooth(base) - 1), label=name, **style)
    lower.axhspan(-100 * BAR, 100 * BAR, color="0.9")
    lower.set(xlabel="step", ylabel="% of base", ylim=(-1.5, 1.5))
    r = results["base"]
    upper.set(ylabel=f"training loss, mean of {width} steps", yscale="log")
    upper.set_title(f"{r['parameters'] / 1e6:.1f} M parameters, {r['device']}")
    upper.legend(ncols=2, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains what is not in OUT/results.json yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--runs", nargs="+", help="of the preset's, in this order")
    parser.add_argument("--steps", type=int, help="in place of the preset's")
    parser.add_argument("--out", type=pathlib.Path, help="default: train_lm-PRESET")
    parser.add_argument("--tokens", type=pathlib.Path, help="tokens.npz made on another machine")
    parser.add_argument(
        "--export", type=pathlib.Path, help="folder for the weights of the last run"
    )
    parser.add_argument("--plot-only", action="store_true", help="draw results.json and stop")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    preset = preset._replace(steps=args.steps or preset.steps)
    out = args.out or pathlib.Path(f"train_lm-{args.preset}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if not args.plot_only:
        cache = args.tokens or out / "tokens.npz"
        tokens = lm_data.load(cache)
        print(f"{jax.devices()[0].device_kind}, {len(tokens.training)} tokens", flush=True)
        for run in args.runs or preset.runs:
            if run in results and not args.export:
                continue
            results[run], params = train(run, preset, tokens, out)
            file.write_text(json.dumps(results))
            show({k: v for k, v in results.items() if k in ("base", run)})
            if args.export:
                export(args.export, preset.config, params, cache.with_name("tokenizer.json"))
    show(results)
    try:
        draw(results, out / "loss.png")
    except ModuleNotFoundError:
        print("matplotlib is not installed: draw loss.png elsewhere with --plot-only")


if __name__ == "__main__":
    main()
