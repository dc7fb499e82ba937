"""Are the kernels between the matmuls of a decode step right, on a GPU?

Each problem's result, on memory that held NaN, against float64 on the same operands: the largest
difference over the largest value of the result, beside that of the definition run by XLA. Cached
positions that may not be read are NaN. Exits with 1 where a kernel has more than twice XLA's
error, or changes a position of the cache that is not the new token's. `norm_matmul` is compared
with what launches of their own would round in between, on the CPU.

    python experiments/decode_kernels.py
    python experiments/decode_kernels.py --time     # and how long they take, alone (CUPTI)
    python experiments/decode_kernels.py norm_matmul --time --formats int4 --rows 1   # of one op

The times of `norm_matmul` are those of chains of layers' halves, with it and with the launches
that it replaces, in turns: the wall clock of a program that first reads 16 GiB, while the host
launches the rest, less that of reading alone.
"""

import argparse
import concurrent.futures
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np
import tune_kernels

from pallas_kernels.add_norm import problems as norms
from pallas_kernels.add_norm.op import add_norm
from pallas_kernels.decode_attention import problems as attentions
from pallas_kernels.decode_attention.op import decode_attention
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.gated import problems as gates
from pallas_kernels.gated.op import gated
from pallas_kernels.norm_matmul import mosaic_gpu as fused
from pallas_kernels.norm_matmul import problems as fuseds
from pallas_kernels.norm_matmul.op import norm_matmul
from pallas_kernels.norm_matmul.problem import Problem as NormMatmul
from pallas_kernels.quantized_matmul import mosaic_gpu as products
from pallas_kernels.quantized_matmul.op import joined_matmul, quantized_matmul

BF16 = jnp.bfloat16
OPTIONS = {"xla_gpu_enable_command_buffer": ""}  # kernels of a graph start one after another
LAYERS, READS, ROUNDS = 64, 16, 15  # halves of a layer in a program, GiB read before, turns
WIDTH, HIDDEN, HEADS = 4096, 14336, (4096, 1024, 1024)  # of Llama-3-8B
LEAST = 1 / 256  # half a unit in the last place of a bfloat16, over itself


