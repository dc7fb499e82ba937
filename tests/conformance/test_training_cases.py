"""Training where peers were seen to fail: qwix's QAT (cases 1 to 3 and 26 of docs/peers.md), flax's
fp8_ops under optax and accumulation, TransformerEngine under vmap.

Each asserts the right numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import dense, relative_error

import qjax
from qjax import training

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = jax.random.normal(jax.random.key(2), (8, 64))
PARAMS = {n: jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i, n in enumerate("ab")}
TARGET = jax.random.normal(jax.random.key(3), (8, 64))


def model_of(matmul):
    return lambda p, x: matmul(jnp.tanh(matmul(x, p["a"])), p["b"])


def loss(p, x):
    return jnp.mean((model_of(jnp.matmul)(p, x) - TARGET[: len(x)]) ** 2)


@pytest.mark.parametrize("matmul", [jnp.matmul, jax.jit(lambda x, w: x @ w)])
def test_01_to_03_what_was_traced_before_or_after_qat_does_not_matter(matmul):
    """jnp.matmul is jitted, and so is a helper that two models share."""
    fn = model_of(matmul)
    exact = np.float64(jnp.tanh(X @ PARAMS["a"])) @ np.float64(PARAMS["b"])
    qat = training.fake_quant(fn, "int4_g32")
    rounded = fn(dense(qat.convert(PARAMS, X)), X)
    for order in ("float first", "QAT first", "float after"):  # each finds the other's traces
        for jit in (jax.jit, lambda f: f):
            if order == "QAT first":
                assert relative_error(jit(qat)(PARAMS, X), rounded) < 1e-5
            else:
                assert relative_error(jit(fn)(PARAMS, X), exact) < 1e-5
    assert relative_error(rounded, exact) > 1e-2


def test_26_forward_mode_through_qat():
    """Hessian-vector products too; a custom_vjp raises."""
    qat = training.fake_quant(loss, "int4_g32")
    _, tangent = jax.jvp(lambda p: qat(p, X), (PARAMS,), (PARAMS,))
    grads = jax.grad(qat)(PARAMS, X)
    wanted = sum(jnp.vdot(grads[n], PARAMS[n]) for n in PARAMS)
    assert float(tangent) == pytest.approx(float(wanted), rel=1e-4)
    _, product = jax.jvp(lambda p: jax.grad(qat)(p, X), (PARAMS,), (PARAMS,))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(product))


def test_sgd_over_all_variables_leaves_the_amax_alone():
    """flax hands new scales out as gradients: three SGD steps made an amax of -0.91 of one."""
    low = training.fp8(loss, "delayed")
    params, state, tx = PARAMS, low.init(PARAMS, X), optax.sgd(0.1)
    step, seen = jax.jit(low.value_and_grad), []
    for _ in range(3):
        seen.append(float(jnp.max(jnp.abs(params["a"]))))
        _, grads, state = step(params, state, X)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        updates, _ = tx.update(grads, tx.init(params))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.history["a"]["w"][:3], seen[::-1], rtol=1e-6)
    np.testing.assert_allclose(state.history["a"]["x"][:3], np.abs(X).max(), rtol=1e-6)


def test_accumulated_microbatches_keep_the_largest_amax():
    """flax's average over microbatches gave 2.73 where the largest was 3.04."""
    low = training.fp8(loss, "delayed")
    state = low.init(PARAMS, X)
    x = X * jnp.arange(1.0, 9)[:, None]
    seen = [jax.jit(low.grads)(PARAMS, state, part)[2] for part in (x[:4], x[4:])]
    after = low.update(state, low.merge(*seen))
    assert float(after.history["a"]["x"][0]) == pytest.approx(np.abs(x).max(), rel=1e-6)
    assert float(after.history["a"]["x"][1]) == 0


@pytest.mark.parametrize("recipe", ["current", "rowwise"])
def test_vmap_over_weights(recipe):
    """TransformerEngine's GEMMs have no batching rule: an ensemble of models raises there."""
    low = training.fp8(loss, recipe)
    state = low.init(PARAMS, X)
    both = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), PARAMS)
    values, grads, _ = jax.jit(jax.vmap(low.value_and_grad, (0, None, None)))(both, state, X)
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], (values, grads))
        alone = low.value_and_grad(jax.tree.map(lambda v, i=i: v[i], both), state, X)[:2]
        assert relative_error(one, alone) < 1e-5


def test_nnx_linear_trains_in_fp8():
    """flax's FP8 ops cannot be given to nnx.Linear."""
    graph, params = nnx.split(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    fn = lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2)
    low = training.fp8(fn, "rowwise")
    value, grads, _ = low.value_and_grad(params, low.init(params, X), X)
    wanted, exact = jax.value_and_grad(fn)(params, X)
    assert float(value) == pytest.approx(float(wanted), rel=1e-2)
    assert relative_error(grads["kernel"].get_value(), exact["kernel"].get_value()) < 0.1
    assert not qjax.is_qtensor(grads["kernel"])
