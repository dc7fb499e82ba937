"""The Hopper kernels of a decode step on a CPU, lane by lane: products cut along k by a cluster,
joined and with what follows them; attention.

`lanes.on_a_cpu` carries the kernels out; truth is float64 on the same operands.
"""

import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from hopper_operands import ACTIVATIONS, BF16, close, packed, weight_of, wide

from pallas_kernels.decode_attention import mosaic_gpu as attention
from pallas_kernels.decode_attention.problems import SMALL
from pallas_kernels.quantized_matmul import mosaic_gpu as products
from pallas_kernels.quantized_matmul.problem import Problem, Weight
from pallas_kernels.quantized_matmul.problems import NF4

INT4 = Weight(1000, 96, 128, "int4", "bfloat16")
CHANNELS = Weight(1000, 96, 1000, "int4", "float16")
ZEROS = Weight(1000, 40, 32, "uint4", "bfloat16", zero="uint4")
OFFSETS = Weight(776, 48, 64, "uint4", "float16", offset="float16")
SIGNED_OFFSETS = OFFSETS._replace(code="int4", n=32)
SIGNED_ZEROS = Weight(776, 32, 128, "int4", "float16", zero="int4")
INT8 = Weight(1544, 40, 1544, "int8")
PAIRS = Weight(1032, 96, 64, "uint4", values=NF4)
FP8 = Weight(4096, 24, 4096, "float8_e4m3fn")
# m, weight, channels of each, bias, activation, dtype of the result, how the work is cut
PRODUCTS = (
    (1, INT4, (96,), False, None, "float32", (1, 1, 2, 1, 2, 2)),  # three turns
    (3, CHANNELS, (32, 16, 48), True, None, "bfloat16", (1, 2, 1, 2, 1, 2)),
    (3, ZEROS, (40,), True, "silu", "float32", (1, 1, 2, 1, 1, 1)),
    (16, ZEROS, (40,), False, None, "float32", (1, 2, 2, 3, 3, 1)),
    (16, OFFSETS, (32, 16), True, "relu", "float32", (1, 1, 2, 3, 2, 1)),
    (3, SIGNED_OFFSETS, (32,), False, None, "float32", (1, 1, 2, 1, 2, 1)),
    (3, SIGNED_ZEROS, (32,), False, None, "float32", (1, 1, 2, 1, 2, 1)),
    (16, INT8, (40,), True, "gelu_tanh", "float32", (1, 1, 4, 1, 2, 1)),
    (1, INT8, (40,), False, None, "float32", (2, 1, 2, 1, 2, 0)),
    (3, PAIRS, (32, 64), True, "silu", "bfloat16", (1, 1, 4, 1, 2, 1)),  # a ring used three times
    (1, FP8, (24,), True, None, "float32", (1, 1, 8, 2, 1, 1)),
)
TUNED = [
    pytest.param(row, id=f"{device} {row['format']} {row['k']}x{row['n']} m {row['m']}")
    for device, rows in products.TUNED.items()
    for row in rows
]


def narrow(x):
    return wide(x.astype(np.float32).astype(BF16))


