"""Round-to-nearest of one large matrix, beside jitted qwix in the same run.

Both libraries take turns and are waited for; the medians count. `prepared` is int4_g128 quantized
and laid out for a CPU (two codes to a byte) in one jit, beside qwix's int4. Memory is measured in
a fresh process per format: bytes that XLA plans for arguments, output and scratch, and by how much
the resident set grew while qjax quantized for the first time, compilation included.
Bars: qjax takes no longer than qwix, and a third of its time for `prepared`; argument, output and
scratch are at most 2.5x the matrix.

    pip install qwix==0.1.8
    python experiments/bench_quantize.py

"""

import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time

SHAPE = (4096, 11008)  # the down projection of a 7B llama, float32
AXIS = 0  # contracted: parameters are [in, out]
FORMATS = {"int8": ("int8", None), "nf4_g64": ("nf4", 64), "int4_g128": ("int4", 128)}  # for qwix
RUNS = 15  # of each library, after one to compile
TIME_BAR, PREPARED_BAR, MEMORY_BAR = 1.0, 1 / 3, 2.5


def matrix():
    """The float32 matrix, on the device."""
    import jax

    return jax.block_until_ready(jax.random.normal(jax.random.key(0), SHAPE))


def times(spec: str) -> dict[str, float]:
    """Median seconds of each library."""
    import jax
    from qwix._src.core import qarray

    import qjax

    qtype, group = FORMATS[spec]
    how = qarray.HowToQuantize(
        qtype=qtype,
        channelwise_axes=[1 - AXIS],
        tiled_axes={} if group is None else {AXIS: group},
    )
    peer = jax.jit(lambda w: qarray.quantize(w, how))
    calls = {"qjax": lambda: qjax.quantize(w, spec, AXIS), "qwix": lambda: peer(w)}
    if spec == "int4_g128":
        make = jax.jit(lambda w: qjax.prepare(qjax.quantize(w, spec, AXIS)))
        calls["prepared"] = lambda: make(w)
    w = matrix()
    seconds = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def memory(spec: str) -> dict[str, float]:
    """Peak bytes over bytes of the matrix: planned by XLA, and seen in the resident set."""
    import jax

    import qjax

    w = matrix()
    time.sleep(1)  # the scratch of its random numbers is given back a little later
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    q = jax.block_until_ready(qjax.quantize(w, spec, AXIS))
    grown = resident("VmHWM") - before
    compiled = jax.jit(lambda w: qjax.quantize(w, spec, AXIS)).lower(w).compile()
    plan = compiled.memory_analysis()
    planned = sum(getattr(plan, f"{part}_size_in_bytes") for part in ("argument", "output", "temp"))
    return {"planned": planned / w.nbytes, "resident": 1 + grown / w.nbytes, "of": repr(q)}


def resident(field: str) -> int:
    """Bytes of a field of this process's /proc/self/status (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    """Prints one line per format."""
    import jax

    device = jax.devices()[0].device_kind
    print(f"{SHAPE} float32 on {device}, {platform.machine()}, jax {jax.__version__}")
    for spec in FORMATS:
        ran = times(spec)
        ratio = ran["qjax"] / ran["qwix"]
        if "prepared" in ran:
            of = ran["prepared"] / ran["qwix"]
            print(
                f"{spec:10} prepared {1e3 * ran['prepared']:6.1f} ms, ratio {of:.2f} "
                f"(bar {PREPARED_BAR:.2f}, {verdict(of <= PREPARED_BAR)})"
            )
        child = [sys.executable, __file__, spec]
        peak = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        print(
            f"{spec:10} qjax {1e3 * ran['qjax']:6.1f} ms, qwix {1e3 * ran['qwix']:6.1f} ms, "
            f"ratio {ratio:.2f} (bar {TIME_BAR}, {verdict(ratio <= TIME_BAR)}); peak memory "
            f"{peak['planned']:.2f}x planned, {peak['resident']:.2f}x resident "
            f"(bar {MEMORY_BAR}x, {verdict(max(peak['planned'], peak['resident']) <= MEMORY_BAR)})"
        )


def verdict(held: bool) -> str:
    """How a bar is printed."""
    return "met" if held else "missed"


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    if len(sys.argv) > 1:
        print(json.dumps(memory(sys.argv[1])))
    else:
        main()
