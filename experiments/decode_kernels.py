"""Are the kernels between the matmuls of a decode step right, on a GPU?

Each problem's result, on memory that held NaN, against float64 on the same operands: the largest
difference over the largest value of the result, beside that of the definition run by XLA. Cached
positions that may not be read are NaN. Exits with 1 where a kernel has more than twice XLA's
error, or changes a position of the cache that is not the new token's.

    python experiments/decode_kernels.py
    python experiments/decode_kernels.py --time     # and how long they take, alone (CUPTI)

"""

import argparse
import statistics
from typing import Any

import ceilings
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.add_norm import problems as norms
from pallas_kernels.add_norm.op import add_norm
from pallas_kernels.decode_attention import problems as attentions
from pallas_kernels.decode_attention.op import decode_attention
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.gated import problems as gates
from pallas_kernels.gated.op import gated

BF16 = jnp.bfloat16
LEAST = 1 / 256  # half a unit in the last place of a bfloat16, over itself


def normal(seed: int, *shape: int) -> jax.Array:
    """Random bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, BF16)


def wide(x: Any) -> np.ndarray:
    """In float64."""
    return np.asarray(jnp.asarray(x, jnp.float32)).astype(np.float64)


def error(y: Any, truth: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(wide(y) - truth).max() / np.abs(truth).max())


def judge(what: str, ours: float, xla: float) -> bool:
    """Prints a row; whether it is right."""
    good = ours <= 2 * max(xla, LEAST)  # not where NaN
    print(f"{'ok   ' if good else 'WRONG'} {what}: error {ours:.5f}, XLA's {xla:.5f}", flush=True)
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
    narrow = lambda x: wide(jnp.asarray(x, jnp.float32).astype(BF16))

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


def check() -> bool:
    """All of it."""
    good = [attention(*case) for case in attentions.SMALL]
    for p in norms.PROBLEMS:
        x, y, scale = normal(0, p.rows, p.width), normal(1, p.rows, p.width), normal(2, p.width)
        total = wide((x.astype(jnp.float32) + y.astype(jnp.float32)).astype(BF16))
        root = np.sqrt((total * total).mean(-1, keepdims=True) + p.epsilon)
        ceilings.poison()
        s, ours = add_norm(x, y, scale, p.epsilon, implementation="mosaic_gpu")
        xla = add_norm(x, y, scale, p.epsilon, implementation="reference")[1]
        truth = total / root * wide(scale)
        what = f"add_norm {tuple(p)}, sum {'exact' if (wide(s) == total).all() else 'WRONG'}"
        good.append(judge(what, error(ours, truth), error(xla, truth)))
    for p in gates.PROBLEMS:
        gate, up = normal(0, p.rows, p.width), normal(1, p.rows, p.width)
        g = wide(gate)
        cubic = 1.5957691216057308 * (g + 0.044715 * g**3)
        truth = g / (1 + np.exp(-(g if p.activation == "silu" else cubic))) * wide(up)
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


def main() -> None:
    """Checks, and times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    if not check():
        raise SystemExit("a kernel is wrong")
    if args.time:
        times()


if __name__ == "__main__":
    main()