def attention_operands(p, first, last):
    """q, k, v, cos, sin, seen, keys, values; what is not in the cache yet is NaN."""
    rng, heads = np.random.default_rng(0), p.kv_heads * p.groups
    normal = lambda *shape: rng.normal(size=shape).astype(BF16)
    q, k, v = (normal(p.batch, n, p.head_dim) for n in (heads, p.kv_heads, p.kv_heads))
    there = (np.arange(p.length) < last)[:, None, None]
    shape = (p.batch, p.length, p.kv_heads, p.head_dim)
    keys, values = (np.where(there, normal(*shape), BF16(np.nan)) for _ in "kv")
    angles = rng.uniform(0, 6, p.head_dim // 2)
    turn = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
    return (q * BF16(2), k, v, *turn, np.array([first, last], np.int32), keys, values)


def attended(p, first, last, q, k, v, cos, sin, seen, keys, values):
    """y, and the caches, in float64; q and k are rounded once they are turned, as in a model."""

    def turned(x):
        near, far = np.split(wide(x), 2, -1)
        return narrow(np.concatenate((near * cos - far * sin, far * cos + near * sin), -1))

    keys, values = wide(keys), wide(values)
    keys[:, last], values[:, last] = turned(k), wide(v)
    seen = slice(first, last + 1)
    queries = turned(q).reshape(p.batch, p.kv_heads, p.groups, p.head_dim)
    scores = np.einsum("bkgd,btkd->bkgt", queries, keys[:, seen]) * p.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgt,btkd->bkgd", weights, values[:, seen]).reshape(q.shape), keys, values


def check_product(cut, m, weight, channels, bias=False, activation=None, out="float32", size=1.0):
    """Against float64, with x of about `size`. Sums of float32 have k roundings of 6e-8; bfloat16,
    half a unit in the last place.
    """
    rng, weights = np.random.default_rng(1), [weight._replace(n=n) for n in channels]
    layout = "hopper8" if "8" in weight.code else "hopper4"
    x, arrays, wanted = (size * rng.normal(size=(m, weight.k))).astype(BF16), [], []
    for i, one in enumerate(weights):
        held, w = packed(one, layout, i)
        of_channels = rng.normal(size=one.n).astype(np.float32)
        arrays.append(held | ({"bias": jnp.asarray(of_channels)} if bias else {}))
        wanted.append(ACTIVATIONS[activation](wide(x) @ w + bias * wide(of_channels)))
    whole = Problem(m, weight, layout, "bfloat16", out, bias, activation)
    launch = products.launch.__wrapped__
    ours = launch(whole, products.Config(*cut), channels, jnp.asarray(x), arrays)
    for y, full in zip(ours, wanted, strict=True):
        close(y, full, {"float32": 2e-6, "bfloat16": 2**-8}[out])


@pytest.mark.parametrize("which", range(len(PRODUCTS)))
def test_a_product_lane_by_lane(which, monkeypatch):
    *what, cut = PRODUCTS[which]
    lanes.on_a_cpu(monkeypatch)
    check_product(cut, *what)


@pytest.mark.parametrize("size", [2.0**-52, 2.0**61])
@pytest.mark.parametrize("weight", [INT4, ZEROS, INT8, FP8], ids=lambda w: w.code)
def test_x_may_be_large_or_small(weight, size, monkeypatch):
    lanes.on_a_cpu(monkeypatch)
    weight = weight._replace(n=16, k=1024, group=min(weight.group, 1024))
    check_product((2, 1, 1, 1, 1, 1), 3, weight, (16,), size=size)


@pytest.mark.slow
@pytest.mark.parametrize("row", TUNED)
def test_a_product_as_it_is_cut_on_a_device(row, monkeypatch):
    """All of k, and the channels that two clusters take in all their turns."""
    lanes.on_a_cpu(monkeypatch, 2**26)
    weight, config = weight_of(row), products.Config(*row["config"])
    sizes = products.plan(row["m"], weight, config)
    n = min(weight.n, 2 * sizes.turns * config.rows * 16)
    check_product(config._replace(blocks=2), row["m"], weight._replace(n=n), (n,))


@pytest.mark.parametrize("which", range(len(SMALL)))
def test_attention_lane_by_lane(which, monkeypatch):
    """Half a unit of bfloat16 in the last place of the largest. The weights are rounded too, but
    many of them make a result.
    """
    problem, first, last = SMALL[which]
    given = attention_operands(problem, first, last)
    wanted, *caches = attended(problem, first, last, *given)
    lanes.on_a_cpu(monkeypatch)
    y, *ours = attention.run(*map(jnp.asarray, given), problem=problem)
    close(y, wanted, 2**-8)
    for held, full in zip(ours, caches, strict=True):
        np.testing.assert_array_equal(wide(held), full)


@pytest.mark.parametrize(
    ("which", "guess"),
    [(4, (100, 270)), (4, (-5 % 2**32, 300)), (4, (112, 296)), (5, (16, 2**31 - 1))],
)
def test_attention_guesses_its_positions_and_asks_again(which, guess, monkeypatch):
    """What stands there before the kernel in front is done may be anything."""
    problem, first, last = SMALL[which]
    given = attention_operands(problem, first, last)
    wanted, *_ = attended(problem, first, last, *given)
    lanes.on_a_cpu(monkeypatch).guess = guess
    y, *_ = attention.run(*map(jnp.asarray, given), problem=problem)
    close(y, wanted, 2**-8)


def test_attention_of_scores_far_apart(monkeypatch):
    """Weights are relative to the largest of all tiles: 2 ** of a score alone is infinite."""
    problem, first, last = SMALL[6]
    q, *given = attention_operands(problem, first, last)
    given = (q * BF16(64), *given)
    wanted, *_ = attended(problem, first, last, *given)
    lanes.on_a_cpu(monkeypatch)
    y, *_ = attention.run(*map(jnp.asarray, given), problem=problem)
    close(y, wanted, 2**-7)


@pytest.mark.parametrize(
    ("batch", "blocks"), [(1, 8), (14, 8), (15, 4), (29, 4), (30, 2), (64, 2), (500, 2)]
)
def test_more_rows_and_key_heads_have_fewer_blocks_each(batch, blocks):
    problem = SMALL[6][0]._replace(batch=batch, kv_heads=1)
    assert attention.cluster_of(problem) == blocks
