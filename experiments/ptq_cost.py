"""What GPTQ costs on a CPU, beside llm-compressor and GPTQModel: seconds and memory.

    PEERS=peers/bin/python python experiments/ptq_cost.py [--runs 3] [--json OUT.json]

The peers' environment is that of `compare_ptq.py`; without PEERS their columns stay empty. One
after the other in one run, medians, the first call left out (it compiles):

- a solve of 1024x1024, int4_g128, Hessian given;
- 4096x4096: adding one batch of 2,048 tokens to the Hessian (128 of them make the Hessian of
  128x2048 tokens: the time is proportional), and the solve;
- SmolLM2-135M whole, int4_g64, 64 windows of 512 tokens: `quantize_sequential`, llm-compressor's
  `oneshot` and GPTQModel's `quantize`, each in a process of its own. Seconds, with compiling, and
  the largest resident memory above that before the call, beside half of the float model and the
  hidden states of all windows.

glibc keeps what is freed for later, by default in an arena for each thread, and XLA allocates every
buffer with it. So qjax's process runs with MALLOC_ARENA_MAX and MALLOC_MMAP_THRESHOLD_ set as in
`MALLOC` below; --malloc default leaves them. A first call, on one batch, comes before the one that
is measured: it tells what of the memory is left by tracing and compiling.
"""

import argparse
import gc
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

import hf_folder
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
WHOLE_BATCH = 2  # windows run at once
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
CALIBRATION = pathlib.Path(__file__).parent / "data" / "moby_dick_calibration.txt"


def main() -> int:
    """Measures, prints a table and what was met; 1 if something was missed."""
    args = arguments()
    if args.child is not None:
        child(args)
        return 0
    found: dict[str, Any] = {"runs": args.runs, "cores": os.cpu_count(), "load": []}
    x, w = problem(LARGE)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "qjax": lambda: {"qjax": own(x, w, args.runs)} if args.skip != "parts" else {},
        "peers": lambda: peers(x, w, args.runs) if args.skip != "parts" else {},
        "model": lambda: {} if args.skip == "model" else {"model": whole(args)},
    }
    for part in parts.values():
        found["load"].append(os.getloadavg()[0])
        found |= part()
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1))
    return show(found, args)


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
    if "PEERS" not in os.environ:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        given, result = pathlib.Path(folder) / "problem.npz", pathlib.Path(folder) / "result.json"
        np.savez(given, x=x, w=w)
        script = pathlib.Path(__file__).with_name("peers_cost.py")
        command = [os.environ["PEERS"], script, given, result, str(runs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(result.read_text())


def whole(args: Any) -> dict[str, dict[str, float]]:
    """Seconds and memory of a whole model, by library."""
    script, found = pathlib.Path(__file__).resolve(), {}
    with tempfile.TemporaryDirectory() as path:
        folder = pathlib.Path(path)
        result = folder / "qjax.json"
        command = [sys.executable, script, "--child", result, "--windows", str(args.windows)]
        command += [] if args.model is None else ["--model", args.model]
        env = os.environ | (MALLOC if args.malloc == "set" else {})
        subprocess.run(command, check=True, env=env)
        found["qjax"] = json.loads(result.read_text())
        for peer in ("llm-compressor", "gptqmodel") if "PEERS" in os.environ else ():
            with smollm2.steps(f"{peer} of the whole model", 1) as advance:
                command = [os.environ["PEERS"], script.with_name("peers_whole.py"), peer, folder]
                subprocess.run(command, check=True, capture_output=True, cwd=folder)  # its logs
                advance()
            found[peer] = json.loads((folder / f"{peer}.json").read_text())
    return found


def child(args: Any) -> None:
    """Qjax's whole-model run; writes what it found, and the model for the peers beside it."""
    loaded, codes, tokenizer = models.load(args.model or smollm2.checkpoint())
    floats = jax.tree.map(
        lambda v: qjax.dequantize(v) if qjax.is_qtensor(v) else v, codes, is_leaf=qjax.is_qtensor
    )
    del codes
    cut = evaluate.text_windows(tokenizer, CALIBRATION.read_text(), LENGTH, args.windows)
    hf_folder.write(args.child.parent, loaded.config, floats, np.float32)
    np.save(args.child.parent / "tokens.npy", cut)
    batches = [jnp.asarray(b) for b in evaluate.batched(cut, WHOLE_BATCH)]
    tables = qjax.Rule(".*", None, where=qjax.is_gathered)
    recipe = qjax.Recipe(tables, qjax.Rule(".*", "int4_g64", qjax.gptq()))
    alive = [0]

    def run(batches: list[jax.Array], name: str) -> None:
        with smollm2.steps(name, 4 * loaded.config.num_layers) as advance:

            def progress(visits: Any) -> Iterator[Any]:
                for visit in visits:
                    held = (v for v in jax.live_arrays() if v.shape[:2] == batches[0].shape)
                    alive[0] = max(alive[0], sum(v.nbytes for v in held))
                    yield visit
                    advance()

            done = qjax.quantize_sequential(
                loaded.apply, floats, batches, recipe, progress=progress
            )
            jax.block_until_ready(done)

    gc.collect()
    with resident() as memory:
        run(batches[:1], "GPTQ of the whole model on one batch")
        gc.collect()
        with resident() as again:
            start = time.perf_counter()
            run(batches, "GPTQ of the whole model")
            seconds = time.perf_counter() - start
    found = {
        "seconds": seconds,
        "memory": memory[0],
        "memory, second call": again[0],
        "model": sum(v.nbytes for v in jax.tree.leaves(floats)),
        "activations": args.windows * LENGTH * loaded.config.hidden_size * 4,
        "alive": alive[0],
    }
    args.child.write_text(json.dumps(found))


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


def seconds(found: dict[str, Any]) -> list[tuple[str, bool]]:
    """Prints seconds; the bars and whether they were met."""
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
        faster = found["llm-compressor"][f"hessian {LARGE}"] / own[f"hessian {LARGE}"]
        bars.append(
            (f"hessian {faster:.2f}x as fast as llm-compressor, at least 1.3", faster >= 1.3)
        )
        total = BATCHES * own[f"hessian {LARGE}"]
        print(f"{BATCHES}x{BATCH} tokens: {total:.0f} s of Hessian, from one batch")
    if "gptqmodel" in found:
        share = own[f"solve {LARGE}"] / found["gptqmodel"][f"solve {LARGE}"]
        bars.append((f"solve {LARGE} {share:.2f}x of GPTQModel's seconds, at most 1", share <= 1))
    return bars


def show(found: dict[str, Any], args: Any) -> int:
    """Prints; 1 if a bar was missed."""
    bars = seconds(found) if "qjax" in found else []
    if "model" in found:
        for name, m in found["model"].items():
            text = f"{m['seconds']:.0f} s, {m['memory'] / 2**20:.0f} MiB above the level before"
            print(f"SmolLM2-135M, {args.windows}x{LENGTH} tokens, {name}: {text}")
        m = found["model"]["qjax"]
        room = 0.5 * m["model"] + m["activations"]
        text = (
            f"{m['memory'] / 2**20:.0f} MiB above the level before, at most {room / 2**20:.0f}: "
            f"half of the model {m['model'] / 2**21:.0f}, hidden states "
            f"{m['activations'] / 2**20:.0f} (between sites {m['alive'] / 2**20:.0f} were alive); "
            f"{m['memory, second call'] / 2**20:.0f} above what the first call left"
        )
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
    parser.add_argument("--skip", choices=("model", "parts"), help="leave out the whole model")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--malloc", choices=("set", "default"), default="set")
    parser.add_argument("--child", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
