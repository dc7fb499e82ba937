"""Learned scales and clips beside the formulas of their papers, in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense, relative_error

import qjax
from qjax import training

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "layers": jax.random.normal(KEYS[0], (2, 32, 32)) / 5,
    "head": jax.random.normal(KEYS[1], (32, 8)) / 5,
}
X = jax.random.normal(KEYS[2], (16, 32))


def model(p, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
    return x @ p["head"]


def loss(p, x):
    return jnp.mean(model(p, x) ** 2)


def matmul(p, x):
    return x @ p["w"]


def test_lsq_gradients_are_those_of_the_paper():
    """Esser et al. 2020, equations 1 to 3 and section 2.2."""
    qat = training.fake_quant(matmul, "int4_g16")
    w = np.float32(np.random.default_rng(0).normal(size=(32, 3)))
    params = qat.learn({"w": w}, X, begin="lsq")
    leaf = params["w"]
    mean = np.abs(w).reshape(2, 16, 3).mean(1)
    np.testing.assert_allclose(leaf.scale, 2 * mean / np.sqrt(7), rtol=1e-6)
    exact = (leaf.scale / 3).astype(jnp.bfloat16).astype(jnp.float32)  # as the spec holds them
    leaf = dataclasses.replace(leaf, scale=exact)
    params = {"w": leaf}
    g = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    _, back = jax.vjp(lambda p: qat(p, X), params)
    (grads,) = back(g)
    to_w = np.float64(X).T @ g  # d loss / d quantized weight
    s = np.repeat(np.float64(leaf.scale), 16, axis=0)
    x = w / s
    assert (x > 7).any()
    assert (x < -8).any()
    inside = (x > -8) & (x < 7)
    slope = np.where(inside, np.round(x) - x, np.clip(x, -8, 7))
    np.testing.assert_allclose(grads["w"].value, to_w * inside, atol=1e-4)
    wanted = (to_w * slope).reshape(2, 16, 3).sum(1) / np.sqrt(16 * 7)
    np.testing.assert_allclose(grads["w"].scale, wanted, atol=1e-4)


def test_pact_gradients_are_those_of_the_paper():
    """Choi et al. 2018, equation 3: 1 to x inside, 1 to the clip where x lies beyond."""
    qat = training.fake_quant(matmul, "int8/int8_token")
    w = np.float32(np.random.default_rng(2).normal(size=(32, 3)))
    params = qat.learn({"w": w}, X, clip=1.5)
    g = np.random.default_rng(3).normal(size=(16, 3)).astype(np.float32)
    y, back = jax.vjp(qat, params, X)
    grads, dx = back(g)
    q = qat.convert(params, X)
    step = 1.5 / 127
    np.testing.assert_allclose(q["w"].activation.scale, step, rtol=1e-6)
    x, wq = np.float64(X), np.float64(qjax.dequantize(q["w"]))
    np.testing.assert_allclose(
        y, np.clip(np.round(x / step), -128, 127) * step @ wq, atol=step * 16
    )
    to_x = g @ wq.T
    inside = np.abs(x) < 1.5
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(dx, to_x * inside, atol=1e-4)
    wanted = np.sum(to_x * np.sign(x) * ~inside)
    np.testing.assert_allclose(grads["w"].clip, wanted, rtol=1e-4)


@pytest.mark.parametrize(("spec", "clip"), [("int4_g16", None), ("int8/int8_token", 2.0)])
def test_convert_gives_what_was_simulated_to_the_bit(spec, clip):
    """Through a scan over layers; scales and clips have one entry per layer there."""
    qat = training.fake_quant(model, spec)
    params = qat.learn(PARAMS, X, clip=clip)
    if clip is not None:
        assert params["layers"].clip.shape == (2,)
    q = qat.convert(params, X)
    if clip is None:  # it begins as the model without learned scales
        np.testing.assert_array_equal(dense(q)["head"], dense(qat.convert(PARAMS, X))["head"])
    np.testing.assert_array_equal(jax.jit(qat)(params, X), jax.jit(qjax.quantized(model))(q, X))
    trained = training.fake_quant(loss, spec)
    grads = jax.jit(jax.grad(trained))(params, X)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert [v.shape for v in jax.tree.leaves(grads)] == [v.shape for v in jax.tree.leaves(params)]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["layers"]))
    _, tangent = jax.jvp(lambda p: trained(p, X), (params,), (params,))  # forward mode
    wanted = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, params)), strict=True)
    )
    assert float(tangent) == pytest.approx(float(wanted), rel=1e-3)


def test_learned_scales_beat_those_of_the_spec():
    target = model(PARAMS, X)
    error = lambda p, x: jnp.mean((model(p, x) - target) ** 2)
    qat = training.fake_quant(error, "int2_g16")
    tx = optax.adam(3e-3)

    def trained(p):
        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(qat)(p, X)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(p, updates), state), value

        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(lambda c: jax.lax.scan(step, c, length=150)[1])((p, tx.init(p)))[-1]

    assert trained(qat.learn(PARAMS, X)) < trained(PARAMS)


def test_bad_input():
    qat = training.fake_quant(matmul, "nf4_g16")
    with pytest.raises(ValueError, match=r"w: nf4_g16 cannot learn its scales.*int4_g128 can"):
        qat.learn({"w": jnp.ones((32, 3))}, X)
    qat = training.fake_quant(matmul, "int4_g16")
    with pytest.raises(ValueError, match=r"w: a clip of 2.0 was given.*int8_token"):
        qat.learn({"w": jnp.ones((32, 3))}, X, clip=2.0)
    with pytest.raises(ValueError, match=r"begin='x' is unknown"):
        qat.learn({"w": jnp.ones((32, 3))}, X, begin="x")
    with pytest.raises(ValueError, match=r"only='v' matches no parameter"):
        qat.learn({"w": jnp.ones((32, 3))}, X, only="v")
    kept = qat.learn({"w": jnp.ones((32, 3)), "b": jnp.ones(3)}, X)
    assert relative_error(kept["b"], np.ones(3)) == 0
