"""How much faster than bfloat16 Llama-shaped layers train in FP8 on this GPU.

    python experiments/fp8_speed.py [SECTION...] [--json ROWS.json] [--tiny]

    projections  q, k, v, o, gate, up and down of one layer of width 8192, without attention
    layer        one whole layer of width 8192, beside the sum of its parts: its FP8 GEMMs, its
                 attention, all else in bfloat16, and the time in which the bytes that casts must
                 move are copied
    stack        four layers of an 8B shape
    step         a training step of a 1B shape: 16 layers, loss, AdamW, float32 weights

Forward and backward, gradients to the input and all weights, every cast included. Recipes and
bfloat16 take turns; medians count. Also printed: how many of the optimized program's matmuls are
cuBLASLt FP8 calls (three per site are wanted) or ours, and how many are others. Rows are added to a
JSON file as they are made. `--tiny` runs all of it at small shapes, on a CPU too.

XLA's Triton matmuls are off: tuning them for FP8 takes minutes per program.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax import training

BF16, F32, F8 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
RUNS, REPEATS = 5, 8  # medians of RUNS, each the mean of REPEATS calls in flight
STREAM = 1.15  # of the time to copy the bytes that casts must move
COPIED = 2**27  # elements of each of the copies that measure the memory
# Bytes per element of a tensor that enters two GEMMs: read for the amax, read again for the cast,
# two orientations of codes written. Blocks of 128 find their amax in the tile they cast.
CAST_BYTES = {"current": 6, "delayed": 6, "rowwise": 6, "block": 4}
SITES = ("q", "k", "v", "o", "gate", "up", "down")


class Shape(NamedTuple):
    """A Llama-shaped model on `batch` sequences of `length` tokens."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    batch: int
    length: int
    vocab: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each projection."""
        kv = self.width // self.heads * self.kv_heads
        d, f = self.width, self.hidden
        sizes = (d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)
        return dict(zip(SITES, sizes, strict=True))


WIDE = Shape(8192, 28672, 64, 8, 1, 4, 4096)  # a layer of Llama-3-70B
EIGHT = Shape(4096, 14336, 32, 8, 4, 4, 4096)
ONE = Shape(2048, 8192, 32, 8, 16, 2, 4096, 128256)
TINY = Shape(256, 512, 2, 1, 1, 1, 128)


def weights(shape: Shape, dtype: Any) -> list[dict[str, jax.Array]]:
    """Random weights `[in, out]` and gains of the norms, by layer."""

    @jax.jit
    def make(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(SITES))
        p = {
            name: (jax.random.normal(k, size) * size[0] ** -0.5).astype(dtype)
            for k, (name, size) in zip(keys, shape.features.items(), strict=True)
        }
        return p | dict.fromkeys(("norm1", "norm2"), jnp.ones(shape.width, dtype))

    return [make(jax.random.key(i)) for i in range(shape.layers)]


def normal(seed: int, *size: int, dtype: Any = BF16) -> jax.Array:
    """Random numbers, made on the device."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(seed), size, F32).astype(dtype))()


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """RMS norm over the last axis."""
    wide = x.astype(F32)
    scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
    return (wide * scale).astype(BF16) * gain.astype(BF16)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions on `[batch, length, heads, d]`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 500000.0 ** (-jnp.arange(half) / half)
    sin, cos = (f(angle).astype(BF16)[:, None, :] for f in (jnp.sin, jnp.cos))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal, on `[batch, length, heads, d]`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=flash())


@functools.cache
def flash() -> Any:
    """Whose attention: that of cuDNN where there is one, else XLA's, which is said."""
    if jax.default_backend() != "gpu":
        return "xla"
    x = normal(0, 1, 128, 2, 128)
    run = lambda x: jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
    try:
        jax.block_until_ready(jax.jit(jax.grad(lambda x: jnp.sum(run(x).astype(F32))))(x))
    except RuntimeError as error:  # an installation without cuDNN
        print(f"attention is XLA's: {str(error).splitlines()[0][:200]}")
        return "xla"
    print("attention is cuDNN's")
    return "cudnn"


def heads(x: jax.Array, shape: Shape, count: int) -> jax.Array:
    """`[tokens, features]` cut into heads."""
    return x.reshape(shape.batch, shape.length, count, -1)


