"""What GPTQ costs on a CPU, beside llm-compressor and GPTQModel: seconds and memory.

    PEERS=peers/bin/python python experiments/ptq_cost.py [--runs 3] [--json OUT.json]

The peers' environment is that of `compare_ptq.py`; without PEERS their columns stay empty. One
after the other in one run, medians, the first call left out (it compiles):

- a solve of 1024x1024, int4_g128, Hessian given;
- 4096x4096: adding one batch of 2,048 tokens to the Hessian (128 of them make the Hessian of
  128x2048 tokens: the time is proportional), and the solve;
- SmolLM2-135M whole, `quantize_sequential`, 64 windows of 512 tokens, and the largest resident
  memory above that before the call, beside 0.5 of the float model and the hidden states of all
  windows. The peers' whole-model runs are not started here.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import smollm2
from rich.console import Console
from rich.table import Table

import qjax
from qjax import evaluate, models
from qjax.statistics import add, empty, totals

SPEC = "int4_g128"
BATCH, BATCHES = 2048, 128
SMALL, LARGE = 1024, 4096
QWIX = 96.0  # seconds that qwix took for 256x256, see docs/peers.md
WINDOWS, LENGTH = 64, 512
CALIBRATION = pathlib.Path(__file__).parent / "data" / "moby_dick_calibration.txt"


def main() -> int:
    """Measures, prints a table and what was met; 1 if something was missed."""
    args = arguments()
    found: dict[str, Any] = {"runs": args.runs, "cores": os.cpu_count(), "load": []}
    x, w = problem(LARGE)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "qjax": lambda: {"qjax": own(x, w, args.runs)},
        "peers": lambda: peers(x, w, args.runs) if "PEERS" in os.environ else {},
        "model": lambda: {} if args.skip == "model" else {"model": whole(args)},
    }
    for part in parts.values():
        found["load"].append(os.getloadavg()[0])
        found |= part()
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1))
    return show(found)


def own(x: np.ndarray, w: np.ndarray, runs: int) -> dict[str, float]:
    """Seconds by name."""
    return {
        f"solve {SMALL}": solving(x[:, :SMALL], w[:SMALL, :SMALL], runs),
        f"hessian {LARGE}": hessian(x, runs),
        f"solve {LARGE}": solving(x, w, runs),
    }


def problem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of correlated inputs, and a weight."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(64, size)).astype(np.float32) / 8
    x = rng.normal(size=(BATCH, 64)).astype(np.float32) @ mix
    x += rng.normal(size=x.shape).astype(np.float32) / 2
    return x, rng.normal(size=(size, size)).astype(np.float32) / 30


def median(call: Callable[[], Any], runs: int) -> float:
    """The median of some calls after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def hessian(x: np.ndarray, runs: int) -> float:
    """Seconds to add one batch to a Hessian, as calibration does."""
    needs, rows = frozenset({"hessian"}), jnp.asarray(x)
    zero = empty(jax.eval_shape(lambda x: totals(x, 0, None, needs), rows))
    step = jax.jit(lambda t, x: add(t, totals(x, 0, None, needs)), donate_argnums=0)
    held = [zero]

    def once() -> Any:
        held[0] = step(held[0], rows)
        return held[0]

    return median(once, runs)


def solving(x: np.ndarray, w: np.ndarray, runs: int) -> float:
    """Seconds of GPTQ with the Hessian given."""
    stats, spec = qjax.Stats(hessian=jnp.asarray(x.T @ x)), qjax.Spec.parse(SPEC)
    rows, solver = jnp.asarray(w), qjax.gptq(act_order=None)
    return median(lambda: solver.quantize(rows, spec, stats), runs)


