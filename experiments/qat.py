"""How much of what rounding to int4 costs does quantization-aware training win back?

A model of `train_lm.py` (tests/golden/trained_dense or trained_experts, weights that were never
quantized) trains on for the same steps on the same batches, in float32 and with simulated
quantization. The gap is that of rounding the float32 one to nearest, on chapters that no run saw:
recovered = (rtn - qat) / (rtn - float).

    python experiments/qat.py [SPEC...] [--model trained_experts]
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lm_data
import numpy as np
import optax
import smollm2

import qjax
from qjax import evaluate, models, training

MODELS = pathlib.Path(__file__).parent.parent / "tests" / "golden"
SPECS = ("int4_g128", "int4")
STEPS, BATCH, LENGTH = 200, 8, 256
RATE = 3e-4  # a tenth of what it was trained with
BAR = 0.33


def tokens(tokenizer: models.Tokenizer) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids of the training text, and held-out batches."""
    text = "".join((lm_data.FOLDER / name).read_text() for name in lm_data.TRAINING)
    held_out = (lm_data.FOLDER / lm_data.HELD_OUT).read_text()
    windows = evaluate.text_windows(tokenizer, held_out, LENGTH)
    ids = np.array(tokenizer.encode(text), np.int32)
    return ids, evaluate.batched(windows, BATCH)[:-1]


def trained(
    name: str, loss: Callable[..., jax.Array], params: Any, batches: np.ndarray
) -> tuple[Any, float]:
    """Parameters after one step per batch, and the loss of the last tenth."""
    tx = optax.adamw(optax.cosine_decay_schedule(RATE, len(batches), 0.1), 0.9, 0.95)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    with smollm2.steps(name, len(batches)) as advance:
        for batch in batches:
            params, state, value = step(params, state, batch)
            values.append(float(value))
            advance()
    return params, float(np.mean(values[-len(values) // 10 :]))


def main() -> None:
    """Prints a table per spec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("specs", nargs="*", default=SPECS)
    parser.add_argument("--model", default="trained_dense", help="a folder of tests/golden")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    model, start, tokenizer = models.load(MODELS / args.model)
    ids, held_out = tokens(tokenizer)
    starts = np.random.default_rng(1).integers(0, len(ids) - LENGTH, (STEPS, BATCH, 1))
    batches = ids[starts + np.arange(LENGTH)]
    loss = lambda params, batch: jnp.mean(evaluate.token_nll(model.apply(params, batch), batch))
    measure = lambda params: evaluate.perplexity(qjax.quantized(model.apply), params, held_out).nll
    sites = qjax.find_sites(model.apply, start, batches[0])
    floats, _ = trained("float", loss, start, batches)
    base = measure(floats)
    print(f"{STEPS} steps of {BATCH} x {LENGTH} tokens; held out: before {measure(start):.4f}")
    results = {"float": base}
    for spec in args.specs:
        rtn = measure(qjax.quantize_params(floats, spec, sites))
        qat = training.fake_quant(loss, spec)
        learning = qat.learn(start, batches[0])
        found = {"rtn": rtn}
        for name, first in (("qat", start), ("qat, learned scales", learning)):
            params, _ = trained(f"{spec} {name}", qat, first, batches)
            found[name] = measure(qat.convert(params, batches[0]))
        for name, value in found.items():
            recovered = (rtn - value) / (rtn - base)
            bar = f"  bar {BAR:.0%}: {'met' if recovered >= BAR else 'MISSED'}"
            print(
                f"{spec:10} {name:20} {value:.4f}  float {base:.4f}, rtn {rtn:.4f}: recovered "
                f"{recovered:.0%}{'' if name == 'rtn' else bar}",
                flush=True,
            )
        results[spec] = found
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
