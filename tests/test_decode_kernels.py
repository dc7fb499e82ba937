"""What stands between the matmuls of a decode step: definitions, refusals, and their use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs_mosaic
from hopper_operands import ACTIVATIONS, BF16, wide
from tiny_models import CONFIGS, make, some_tokens

import qjax
from pallas_kernels import chained, hopper
from pallas_kernels.add_norm import mosaic_gpu as norm_kernel
from pallas_kernels.add_norm import problems as norms
from pallas_kernels.add_norm.op import add_norm
from pallas_kernels.decode_attention import problems
from pallas_kernels.decode_attention.op import decode_attention
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.gated import mosaic_gpu as gated_kernel
from pallas_kernels.gated import problems as gates
from pallas_kernels.gated.op import gated
from qjax import prepared_products
from qjax.models import fused, init_cache

HOPPER = Device("gpu", "NVIDIA H100 80GB HBM3")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(ours, truth):
    """Of float32 sums: 16 units in the last place of the largest."""
    np.testing.assert_allclose(ours, truth, rtol=0, atol=2e-6 * np.abs(truth).max())


def test_add_norm_is_the_sum_and_its_norm():
    x, y, scale = normal(0, 3, 40), normal(1, 3, 40), normal(2, 40)
    total, normed = add_norm(jnp.asarray(x), jnp.asarray(y), jnp.asarray(scale), 1e-5)
    s = x.astype(np.float64) + y
    close(total, s)
    close(normed, s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-5) * scale)


def test_gated_is_silu_times_up():
    gate, up = normal(0, 3, 40), normal(1, 3, 40)
    ours = gated(jnp.asarray(gate), jnp.asarray(up), "silu")
    wide = gate.astype(np.float64)
    close(ours, wide / (1 + np.exp(-wide)) * up)


@pytest.fixture
def interpreted(monkeypatch):
    """`f(kernel, *operands)`, in JAX's interpreter, which knows of no kernel before this one."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(chained, "follow", lambda: None)

    def run(kernel, *operands):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            return jax.tree.map(wide, kernel(*map(jnp.asarray, operands)))

    return run


def rounded(ours, truth, times):
    """So many times to bfloat16, each by half a unit in the last place; and float32 is off."""
    off = 2**-8 * times * np.abs(truth) + 2e-6 * np.abs(truth).max()
    assert (np.abs(ours - truth) <= off).all()


@needs_mosaic
@pytest.mark.parametrize("problem", norms.PROBLEMS, ids=str)
def test_the_interpreted_norm_of_a_sum(problem, interpreted):
    x, y = (normal(i, problem.rows, problem.width).astype(BF16) for i in range(2))
    scale = normal(2, problem.width).astype(BF16)
    run = functools.partial(norm_kernel.run, problem=problem)
    total, normed = interpreted(run, x, y, scale)
    s = wide((x.astype(np.float32) + y.astype(np.float32)).astype(BF16))
    np.testing.assert_array_equal(total, s)
    root = np.sqrt((s * s).mean(-1, keepdims=True) + problem.epsilon)
    rounded(normed, s / root * wide(scale), times=1)


@needs_mosaic
@pytest.mark.parametrize("problem", gates.PROBLEMS, ids=str)
def test_the_interpreted_gate(problem, interpreted):
    gate, up = (normal(i, problem.rows, problem.width).astype(BF16) for i in range(2))
    ours = interpreted(functools.partial(gated_kernel.run, problem=problem), gate, up)
    rounded(ours, ACTIVATIONS[problem.activation](wide(gate)) * wide(up), times=2)


