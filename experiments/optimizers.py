"""What a step of the low-precision optimizers costs, beside optax's AdamW and Lion in float32.

The update of all parameters of a Llama-shaped tree, applied in place; medians, the optimizers
taking turns in one process. Bytes of state are those that XLA holds.

    python experiments/optimizers.py [--hidden 1024] [--layers 4]
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qjax import training

ROUNDS = 9
RATE = 1e-3
OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], str]] = {
    "adamw": (lambda: optax.adamw(RATE), "adamw"),
    "adamw8bit": (lambda: training.adamw8bit(RATE), "adamw"),
    "adamw8bit fp8_e4m3": (lambda: training.adamw8bit(RATE, moments="fp8_e4m3"), "adamw"),
    "adamw4bit": (lambda: training.adamw4bit(RATE), "adamw"),
    "lion": (lambda: optax.lion(RATE), "lion"),
    "lion8bit": (lambda: training.lion8bit(RATE), "lion"),
}


def parameters(hidden: int, layers: int, dtype: Any) -> dict[str, jax.Array]:
    """Weights of a Llama-shaped model."""
    shapes = dict.fromkeys("qkvo", (layers, hidden, hidden))
    shapes |= dict.fromkeys(("gate", "up"), (layers, hidden, 3 * hidden))
    shapes |= {"down": (layers, 3 * hidden, hidden), "norm": (layers, hidden)}
    make = lambda i, s: jax.random.normal(jax.random.key(i), s, dtype)
    return {name: make(i, shape) for i, (name, shape) in enumerate(shapes.items())}


def compiled(tx: optax.GradientTransformation, params: Any) -> tuple[Any, int]:
    """A compiled (params, state, grads) -> (params, state), and the bytes of the state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    program = step.lower(params, state, params).compile()
    memory = jax.jit(lambda s: s).lower(state).compile().memory_analysis()
    return program, memory.argument_size_in_bytes if memory else 0


def main() -> None:
    """Prints a line per optimizer and dtype of the parameters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for dtype in (jnp.float32, jnp.bfloat16):
        params = parameters(args.hidden, args.layers, dtype)
        grads = jax.tree.map(lambda v: 1e-3 * v, params)
        count = sum(v.size for v in jax.tree.leaves(params))
        programs, states, size = {}, {}, {}
        for name, (make, _) in OPTIMIZERS.items():
            tx = make()
            programs[name], size[name] = compiled(tx, params)
            states[name] = (jax.tree.map(jnp.copy, params), tx.init(params))
        times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        for round_number in range(ROUNDS + 1):
            for name, program in programs.items():
                start = time.perf_counter()
                states[name] = jax.block_until_ready(program(*states[name], grads))
                if round_number:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
        print(f"{count / 1e6:.1f} M parameters in {jnp.dtype(dtype).name}")
        for name, (_, twin) in OPTIMIZERS.items():
            seconds, other = statistics.median(times[name]), statistics.median(times[twin])
            print(
                f"  {name:20} {1e3 * seconds:8.2f} ms {seconds / other:6.2f}x of {twin}, "
                f"{size[name] / count:.3f} bytes of state per parameter",
                flush=True,
            )


if __name__ == "__main__":
    main()