def layer(p: dict[str, jax.Array], x: jax.Array, shape: Shape) -> jax.Array:
    """One decoder layer on `[tokens, width]`, in bfloat16 whatever the weights are."""
    project = lambda h, name: h @ p[name].astype(BF16)
    h = norm(x, p["norm1"])
    q = rotated(heads(project(h, "q"), shape, shape.heads))
    k = rotated(heads(project(h, "k"), shape, shape.kv_heads))
    v = heads(project(h, "v"), shape, shape.kv_heads)
    x = x + project(attention(q, k, v).reshape(x.shape), "o")
    h = norm(x, p["norm2"])
    return x + project(jax.nn.silu(project(h, "gate")) * project(h, "up"), "down")


def projections(p: Any, x: jax.Array, shape: Shape) -> jax.Array:
    """A layer without norms and attention, such that no two projections have equal gradients."""
    (p,) = p
    mixed = (x @ p["q"]) * _wide(x @ p["k"], shape) + _wide(x @ p["v"], shape)
    x = x + mixed @ p["o"]
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def _wide(x: jax.Array, shape: Shape) -> jax.Array:
    return x if x.shape[1] == shape.width else jnp.tile(x, (1, shape.width // x.shape[1]))


def layers(p: Any, x: jax.Array, shape: Shape) -> jax.Array:
    """All of them, unrolled."""
    for one in p:
        x = layer(one, x, shape)
    return x


def lowered(model: Callable[..., jax.Array], name: str, shape: Shape, *args: Any) -> Any:
    """A lowered function of (params, x, target) that returns the loss and every gradient."""

    def loss(p: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum((model(p, x, shape) * target).astype(F32))

    if name == "bf16":
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args)
    # The last matmul runs dense by default, as the papers keep the head: here it is none.
    recipe = dataclasses.replace(training.RECIPES[name], keep_head=False)
    low = training.fp8(loss, recipe, argnums=(0, 1))
    state = low.init(*args)
    return jax.jit(lambda p, *a: low.grads(p, state, *a)[:2]).lower(*args)


def compiled(programs: dict[str, Any]) -> dict[str, Any]:
    """Lowered programs compiled side by side; XLA lets one at a time tune its matmuls."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(lambda v: v.compile(), programs.values()), strict=True))


def calls(program: Any) -> dict[str, int]:
    """Custom calls of the optimized program by what they are."""
    text = program.as_text()
    count = lambda pattern: len(re.findall(pattern, text))
    return {
        "fp8": count(r'custom_call_target="__cublas\$lt\$matmul\$f8"'),
        "kernels": count(r'custom_call_target="mosaic_gpu'),
        "others": count(r'custom_call_target="__cublas\$(?:gemm|lt\$matmul)"')
        + count(r'kind":"__triton_(?:nested_)?gemm'),
    }


def turns(programs: dict[str, Any], *args: Any) -> dict[str, float]:
    """Milliseconds of a call of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(RUNS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(REPEATS):
                out = program(*args)
            jax.block_until_ready(out)
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start) / REPEATS)
            del out
    return {name: statistics.median(v) for name, v in times.items()}


class Rows:
    """What was measured: printed and added to the file, row by row."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self.path = path

    def add(self, **row: Any) -> None:
        row = {"card": jax.devices()[0].device_kind, "jax": jax.__version__, **row}
        short = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
        print("  ".join(f"{k} {short(v)}" for k, v in row.items() if k != "jax"), flush=True)
        if self.path is not None:
            rows = json.loads(self.path.read_text()) if self.path.exists() else []
            self.path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def compare(
    section: str,
    model: Callable[..., jax.Array],
    shape: Shape,
    bars: dict[str, float | None],
    rows: Rows,
) -> dict[str, float]:
    """A row per recipe of `bars`, bfloat16 beside; milliseconds."""
    p = weights(shape, BF16)
    args = p, *(normal(i, shape.tokens, shape.width) for i in (1, 2))
    start = time.perf_counter()
    programs = compiled({n: lowered(model, n, shape, *args) for n in ("bf16", *bars)})
    built = time.perf_counter() - start
    ms = turns(programs, *args)
    for name, bar in bars.items():
        ratio = ms["bf16"] / ms[name]
        row = {"section": section, **shape._asdict(), "recipe": name}
        row |= {"bf16_ms": ms["bf16"], "ms": ms[name], "gain": ratio, **calls(programs[name])}
        row |= {"wanted": 3 * len(SITES) * shape.layers, "built_s": built}
        if bar is not None:
            row |= {"bar": bar, "verdict": "met" if ratio >= bar else "MISSED"}
        rows.add(**row)
    return ms


def measure_projections(tiny: bool, rows: Rows) -> None:
    """The projections alone."""
    shape = TINY if tiny else WIDE._replace(kv_heads=WIDE.heads)
    bars = {"current": 1.6, "delayed": None, "rowwise": 1.5, "block": 1.3}
    compare("projections", projections, shape, bars, rows)


def measure_layer(tiny: bool, rows: Rows) -> None:
    """A whole layer, and its parts."""
    shape = TINY if tiny else WIDE
    ms = compare("layer", layers, shape, dict.fromkeys(("current", "rowwise", "block")), rows)
    parts = {"gemms": gemms(shape), "attention": attend(shape), "other": other(shape)}
    taken = {name: turns({name: run}, *args)[name] for name, (run, args) in parts.items()}
    speed = copying(TINY.width * TINY.tokens if tiny else COPIED)
    cast = cast_elements(shape)
    for name in ("current", "rowwise"):
        stream = CAST_BYTES[name] * cast / speed
        limit = sum(taken.values()) + STREAM * stream
        rows.add(
            section="layer against its parts",
            recipe=name,
            **{f"{k}_ms": v for k, v in taken.items()},
            fp8_tflops=6e-9 * shape.tokens * matrix_elements(shape) / taken["gemms"],
            stream_ms=stream,
            copy_TB_per_s=1e-9 * speed,
            limit_ms=limit,
            ms=ms[name],
            verdict="met" if ms[name] <= limit else "MISSED",
        )


def copying(elements: int) -> float:
    """Bytes per ms of copies, of so many that the gaps between programs do not count; of 32-bit
    words, since XLA copies shorter ones at three quarters of the speed.
    """

    @jax.jit
    def copies(xs: list[jax.Array]) -> list[jax.Array]:
        return [x ^ 1 for x in xs]

    xs = [jax.random.bits(jax.random.key(i), (elements // 2,)) for i in range(16)]
    ms = turns({"copies": copies.lower(xs).compile()}, xs)["copies"]
    return 4 * elements * len(xs) / ms


def matrix_elements(shape: Shape) -> int:
    """Weights of one layer's projections."""
    return sum(a * b for a, b in shape.features.values())


def cast_elements(shape: Shape) -> int:
    """Elements that one layer casts: four x, which projections share, seven g and the weights."""
    x = 3 * shape.width + shape.hidden
    g = sum(out for _, out in shape.features.values())
    return shape.tokens * (x + g) + matrix_elements(shape)


def gemms(shape: Shape) -> tuple[Any, Any]:
    """The 21 FP8 GEMMs of a layer in one program, operands laid out as tensor cores take them."""
    t, operands = shape.tokens, []
    for i, (a, b) in enumerate(shape.features.values()):
        for j, size in enumerate(((t, a), (b, a), (t, b), (a, b), (b, t), (a, t))):
            operands.append(normal(6 * i + j, *size, dtype=F8))
    dot = lambda a, b: lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=BF16)

    def run(operands: list[jax.Array]) -> list[jax.Array]:
        return [dot(*operands[i : i + 2]) for i in range(0, len(operands), 2)]

    return jax.jit(run).lower(operands).compile(), (operands,)


