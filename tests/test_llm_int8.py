"""LLM.int8(): the decomposition in float64, its budget, and what happens beyond it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.io import manifest
from qjax.spec import Spec

SPEC = Spec.parse("int8/int8_token")


def problem(outliers, size=96, out=24, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-5, 5, (tokens, size)).astype(np.float32)
    at = rng.choice(size, outliers, replace=False)
    x[rng.integers(tokens, size=outliers), at] = rng.choice([-40, 70], outliers)
    return x, rng.normal(size=(size, out)).astype(np.float32)


def quantized(x, w, threshold=6.0):
    algorithm = qjax.llm_int8(threshold)
    stats = qjax.Stats(max_abs=jnp.abs(jnp.asarray(x)).max(0))
    return algorithm.finish(*algorithm.quantize(jnp.asarray(w), SPEC, stats))


def wanted(x, q):
    """Section 3.2 of the paper, in float64."""
    x, w = x.astype(np.float64), np.asarray(qjax.dequantize(q), np.float64)
    outlier = np.any(np.abs(x) >= 6, axis=0)
    inside = np.where(outlier, 0, x)
    scale = np.abs(inside).max(1, keepdims=True) / 127
    return np.round(inside / scale) * scale @ w + x[:, outlier] @ w[outlier]


run = jax.jit(qjax.quantized(lambda w, x: x @ w))


@pytest.mark.parametrize("outliers", [0, 3, 8, 9, 40])
def test_within_and_beyond_the_budget(outliers):
    few, w = problem(3)
    q = quantized(few, w)
    assert (q.activation.threshold, q.activation.budget) == (6.0, 8)
    x, _ = problem(outliers, seed=1)
    np.testing.assert_allclose(run(q, x), wanted(x, q), rtol=1e-4, atol=1e-3)
    (use,) = qjax.explain(lambda w, x: x @ w, q, x).uses
    assert use.how == "int8_token dot, scales after, outliers from 6 apart, 8 at once"


def test_outliers_apart_are_far_more_exact_than_plain_w8a8():
    x, w = problem(5)
    plain = qjax.quantize(w, SPEC, 0)
    off = lambda q: np.abs(np.asarray(run(q, x)) - x @ np.asarray(qjax.dequantize(q))).max()
    assert off(quantized(x, w)) < 0.2 * off(plain)


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: jnp.einsum("ko,btk->bto", w, x.reshape(2, 3, -1)),
        lambda w, x: jnp.dot(w.T, x.T),
        lambda w, x: jax.vmap(lambda row: row @ w)(x),
    ],
)
def test_every_way_to_write_the_matmul(fn):
    x, w = problem(4)
    q = quantized(x, w)
    got = qjax.quantized(fn)(q, x)
    everything = dataclasses.replace(q.activation, budget=None)
    same = qjax.quantized(fn)(dataclasses.replace(q, activation=everything), x)
    np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-4)


def test_budget_covers_the_layer_that_needs_most_and_survives_scan_and_files():
    (x, w), (_, w2) = problem(12), problem(2, seed=3)
    algorithm, weights = qjax.llm_int8(), jnp.stack([jnp.asarray(w), jnp.asarray(w2)])
    seen = jnp.stack([jnp.abs(jnp.asarray(x)).max(0), jnp.ones(96)])
    one = lambda w, m: algorithm.quantize(w, SPEC, qjax.Stats(max_abs=m))
    q, notes = jax.jit(jax.vmap(one))(weights, seen)
    assert notes["outliers"].tolist() == [12, 0]
    q = algorithm.finish(q, notes)
    assert q.activation.budget == 24

    def layers(w, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), jnp.zeros(()), w)[1]

    y = jax.jit(qjax.quantized(layers))(q, x)
    np.testing.assert_allclose(y[0], wanted(x, quantized(x, w)), rtol=1e-4, atol=1e-3)
    described = manifest.describe({"w": q})
    restored = manifest.restore(described.entries, described.arrays, "a folder")["w"]
    assert restored.activation.budget == 24


def test_gradients_are_straight_through():
    x, w = problem(4)
    q = quantized(x, w)
    gradient = jax.grad(lambda x: jnp.sum(run(q, x)))(jnp.asarray(x))
    expected = np.broadcast_to(np.asarray(qjax.dequantize(q)).sum(1), x.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"threshold must be positive, got 0"):
        qjax.llm_int8(0)
    stats = qjax.Stats(max_abs=jnp.ones(4))
    with pytest.raises(ValueError, match=r"llm_int8: int8 does not quantize .* int8/int8_token"):
        qjax.llm_int8().quantize(jnp.ones((4, 2)), Spec.parse("int8"), stats)
    with pytest.raises(ValueError, match=r"llm_int8 needs the max_abs"):
        qjax.llm_int8().quantize(jnp.ones((4, 2)), SPEC, qjax.Stats())
    x, w = problem(4)
    q = quantized(x, w)
    bad = dataclasses.replace(q, activation=dataclasses.replace(q.activation, budget=0))
    with pytest.raises(ValueError, match=r"budget must be a positive int beside a threshold"):
        run(bad, x)