def normal(seed: int, *shape: int) -> jax.Array:
    """Random bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def wide(x: Any) -> np.ndarray:
    """In float64."""
    return np.asarray(jnp.asarray(x, jnp.float32)).astype(np.float64)


def narrow(x: Any) -> np.ndarray:
    """Rounded to bfloat16."""
    return wide(jnp.asarray(x, jnp.float32).astype(BF16))


def error(y: Any, truth: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(wide(y) - truth).max() / np.abs(truth).max())


def judge(what: str, ours: float, other: float, whose: str = "XLA's") -> bool:
    """Prints a row; whether it is right."""
    good = ours <= 2 * max(other, LEAST)  # not where NaN
    verdict = "ok   " if good else "WRONG"
    print(f"{verdict} {what}: error {ours:.5f}, {whose} {other:.5f}", flush=True)
    return good


def operands(p: Problem, first: int, last: int) -> tuple[Any, ...]:
    """Of `decode_attention`; what is not in the cache yet is NaN."""
    heads = p.kv_heads * p.groups
    q, k, v = (normal(i, p.batch, n, p.head_dim) for i, n in enumerate((heads, *[p.kv_heads] * 2)))
    there = (jnp.arange(p.length) < last)[None, :, None, None]
    shape = (p.batch, p.length, p.kv_heads, p.head_dim)
    keys, values = (jnp.where(there, normal(i, *shape), jnp.nan) for i in (3, 4))
    angles = jax.random.uniform(jax.random.key(5), (p.head_dim // 2,)) * 6
    turn = jnp.cos(angles), jnp.sin(angles)
    return 2 * q, k, v, *turn, jnp.int32(first), jnp.int32(last), keys, values


def attention(p: Problem, first: int, last: int) -> bool:
    """One problem of `decode_attention`."""
    q, k, v, cos, sin, *_, keys, values = given = operands(p, first, last)
    half, c, s = p.head_dim // 2, wide(cos), wide(sin)

    def turned(x: Any) -> np.ndarray:
        near, far = wide(x)[..., :half], wide(x)[..., half:]
        return narrow(np.concatenate((near * c - far * s, far * c + near * s), -1))

    full_k, full_v = wide(keys), wide(values)
    full_k[:, last], full_v[:, last] = turned(k), wide(v)
    queries = turned(q).reshape(p.batch, p.kv_heads, p.groups, p.head_dim)
    seen = slice(first, last + 1)
    scores = np.einsum("bkgd,btkd->bkgt", queries, full_k[:, seen]) * p.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    truth = np.einsum("bkgt,btkd->bkgd", weights, full_v[:, seen]).reshape(q.shape)

    def run(name: str, given: Any = given) -> Any:
        ceilings.poison()
        return jax.jit(lambda *a: decode_attention(*a, p.scale, implementation=name))(*given)

    y, new_k, new_v = run("mosaic_gpu")
    zeros = [jnp.where(jnp.isnan(x), 0, x) for x in (keys, values)]  # XLA multiplies them by 0
    xla = run("reference", (*given[:-2], *zeros))[0]
    same = lambda a, b: np.array_equal(np.nan_to_num(wide(a), nan=9), np.nan_to_num(b, nan=9))
    rest = [i for i in range(p.length) if i != last]
    kept = same(new_k[:, jnp.array(rest)], full_k[:, rest]) and same(new_v, full_v)
    key = error(new_k[:, last], full_k[:, last])
    what = f"{tuple(p)}, {first} to {last}, cache {'kept' if kept else 'CHANGED'}, key {key:.5f}"
    return judge(f"decode_attention {what}", error(y, truth), error(xla, truth)) and (
        kept and key <= LEAST
    )


def activated(g: np.ndarray, name: str) -> np.ndarray:
    """The activation of a gate."""
    cubic = 1.5957691216057308 * (g + 0.044715 * g**3)
    return g / (1 + np.exp(-np.clip(g if name == "silu" else cubic, -700, None)))


def check_fused(p: NormMatmul, scale_dtype: Any) -> bool:
    """One problem of `norm_matmul`."""
    k = p.weights[0].k
    x, y, scale = normal(0, p.rows, k), normal(1, p.rows, k), normal(2, k).astype(scale_dtype)
    pairs = [tune_kernels.operands(1, w, i)[1:] for i, w in enumerate(p.weights)]
    total = wide((x.astype(jnp.float32) + y.astype(jnp.float32)).astype(BF16))
    root = np.sqrt((total * total).mean(-1, keepdims=True) + p.epsilon)
    normed = total / root * wide(scale)
    truth = [normed @ w for _, w in pairs]
    apart = [narrow(narrow(normed) @ w) for _, w in pairs]
    if p.gate is not None:
        truth = [activated(truth[0], p.gate) * truth[1]]
        apart = [narrow(activated(apart[0], p.gate)) * apart[1]]
    ceilings.poison()
    s, ours = norm_matmul(
        *(x, y, scale, p.epsilon, [a for a, _ in pairs], p.weights, p.layout),
        gate=p.gate,
        implementation="mosaic_gpu",
    )
    what = f"norm_matmul {p.rows} x {p.weights[0]} x {len(p.weights)}, {p.gate}, {scale.dtype}"
    what += f", sum {'exact' if (wide(s) == total).all() else 'WRONG'}"
    each = zip(ours, apart, truth, strict=True)
    right = [judge(what, error(a, t), error(b, t), "of launches") for a, b, t in each]
    return bool((wide(s) == total).all()) and all(right)


def check(only: str | None) -> bool:
    """All of it, or one op."""
    good = []
    if only in (None, "norm_matmul"):
        cases = zip(fuseds.SMALL, itertools.cycle((BF16, jnp.float32)), strict=False)
        large = [(half(f, m, n), BF16) for f, m, n in (("int4", 1, HEADS), ("int8", 8, HEADS))]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:  # most of it compiles
            good += list(pool.map(lambda case: check_fused(*case), (*cases, *large)))
    if only in (None, "decode_attention"):
        good += [attention(*case) for case in attentions.SMALL]
    for p in norms.PROBLEMS if only in (None, "add_norm") else ():
        x, y, scale = normal(0, p.rows, p.width), normal(1, p.rows, p.width), normal(2, p.width)
        total = wide((x.astype(jnp.float32) + y.astype(jnp.float32)).astype(BF16))
        root = np.sqrt((total * total).mean(-1, keepdims=True) + p.epsilon)
        ceilings.poison()
        s, ours = add_norm(x, y, scale, p.epsilon, implementation="mosaic_gpu")
        xla = add_norm(x, y, scale, p.epsilon, implementation="reference")[1]
        truth = total / root * wide(scale)
        what = f"add_norm {tuple(p)}, sum {'exact' if (wide(s) == total).all() else 'WRONG'}"
        good.append(judge(what, error(ours, truth), error(xla, truth)))
    for p in gates.PROBLEMS if only in (None, "gated") else ():
        gate, up = normal(0, p.rows, p.width), normal(1, p.rows, p.width)
        truth = activated(wide(gate), p.activation) * wide(up)
        ceilings.poison()
        ours = gated(gate, up, p.activation, implementation="mosaic_gpu")
        xla = gated(gate, up, p.activation, implementation="reference")
        good.append(judge(f"gated {tuple(p)}", error(ours, truth), error(xla, truth)))
    return all(good)


def times() -> None:
    """Microseconds of `decode_attention`, beside those of reading its keys and values."""
    for p, first, last in attentions.LARGE:
        given = operands(p, first, last)
        size = 4 * p.batch * (last - first) * p.kv_heads * p.head_dim
        run = jax.jit(lambda *a: decode_attention(*a, p.scale)[0])  # noqa: B023
        calls = ceilings.timed(run.lower(*given).compile(), *given)
        mine = statistics.median(us for c in calls for n, us in c if "decode_attention" in n)
        print(f"{tuple(p)}: {mine:.2f} us, read {ceilings.best_reader(size)[0]:.2f} us", flush=True)


def half(name: str, m: int, channels: Sequence[int], gate: str | None = None) -> NormMatmul:
    """What begins half a layer of Llama-3-8B."""
    weights = tuple(tune_kernels.FORMATS[name][0](WIDTH, n) for n in channels)
    return NormMatmul(m, 1e-5, weights, tune_kernels.layout_of(weights[0]), gate=gate)


def configs(p: NormMatmul, kind: str) -> list[products.Config]:
    """The one that is taken, and others."""
    one, gate = fused.whole(p), p.gate is not None
    taken = products.choose_config(one.m, one.weight, kind, norm=True, gate=gate)
    assert taken is not None
    depth, warpgroups = {4: (2, 4)}.get(taken.depth, (4, 2))
    others = [
        taken._replace(early=taken.early + 1),
        taken._replace(depth=depth, warpgroups=warpgroups),
    ]
    sized = [products.plan(one.m, one.weight, c, norm=True, gate=gate) for c in others]
    fits = [c for c, s in zip(others, sized, strict=True) if not isinstance(s, str)]
    return [taken, *fits]


def chain(p: NormMatmul, config: products.Config | None, down: Any) -> Any:
    """`(x, y, scale, weights of each layer, data) -> x, y` of LAYERS halves of a layer; with
    launches of their own where there is no config. Behind a gate follows the product back to the
    width. Before all of it data is read, so that the host is ahead with its launches.
    """
    widths = tuple(w.n for w in p.weights)

    def begin(x: jax.Array, y: jax.Array, scale: jax.Array, arrays: Any) -> Any:
        if config is not None:
            given = (x, y, scale), arrays
            total, *results = products.launch(fused.whole(p), config, widths, *given)
            return total, results[0]
        total, normed = add_norm(x, y, scale, p.epsilon, implementation="mosaic_gpu")
        results = joined_matmul(normed, arrays, p.weights, p.layout, implementation="mosaic_gpu")
        if p.gate is None:
            return total, results[0]
        return total, gated(*results, p.gate, implementation="mosaic_gpu")

    def layers(x: jax.Array, y: jax.Array, scale: jax.Array, held: Any, data: jax.Array) -> Any:
        x = behind(x, data)
        for i in range(LAYERS):
            arrays, back = held[i % len(held)]
            x, y = begin(x, y, scale, arrays)
            if down is not None:
                y = quantized_matmul(y, back, down, p.layout, implementation="mosaic_gpu")
        return x, y

    return jax.jit(layers, compiler_options=OPTIONS)


def behind(x: jax.Array, data: jax.Array) -> jax.Array:
    """A copy of x, made when data has been read READS times."""
    read = ceilings.reader(data.size, *ceilings.READERS[0])
    for _ in range(READS):
        x = read(data, x, x)
    return x


def time_fused(formats: Sequence[str], rows: Sequence[int]) -> None:
    """Microseconds of half a layer in a chain of them, from x and y to the next ones."""
    kind = jax.devices()[0].device_kind
    data = ceilings.random_words(0, (2**28,))
    shapes = ((HEADS, None), ((HIDDEN, HIDDEN), "silu"))
    for name, m, (channels, gate) in itertools.product(formats, rows, shapes):
        p = half(name, m, channels, gate)
        down = None if gate is None else tune_kernels.FORMATS[name][0](HIDDEN, WIDTH)
        weights = [*p.weights, *([] if down is None else [down])]
        count = ceilings.rotation(sum(4 * tune_kernels.read_words(m, w) for w in weights))
        made = [tune_kernels.random_arrays(w, count) for w in weights]
        held = [(v[: len(channels)], v[-1]) for v in map(list, zip(*made, strict=True))]
        given = normal(0, m, WIDTH), normal(1, m, WIDTH), normal(2, WIDTH), held, data
        ways = [None, *configs(p, kind)]
        alone = jax.jit(lambda x, y, scale, held, data: behind(x, data), compiler_options=OPTIONS)
        programs = [alone, *(chain(p, way, down) for way in ways)]
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            run = lambda program: jax.block_until_ready(program(*given))  # noqa: B023
            ends = list(pool.map(run, programs))[1:]
        apart = max(error(a, wide(b)) for a, b in zip(ends[1], ends[0], strict=True))
        walls: list[list[float]] = [[] for _ in programs]
        for _ in range(ROUNDS):
            for wall, program in zip(walls, programs, strict=True):
                began = time.perf_counter()
                jax.block_until_ready(program(*given))
                wall.append(1e6 * (time.perf_counter() - began))
        first, *others = map(statistics.median, walls)
        us = [(v - first) / LAYERS for v in others]
        what = f"{name}, m {m}, {channels}{'' if gate is None else ', gated, and down'}"
        print(f"{what}: {us[0]:.2f} us apart, {us[1]:.2f} joined; last results {apart:.4f} apart")
        for way, middle in zip(ways, us, strict=True):
            print(f"    {'apart' if way is None else tuple(way)}: {middle:.2f}", flush=True)


def main() -> None:
    """Checks, and times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ops = ("add_norm", "decode_attention", "gated", "norm_matmul")
    parser.add_argument("op", nargs="?", choices=ops)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--unchecked", action="store_true", help="times only")
    parser.add_argument("--formats", nargs="+", default=["int4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    if not args.unchecked and not check(args.op):
        raise SystemExit("a kernel is wrong")
    if args.time and args.op in (None, "decode_attention"):
        times()
    if args.time and args.op in (None, "norm_matmul"):
        time_fused(args.formats, args.rows)


if __name__ == "__main__":
    main()
