"""AWQ and SmoothQuant: their own objectives in float64, and what they leave of the function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_reference import output_error
from helpers import slow

import qjax
from qjax.spec import Spec


def problem(size=64, out=24, tokens=256, seed=0):
    """A weight and an input with a few loud features, and the Stats of the input."""
    rng = np.random.default_rng(seed)
    loud = np.exp(rng.normal(size=size)) * np.where(rng.random(size) < 0.05, 30, 1)
    x = ((rng.normal(size=(tokens, size)) + rng.normal(size=(tokens, 1)) / 2) * loud).astype("f4")
    w = rng.normal(size=(size, out)).astype(np.float32)
    stats = qjax.Stats(
        hessian=jnp.asarray(x.T @ x),
        mean_abs=jnp.asarray(np.abs(x).mean(0)),
        max_abs=jnp.asarray(np.abs(x).max(0)),
    )
    return x, w, stats


def error(x, w, q):
    return output_error(w, qjax.dequantize(q), x.T.astype(np.float64) @ x)


@pytest.mark.parametrize("spec", ["int4", slow("int3_g16"), "uint4_g24", "nf4_g32", "int4_32x8"])
def test_awq_is_never_worse_than_rtn_and_mostly_far_better(spec):
    x, w, stats = problem()
    q, notes = qjax.awq().quantize(jnp.asarray(w), Spec.parse(spec), stats)
    rtn = error(x, w, qjax.quantize(w, spec, 0))
    assert error(x, w, q) < 0.7 * rtn
    whole = output_error(w, np.zeros_like(w), x.T @ x)
    assert notes["rtn_error"] == pytest.approx(rtn / whole, rel=1e-3)
    assert notes["error"] == pytest.approx(error(x, w, q) / whole, rel=1e-3)


def test_awq_falls_back_to_rtn_where_no_scale_helps():
    w = np.array([[7.0, -3.0], [2.0, 7.0]], np.float32)  # on the grid as it stands
    stats = qjax.Stats(hessian=jnp.eye(2) * jnp.array([[1.0, 9.0]]), mean_abs=jnp.array([1.0, 3.0]))
    q, notes = qjax.awq().quantize(jnp.asarray(w), Spec.parse("int4"), stats)
    np.testing.assert_array_equal(q.activation.input_scale, [1.0, 1.0])
    np.testing.assert_array_equal(qjax.dequantize(q), w)
    assert notes["error"] == notes["rtn_error"] == 0


def test_heads_that_share_a_value_head_share_scales():
    x, w, stats = problem()
    find = lambda **how: qjax.awq(**how).quantize(jnp.asarray(w), Spec.parse("int4_g16"), stats)[0]
    q = find(shared=(4, 8))  # 8 heads of 8 features, two value heads
    scale = np.asarray(q.activation.input_scale).reshape(2, 4, 8)
    np.testing.assert_array_equal(scale, np.broadcast_to(scale[:, :1], scale.shape))
    assert len(np.unique(scale)) > 8
    assert error(x, w, find()) < error(x, w, q) < error(x, w, qjax.quantize(w, "int4_g16", 0))


def test_the_clip_search_and_gptq_each_take_a_share():
    x, w, stats = problem()
    found = {}
    for name, algorithm in {
        "scale": qjax.awq(clip=False),
        "clip": qjax.awq(),
        "gptq": qjax.gptq(),
        "both": qjax.awq(solver=qjax.gptq),
    }.items():
        q, _ = algorithm.quantize(jnp.asarray(w), Spec.parse("int3_g16"), stats)
        found[name] = error(x, w, q)
    assert found["clip"] < found["scale"]
    assert found["both"] < min(found["clip"], found["gptq"])


def test_awq_of_stacked_weights_and_of_features_never_seen():
    problems = [problem(seed=s) for s in range(2)]
    w = jnp.stack([jnp.asarray(w) for _, w, _ in problems])
    stats = jax.tree.map(lambda *v: jnp.stack(v), *(s for _, _, s in problems))
    stats = dataclasses.replace(
        stats,
        hessian=stats.hessian.at[1, 5].set(0).at[1, :, 5].set(0),
        mean_abs=stats.mean_abs.at[1, 5].set(0),
    )
    run = lambda w, stats: qjax.awq().quantize(w, Spec.parse("int4_g16"), stats)
    q, _ = jax.jit(jax.vmap(run))(w, stats)
    q.check()
    assert q.activation.input_scale.shape == (2, 64)
    assert q.activation.input_scale[1, 5] == 1
    alone, _ = run(w[0], problems[0][2])
    np.testing.assert_allclose(qjax.dequantize(q)[0], qjax.dequantize(alone), atol=1e-5)


def test_smoothquant_scales_are_equation_4():
    x, w, stats = problem()
    spec = Spec.parse("int8/int8_token")
    q, _ = qjax.smoothquant(alpha=0.7).quantize(jnp.asarray(w), spec, stats)
    wanted = np.abs(x).max(0) ** 0.7 / np.abs(w).max(1) ** 0.3
    np.testing.assert_allclose(q.activation.input_scale, wanted, rtol=1e-5)
    held = qjax.dequantize(dataclasses.replace(q, activation=None))
    assert np.all(np.abs(held - wanted[:, None] * w) <= 0.51 * np.asarray(q.scale))


@pytest.mark.parametrize("static", [False, True])
def test_smoothquant_beats_plain_w8a8_where_few_features_are_loud(static):
    x, w, stats = problem()
    spec = Spec.parse("int8/int8_token")
    plain = qjax.quantize(w, spec, 0)
    if static:
        top = jnp.max(stats.max_abs) / 127
        act = qjax.qtensor.Activation(spec=spec.activation._replace(block=()), scale=top)
        plain = dataclasses.replace(plain, activation=act)
    q, _ = qjax.smoothquant(static=static).quantize(jnp.asarray(w), spec, stats)
    run = jax.jit(qjax.quantized(lambda w, x: x @ w))
    off = lambda q: float(np.sum((np.asarray(run(q, x)) - x @ w) ** 2))
    assert off(q) < 0.5 * off(plain)
    if static:  # nothing of the calibration input saturates
        scaled = np.abs(x / np.asarray(q.activation.input_scale)).max() / 127
        assert q.activation.scale == pytest.approx(scaled, rel=1e-5)
    (use,) = qjax.explain(lambda w, x: x @ w, q, x).uses
    assert f"int8_{'static' if static else 'token'} dot, scales after" in use.how


def test_wrong_arguments():
    w, spec, stats = jnp.ones((4, 2)), Spec.parse("int8"), qjax.Stats()
    with pytest.raises(ValueError, match=r"alpha must lie between 0 and 1, got 2"):
        qjax.smoothquant(alpha=2)
    with pytest.raises(ValueError, match=r"smoothquant: int8 does not .* write int8/int8_token"):
        qjax.smoothquant().quantize(w, spec, stats)
    with pytest.raises(ValueError, match=r"smoothquant needs the max_abs"):
        qjax.smoothquant().quantize(w, Spec.parse("int8/int8_token"), stats)
    with pytest.raises(ValueError, match=r"grid must be at least 1, got 0"):
        qjax.awq(grid=0)
    with pytest.raises(ValueError, match=r"shared must be two counts, .* got \(0, 2\)"):
        qjax.awq(shared=(0, 2))
    with pytest.raises(ValueError, match=r"awq needs the hessian"):
        qjax.awq().quantize(w, spec, stats)
    known = qjax.Stats(hessian=jnp.eye(4), mean_abs=jnp.ones(4))
    with pytest.raises(ValueError, match=r"4 features are no heads that share \(3, 2\)"):
        qjax.awq(shared=(3, 2)).quantize(w, spec, known)
