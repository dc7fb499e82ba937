"""A norm in front of a product, a gate behind it: the kernel's own code on a CPU, and the op.

`lanes.on_a_cpu` carries the kernel out; truth is float64 on the same operands.
"""

import functools

import jax
import jax.numpy as jnp
import lanes
import numpy as np
import pytest
from hopper_operands import ACTIVATIONS, BF16, close, packed, wide

from pallas_kernels import hopper
from pallas_kernels.definition import instead
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.norm_matmul import mosaic_gpu, problems, reference
from pallas_kernels.norm_matmul.op import norm_matmul
from pallas_kernels.norm_matmul.problem import Problem
from pallas_kernels.quantized_matmul import mosaic_gpu as products
from pallas_kernels.quantized_matmul.problem import Weight

HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3")


def operands(problem, scale_dtype, seed=0):
    """x, y, scale, [arrays], and the float64 weights."""
    rng, k = np.random.default_rng(seed), problem.weights[0].k
    x, y = (rng.normal(size=(problem.rows, k)).astype(BF16) for _ in "xy")
    scale = rng.uniform(0.5, 2, k).astype(scale_dtype)
    pairs = [packed(w, problem.layout, i) for i, w in enumerate(problem.weights)]
    arrays, dense = zip(*pairs, strict=True)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(scale), list(arrays), dense


def truth(problem, x, y, scale, dense, rounded):
    """The sum in x's dtype, and the results; `rounded`: s * scale as the kernel has it."""
    total = (np.asarray(x).astype(np.float32) + np.asarray(y).astype(np.float32)).astype(x.dtype)
    s = wide(total)
    root = 1 / np.sqrt((s * s).mean(-1, keepdims=True) + problem.epsilon)
    scaled = s * wide(scale)
    scaled = wide(scaled.astype(np.float32).astype(BF16)) if rounded else scaled
    results = [root * (scaled @ w) for w in dense]
    if problem.gate is not None:
        results = [ACTIVATIONS[problem.gate](results[0]) * results[1]]
    return total, results


# Of each small problem: the scale's dtype, and how it is cut; None: as is guessed, in one turn.
CUTS = (
    (BF16, (1, 1, 1, 2, 3, 2)),  # three turns, a ring that is used again
    (np.float32, None),
    (np.float32, (2, 4, 1, 1, 1, 1)),  # the scale after the ring; warps without any k
    (BF16, None),
    (BF16, (2, 2, 1, 4, 4, 1)),
    (np.float16, None),
    (BF16, None),
    (np.float32, (2, 4, 1, 2, 2, 1)),  # no registers for both x and y
)


@pytest.mark.parametrize("which", range(len(problems.SMALL)))
def test_the_kernel_lane_by_lane(which, monkeypatch):
    """Sums of float32 whose terms are exact: k roundings of 6e-8, and what `rsqrt` has, 2e-7."""
    problem, (scale_dtype, cut) = problems.SMALL[which]._replace(out="float32"), CUTS[which]
    x, y, scale, arrays, dense = operands(problem, scale_dtype)
    monkeypatch.setattr(products, "launch", products.launch.__wrapped__)
    if cut:
        monkeypatch.setattr(products, "choose_config", lambda *_, **__: products.Config(*cut))
    lanes.on_a_cpu(monkeypatch)
    ours, results = mosaic_gpu.run(x, y, scale, *problem.leaves(arrays), problem=problem)
    total, wanted = truth(problem, x, y, scale, dense, rounded=True)
    np.testing.assert_array_equal(np.asarray(ours), total)
    assert len(results) == len(wanted)
    for a, b in zip(results, wanted, strict=True):
        close(a, b, 2e-6)


def test_a_product_with_no_norm_has_a_gate_too(monkeypatch):
    """`out` bfloat16: half a unit in the last place of the largest."""
    problem = problems.SMALL[1]
    x, _, _, arrays, (gate, up) = operands(problem, BF16)
    whole = mosaic_gpu.whole(problem)._replace(norm=None)
    lanes.on_a_cpu(monkeypatch)
    config = products.Config(1, 1, 1, 2, 1, 3)
    (ours,) = products.launch.__wrapped__(whole, config, (72, 72), x, arrays)
    close(ours, ACTIVATIONS["silu"](wide(x) @ gate) * (wide(x) @ up), 2**-8)


@pytest.mark.parametrize("which", [0, 3])
def test_the_definition(which):
    problem = problems.SMALL[which]._replace(x="float32", out="float32")
    x, y, scale, arrays, dense = operands(problem, np.float32)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    how = {"gate": problem.gate, "device": Device("cpu", "cpu")}
    run = lambda x, y, scale, arrays: norm_matmul(
        x, y, scale, problem.epsilon, arrays, problem.weights, problem.layout, **how
    )
    ours, results = jax.jit(run)(x, y, scale, arrays)
    total, wanted = truth(problem, x, y, scale, dense, rounded=False)
    np.testing.assert_array_equal(np.asarray(ours), total)
    for a, b in zip(results, wanted, strict=True):
        close(a, b, 2e-5)  # a float32 dot of XLA