def peers(x: np.ndarray, w: np.ndarray, runs: int) -> dict[str, Any]:
    """What `peers_cost.py` measures with the same arrays: {peer: {name: seconds}}."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = pathlib.Path(folder) / "problem.npz", pathlib.Path(folder) / "result.json"
        np.savez(given, x=x, w=w)
        script = pathlib.Path(__file__).with_name("peers_cost.py")
        command = [os.environ["PEERS"], script, given, result, str(runs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(result.read_text())


def whole(args: Any) -> dict[str, float]:
    """Seconds and memory of a whole model."""
    loaded, codes, tokenizer = models.load(args.model or smollm2.checkpoint())
    floats = jax.tree.map(
        lambda v: qjax.dequantize(v) if qjax.is_qtensor(v) else v, codes, is_leaf=qjax.is_qtensor
    )
    del codes
    cut = evaluate.text_windows(tokenizer, CALIBRATION.read_text(), LENGTH, WINDOWS)
    batches = [jnp.asarray(b) for b in evaluate.batched(cut, 4)]
    tables = qjax.Rule(".*", None, where=qjax.is_gathered)
    recipe = qjax.Recipe(tables, qjax.Rule(".*", "int4_g64", qjax.gptq()))
    sites = 4 * loaded.config.num_layers
    start = time.perf_counter()
    with smollm2.steps("GPTQ of the whole model", sites) as advance, resident() as memory:

        def progress(visits: Any) -> Iterator[Any]:
            for visit in visits:
                yield visit
                advance()

        done = qjax.quantize_sequential(loaded.apply, floats, batches, recipe, progress=progress)
        jax.block_until_ready(done)
    held = sum(v.nbytes for v in jax.tree.leaves(floats))
    hidden = WINDOWS * LENGTH * loaded.config.hidden_size * 4
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": memory[0], "model": held, "activations": hidden}


@contextmanager
def resident() -> Iterator[list[int]]:
    """The largest resident memory while it is open, above that at the start, in bytes."""
    page, stop, grown = os.sysconf("SC_PAGE_SIZE"), threading.Event(), [0]
    now = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
    level = now()

    def watch() -> None:
        while not stop.wait(0.02):
            grown[0] = max(grown[0], now() - level)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        stop.set()
        thread.join()


def show(found: dict[str, Any]) -> int:
    """Prints; 1 if a bar was missed."""
    table, own = Table(box=None), found["qjax"]
    names = [n for n in ("qjax", "llm-compressor", "gptqmodel") if n in found]
    for column in ("seconds", *names):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    for row in own:
        table.add_row(row, *(f"{found[n][row]:.3f}" if row in found[n] else "" for n in names))
    console = Console(highlight=False, width=110)
    console.print(table)
    bars = [(f"solve {SMALL} below 1 s, {own[f'solve {SMALL}']:.3f} s", own[f"solve {SMALL}"] < 1)]
    print(f"qwix took {QWIX / own[f'solve {SMALL}']:.0f}x for a sixteenth of that weight")
    if "llm-compressor" in found:
        times = found["llm-compressor"][f"hessian {LARGE}"] / own[f"hessian {LARGE}"]
        bars.append((f"hessian {times:.2f}x as fast as llm-compressor, at least 1.3", times >= 1.3))
        seconds = BATCHES * own[f"hessian {LARGE}"]
        print(f"{BATCHES}x{BATCH} tokens: {seconds:.0f} s of Hessian, from one batch")
    if "gptqmodel" in found:
        share = own[f"solve {LARGE}"] / found["gptqmodel"][f"solve {LARGE}"]
        bars.append((f"solve {LARGE} {share:.2f}x of GPTQModel's seconds, at most 1", share <= 1))
    if "model" in found:
        m = found["model"]
        room = 0.5 * m["model"] + m["activations"]
        print(f"SmolLM2-135M, {WINDOWS}x{LENGTH} tokens: {m['seconds']:.0f} s")
        text = f"{m['memory'] / 2**20:.0f} MiB above the level before, at most {room / 2**20:.0f}"
        bars.append((text, m["memory"] <= room))
    for text, held in bars:
        print(f"{'met' if held else 'MISSED'}: {text}")
    load = ", ".join(f"{v:.1f}" for v in found["load"])
    print(f"medians of {found['runs']}, load before each part {load}; {found['cores']} cores")
    return int(not all(held for _, held in bars))


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, help="a GGUF of SmolLM2-135M")
    parser.add_argument("--skip", choices=("model",), help="leave out the whole model")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
