"""fake_quant: the value of the quantized model, the derivative of the model at its weights."""

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
    "bias": jnp.zeros(8),
}
X = jax.random.normal(KEYS[2], (16, 32))
SPECS = ["int4_g16", "uint4_g16", "int8/int8_token"]
SPECS += [pytest.param(s, marks=pytest.mark.slow) for s in ("int8", "nf4_g16", "fp8_e4m3", "mxfp4")]


def model(p, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None))
    x, _ = jax.lax.scan(body, x, p["layers"])
    return jax.jit(jnp.matmul)(x, p["head"]) + p["bias"][None]


def loss(p, x):
    return jnp.mean(model(p, x) ** 2)


@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_those_of_the_converted_model_to_the_bit(spec):
    qat = training.fake_quant(model, spec)
    q = qat.convert(PARAMS, X)
    assert q["head"].format == spec.split("/")[0].split("_g")[0]
    np.testing.assert_array_equal(jax.jit(qat)(PARAMS, X), jax.jit(qjax.quantized(model))(q, X))


@pytest.mark.parametrize("spec", ["int4_g16", "nf4_g16", "mxfp4"])
def test_gradients_are_those_at_the_rounded_weights(spec):
    qat = training.fake_quant(loss, spec)
    got = jax.jit(jax.grad(qat, (0, 1)))(PARAMS, X)
    wanted = jax.grad(loss, (0, 1))(dense(qat.convert(PARAMS, X)), X)
    assert relative_error(got, wanted) < 1e-4
    kinds = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype.name), tree)
    assert kinds(got[0]) == kinds(PARAMS)


def test_forward_mode():
    """Where the nearest peer raises: its fake quantization is a custom_vjp."""
    qat = training.fake_quant(loss, "int4_g16")
    direction = jax.tree.map(jnp.ones_like, PARAMS)
    _, tangent = jax.jvp(lambda p: qat(p, X), (PARAMS,), (direction,))
    grads = jax.grad(qat)(PARAMS, X)
    wanted = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
    assert float(tangent) == pytest.approx(float(wanted), rel=1e-4)


def test_quantization_stays_where_it_was_asked_for():
    """A helper that was traced before, or is traced after, is neither missed nor poisoned."""
    helper = jax.jit(lambda x, w: x @ w)
    fn = lambda p, x: helper(x, p["w"])
    params = {"w": PARAMS["head"]}
    before = fn(params, X)
    got = training.fake_quant(fn, "int4_g16")(params, X)
    assert relative_error(got, before) > 1e-3
    np.testing.assert_array_equal(fn(params, X), before)


def test_training_recovers_what_rounding_costs():
    target = model(PARAMS, X)
    error = lambda p, x: jnp.mean((model(p, x) - target) ** 2)
    qat = training.fake_quant(error, "int2_g16")
    step = jax.jit(jax.value_and_grad(qat))
    tx = optax.sgd(0.5)
    params, moments = PARAMS, tx.init(PARAMS)
    first, _ = step(params, X)
    for _ in range(60):
        _, grads = step(params, X)
        updates, moments = tx.update(grads, moments)
        params = optax.apply_updates(params, updates)
    last, _ = step(params, X)
    assert float(last) < 0.6 * float(first)
    q = qat.convert(params, X)
    assert float(qjax.quantized(error)(q, X)) == pytest.approx(float(last), rel=1e-5)