@pytest.mark.parametrize(("first", "position"), [(0, 0), (0, 6), (3, 9)])
def test_attention_of_a_token_over_its_cache(first, position):
    batch, length, kv_heads, groups, d = 2, 10, 2, 3, 8
    q, k, v = (
        normal(i, batch, n, d) for i, n in enumerate((kv_heads * groups, kv_heads, kv_heads))
    )
    keys, values = (normal(i, batch, length, kv_heads, d) for i in (3, 4))
    angle = normal(5, d // 2).astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)

    def turned(x):
        near, far = x[..., : d // 2].astype(np.float64), x[..., d // 2 :]
        return np.concatenate((near * cos - far * sin, far * cos + near * sin), -1)

    full_k, full_v = keys.astype(np.float64), values.astype(np.float64)
    full_k[:, position], full_v[:, position] = turned(k), v
    seen = slice(first, position + 1)
    wide = turned(q).reshape(batch, kv_heads, groups, d)
    scores = np.einsum("bkgd,btkd->bkgt", wide, full_k[:, seen]) * 0.25
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    truth = np.einsum("bkgt,btkd->bkgd", weights, full_v[:, seen]).reshape(q.shape)
    turn = [jnp.asarray(t, jnp.float32) for t in (cos, sin)]
    arrays = [jnp.asarray(x) for x in (keys, values)]
    y, new_keys, new_values = decode_attention(
        *map(jnp.asarray, (q, k, v)), *turn, first, position, *arrays, 0.25
    )
    close(y, truth)
    close(new_keys, full_k)
    np.testing.assert_array_equal(new_values, full_v)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_decoder_on_these_ops_is_itself(name, monkeypatch):
    """Rotation, window, cache and residual stream reach the ops as the model means them."""
    config, used = CONFIGS[name], []
    model, params = make(config)
    tokens = some_tokens()[:, 5:9]
    step = lambda token, cache: model.apply(params, token, cache=cache)

    def decoded():
        cache, logits, one = init_cache(config, 2, 8), [], jax.jit(step)
        for at in range(tokens.shape[1]):
            new, cache = one(tokens[:, at : at + 1], cache)
            logits.append(new)
        return jnp.concatenate(logits, 1), cache

    plain, plain_cache = decoded()
    monkeypatch.setattr(fused, "_runs", lambda op, problem: used.append(op) or True)
    step = lambda token, cache: model.apply(params, token, cache=cache)
    ours, cache = decoded()
    assert set(used) == {"add_norm", "decode_attention", "gated"}
    for a, b in zip(*map(jax.tree.leaves, ((ours, cache), (plain, plain_cache))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_prepared_weights_of_a_decoder_are_one_launch_with_their_norm_and_gate(monkeypatch):
    """Names and results of the launches, and that a step is what it was without them."""
    config = CONFIGS["llama"]
    model, params = make(config)
    token = some_tokens()[:, 5:6]
    apply = lambda params, cache: model.apply(params, token, cache=cache)[0]
    sites = qjax.find_sites(lambda params: model.apply(params, token), params)
    qparams = qjax.quantize_params(params, "int8", sites)
    fast = qjax.prepare(qparams, sites)
    cache = init_cache(config, 2, 8)
    plain = jax.jit(qjax.quantized(apply))(fast, cache)

    monkeypatch.setattr(fused, "_runs", lambda op, problem: op != "decode_attention")
    monkeypatch.setattr(prepared_products, "choose", lambda op, problem: "kernel")
    monkeypatch.setattr(prepared_products, "joins", lambda problems: None)
    ours = jax.jit(qjax.quantized(apply))(fast, cache)
    # float32 sums in another order
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * float(jnp.abs(plain).max()))
    uses = {
        use.path.removeprefix("params/"): use.how for use in qjax.explain(apply, fast, cache).uses
    }
    behind = "kernel on bytes behind its norm"
    assert uses["layers_1/attention/q/kernel"].startswith(f"{behind}, in one launch with params/")
    assert uses["layers_0/mlp/up/kernel"] == (
        f"{behind} and before its gate, in one launch with params/layers_0/mlp/gate/kernel"
    )
    assert uses["layers_0/attention/q/kernel"].startswith(f"{behind}, in one launch with params/")
    assert uses["layers_0/mlp/down/kernel"] == "kernel on bytes"
    assert uses["head/kernel"] == behind

    # weights without such a launch, and a scale that is quantized itself: the call is entered
    entered = jax.jit(qjax.quantized(apply))(qparams, cache)
    np.testing.assert_allclose(entered, plain, rtol=0, atol=1e-5 * float(jnp.abs(plain).max()))
    odd = jax.tree.map(lambda v: v, fast, is_leaf=qjax.is_qtensor)
    odd["params"]["norm"]["scale"] = qjax.quantize(params["params"]["norm"]["scale"], "int8", 0)
    found = {use.path: use.how for use in qjax.explain(apply, odd, cache).uses}
    assert found["params/head/kernel"] == "kernel on bytes"
    assert found["params/norm/scale"].startswith("dequantized")


def test_what_hopper_takes_and_refuses():
    problem = problems.SMALL[0][0]
    supports = IMPLEMENTATIONS["decode_attention"]["mosaic_gpu"].supports
    if hopper.missing_alone(HOPPER) is None:
        assert supports(problem, HOPPER) is None
        assert "share a key" in str(supports(problem._replace(head_dim=256), HOPPER))
        assert "bfloat16" in str(supports(problem._replace(dtype="float32"), HOPPER))
    else:
        assert supports(problem, HOPPER) == hopper.missing_alone(HOPPER)
    assert choose("decode_attention", problem, Device("cpu", "cpu")) == "reference"
    with pytest.raises(ValueError, match="mosaic_gpu cannot run"):
        choose("gated", fused.Gated(1, 128, "silu"), Device("cpu", "cpu"), "mosaic_gpu")


def test_wrong_shapes_are_named():
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match=r"add_norm: .*\[2, 8\].*\[2, 8\] and \[7\]"):
        add_norm(x, x, jnp.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"gated: .*'tanh'"):
        gated(x, x, "tanh")
    q, kv, cache = jnp.zeros((2, 3, 8)), jnp.zeros((2, 2, 8)), jnp.zeros((2, 4, 2, 8))
    with pytest.raises(ValueError, match=r"decode_attention: a cache \[2, 4, 2, 8\] .*\[2, 3, 8\]"):
        decode_attention(q, kv, kv, x[0, :4], x[0, :4], 0, 1, cache, cache, 1.0)