def attend(shape: Shape) -> tuple[Any, Any]:
    """Attention, forward and backward."""
    size = shape.batch, shape.length
    head = shape.width // shape.heads
    counts = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    args = [normal(i, *size, n, head) for i, n in enumerate(counts)]

    def run(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(g)

    return jax.jit(run).lower(*args).compile(), args


def other(shape: Shape) -> tuple[Any, Any]:
    """All but matmuls and attention: norms, rotations, gate and sums, forward and backward."""
    kv = shape.width // shape.heads * shape.kv_heads
    widths = [shape.width] * 2 + [kv, shape.width, shape.hidden, shape.hidden, shape.width]
    given = [normal(i, shape.tokens, n) for i, n in enumerate(widths)]
    gain = jnp.ones(shape.width, BF16)

    def rest(x, q, k, o, gate, up, down, gain1, gain2):
        h = norm(x, gain1)
        turned = rotated(heads(q, shape, shape.heads)), rotated(heads(k, shape, shape.kv_heads))
        x = x + o
        h2 = norm(x, gain2)
        # as many times as projections take them: their gradients are summed
        return (h, h, h), turned, (h2, h2), jax.nn.silu(gate) * up, x + down

    def run(given: Any, gains: Any, cotangents: Any) -> Any:
        (h, *_), turned, (h2, _), act, y = rest(*given, *gains)
        _, pull = jax.vjp(rest, *given, *gains)
        return (h, turned, h2, act, y), pull(cotangents)

    shapes = jax.eval_shape(rest, *given, gain, gain)
    leaves, tree = jax.tree.flatten(shapes)
    g = jax.tree.unflatten(tree, [normal(9 + i, *s.shape) for i, s in enumerate(leaves)])
    args = given, (gain, gain), g
    return jax.jit(run).lower(*args).compile(), args


def measure_stack(tiny: bool, rows: Rows) -> None:
    """Layers of an 8B shape."""
    shape = TINY._replace(layers=2) if tiny else EIGHT
    compare("stack", layers, shape, {"current": 1.3, "rowwise": None, "block": None}, rows)


def measure_step(tiny: bool, rows: Rows) -> None:
    """A whole step of a 1B shape. Both programs take turns at one set of weights and moments."""
    shape = TINY._replace(layers=2, vocab=512) if tiny else ONE
    tx = optax.adamw(1e-4)

    def loss(p: Any, ids: jax.Array) -> jax.Array:
        x = layers(p["layers"], p["embed"].astype(BF16)[ids[:-1]], shape)
        logits = norm(x, p["norm"]) @ p["embed"].astype(BF16).T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(F32), ids[1:])
        return jnp.mean(losses)

    p = {"layers": weights(shape, F32), "norm": jnp.ones(shape.width)}
    p["embed"] = normal(3, shape.vocab, shape.width, dtype=F32) * 0.02
    ids = jax.random.randint(jax.random.key(4), (shape.tokens + 1,), 0, shape.vocab)

    def program(name: str) -> Any:
        if name == "bf16":
            grads_of = jax.value_and_grad(loss)
        else:
            low = training.fp8(loss, name)
            state = low.init(p, ids)
            grads_of = lambda p, ids: low.grads(p, state, ids)[:2]

        def step(p: Any, moments: Any, ids: jax.Array) -> Any:
            value, grads = grads_of(p, ids)
            updates, moments = tx.update(grads, moments, p)
            return optax.apply_updates(p, updates), moments, value

        return jax.jit(step, donate_argnums=(0, 1)).lower(p, jax.eval_shape(tx.init, p), ids)

    names, start = ("bf16", "current"), time.perf_counter()
    programs = compiled({name: program(name) for name in names})
    built = time.perf_counter() - start
    carry = p, tx.init(p)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(2 * RUNS + 1):
        for name in names:
            start = time.perf_counter()
            *carry, value = programs[name](*carry, ids)
            jax.block_until_ready(value)
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    ms = {name: statistics.median(v) for name, v in times.items()}
    ratio = ms["bf16"] / ms["current"]
    rows.add(
        section="step",
        **shape._asdict(),
        recipe="current",
        parameters=sum(v.size for v in jax.tree.leaves(carry[0])),
        bf16_ms=ms["bf16"],
        ms=ms["current"],
        gain=ratio,
        **calls(programs["current"]),
        wanted=3 * len(SITES) * shape.layers,
        built_s=built,
        bar=1.05,
        verdict="met" if ratio >= 1.05 else "MISSED",
    )


SECTIONS = {
    "projections": measure_projections,
    "layer": measure_layer,
    "stack": measure_stack,
    "step": measure_step,
}


def main() -> None:
    """Measures the sections."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for name in args.sections or SECTIONS:
        SECTIONS[name](args.tiny, Rows(args.json))


if __name__ == "__main__":
    main()