def test_a_kernel_has_the_derivatives_of_the_definition_and_loops_under_vmap():
    problem = problems.SMALL[1]._replace(x="float32", out="float32")
    x, y, scale, arrays, _ = operands(problem, np.float32)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    leaves = problem.leaves(arrays)
    loss = lambda f: lambda *v: (lambda total, ys: total.sum() + (ys[0] ** 2).sum())(*f(*v))
    direct = functools.partial(reference.run, problem=problem)
    kernel = lambda *v: instead(reference.run, reference.run, problem, v)
    ours, wanted = (
        jax.jit(jax.grad(loss(f), argnums=(0, 1, 2)))(x, y, scale, *leaves)
        for f in (kernel, direct)
    )
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    stacked = jnp.stack([x, 2 * x])
    mapped = jax.jit(jax.vmap(lambda x: kernel(x, y, scale, *leaves)))(stacked)
    for a, b in zip(
        jax.tree.leaves(mapped), jax.tree.leaves(direct(2 * x, y, scale, *leaves)), strict=True
    ):
        np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-6)


def test_what_hopper_takes_and_refuses(monkeypatch):
    weight = Weight(4096, 1024, 128, "int4", "bfloat16")
    problem = Problem(1, 1e-5, (weight,) * 2, "hopper4")
    assert choose("norm_matmul", problem, Device("cpu", "cpu")) == "reference"
    if hopper.missing_alone(HOPPER) is not None:
        assert choose("norm_matmul", problem, HOPPER) == "reference"
    for name in ("missing", "missing_alone"):
        monkeypatch.setattr(hopper, name, lambda device: None)
    assert choose("norm_matmul", problem, HOPPER) == "mosaic_gpu"
    assert choose("norm_matmul", problem._replace(gate="silu", rows=16), HOPPER) == "mosaic_gpu"
    refused = {
        "17 rows": problem._replace(rows=17),
        "x is float32": problem._replace(x="float32"),
        "layout nibbles": problem._replace(layout="nibbles"),
        "no multiple of 8": problem._replace(weights=(weight._replace(k=4092),)),
        "more than their channels": problem._replace(weights=(weight, weight._replace(group=64))),
        "40 channels do not fill": problem._replace(weights=(weight, weight._replace(n=40))),
        "no block of the chip takes all of k = 16384": problem._replace(
            weights=(weight._replace(k=16384),)
        ),
    }
    for reason, case in refused.items():
        assert reason in str(IMPLEMENTATIONS["norm_matmul"]["mosaic_gpu"].supports(case, HOPPER))


@pytest.mark.parametrize("kind", [HOPPER.kind, "NVIDIA H200"])
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("weight", [Weight(4096, 28672, 128, "int4", "bfloat16")])
def test_a_config_has_a_block_for_all_of_k_and_both_halves_of_a_gate(kind, m, weight):
    config = products.choose_config(m, weight, kind, norm=True, gate=True)
    assert config is not None
    assert config.cluster == 1
    assert config.rows % 2 == 0
    sized = products.plan(m, weight, config, norm=True, gate=True)
    squares = 4 * config.warpgroups * 8 * products.columns(m) * 4
    assert sized.shared - products.plan(m, weight, config).shared == squares
    for other, reason in (
        (config._replace(cluster=2), "cluster"),
        (config._replace(rows=1), "gate"),
    ):
        assert reason in str(products.plan(m, weight, other, norm=True, gate=True))


def test_wrong_operands_are_named():
    problem = problems.SMALL[2]
    x, y, scale, arrays, _ = operands(problem, np.float32)
    rest = (1e-5, arrays, problem.weights, problem.layout)
    with pytest.raises(
        ValueError, match=r"norm_matmul: x and y .*\[8, 1032\].*and float32\[1031\]"
    ):
        norm_matmul(x, y, scale[1:], *rest)
    with pytest.raises(ValueError, match="gate 'relu' is none of silu, gelu_tanh"):
        norm_matmul(x, y, scale, *rest, gate="relu")
    with pytest.raises(ValueError, match=r"two weights of equal n for a gate, not n of \[40\]"):
        norm_matmul(x, y, scale, *rest, gate="silu")
    held = [arrays[0] | {"bias": scale}]
    with pytest.raises(ValueError, match="takes no bias"):
        norm_matmul(x, y, scale, 1e-5, held, problem.weights, problem.layout)
    with pytest.raises(ValueError, match=r"norm_matmul: mosaic_gpu cannot run .* on cpu"):
        norm_matmul(x, y, scale, *rest, implementation="mosaic_gpu", device=Device("cpu", "cpu"))
