"""partition, combine, stack, unstack: trees that hold QTensors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import dense
from jax import lax

import qjax


def layer(seed, spec="int4_g16"):
    w = jax.random.normal(jax.random.key(seed), (32, 32))
    return {"w": qjax.quantize(w, spec, 0), "b": jnp.full(32, float(seed)), "n": jnp.int32(seed)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("trainable", "paths"),
    [(None, {"0/b", "1/b"}), (r"1/.*b", {"1/b"}), (lambda path, leaf: path == "0/b", {"0/b"})],
)
def test_partition_and_combine(trainable, paths):
    tree = [layer(0), layer(1)]
    chosen, frozen = qjax.partition(tree, trainable)
    found = jax.tree_util.tree_leaves_with_path(chosen)
    assert {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in found} == paths
    assert_same(qjax.combine(chosen, frozen), tree)
    assert_same(qjax.combine(frozen, chosen), tree)


def test_partition_refuses_what_cannot_train():
    with pytest.raises(ValueError, match=r"'w2' matches no parameter"):
        qjax.partition(layer(0), "w2")
    with pytest.raises(ValueError, match=r"w: QTensor.* cannot be trained"):
        qjax.partition(layer(0), "w")
    with pytest.raises(ValueError, match=r"n: .* cannot be trained"):
        qjax.partition(layer(0), "n")
    with pytest.raises(ValueError, match="b: 2 trees have a value here"):
        qjax.combine(layer(0), {"w": None, "b": jnp.ones(32), "n": None})


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", "int4_g16"])
@pytest.mark.usefixtures("standard_promotion")
def test_training_beside_frozen_weights_leaves_their_bits(spec):
    params = layer(3, spec)
    trainable, frozen = qjax.partition(params)
    run = qjax.quantized(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]))
    x, y = jnp.ones((4, 32)), jnp.zeros((4, 32))
    state = TrainState.create(apply_fn=run, params=trainable, tx=optax.adamw(0.1, weight_decay=0.1))

    @jax.jit
    def step(state, frozen):
        loss = lambda p: jnp.mean(jnp.square(state.apply_fn(qjax.combine(p, frozen), x) - y))
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(100):
        state, value = step(state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert_same(qjax.combine(state.params, frozen)["w"], params["w"])


@pytest.mark.usefixtures("standard_promotion")
def test_lora_norms_and_biases_train_beside_int8_and_fp8():
    """Weight decay would move FP8 codes and every scale, were they not frozen."""
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape) * shape[0] ** -0.5
    params = {
        "up": {"kernel": qjax.quantize(normal(0, 32, 64), "int8", 0), "bias": jnp.zeros(64)},
        "down": {"kernel": qjax.quantize(normal(1, 64, 32), "fp8_e4m3_g16", 0)},
        "lora": {"a": normal(2, 32, 4), "b": jnp.zeros((4, 64))},
        "norm": {"scale": jnp.ones(32)},
        "steps": jnp.int32(0),
    }

    def model(p, x):
        h = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * p["norm"]["scale"]
        h = h @ p["up"]["kernel"] + (h @ p["lora"]["a"]) @ p["lora"]["b"] + p["up"]["bias"]
        return jnp.tanh(h) @ p["down"]["kernel"]

    trainable, frozen = qjax.partition(params)
    assert len(jax.tree.leaves(trainable)) == 4
    run = qjax.quantized(model)
    state = TrainState.create(
        apply_fn=run, params=trainable, tx=optax.adamw(0.01, weight_decay=0.1)
    )
    x, y = normal(3, 16, 32), normal(4, 16, 32)

    @jax.jit
    def step(state, frozen):
        loss = lambda p: jnp.mean(jnp.square(state.apply_fn(qjax.combine(p, frozen), x) - y))
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    before, losses = jax.device_get(frozen), []
    for _ in range(100):
        state, value = step(state, frozen)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert_same(frozen, before)
    after = qjax.combine(state.params, frozen)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for name in ("up", "down"):
        assert_same(after[name]["kernel"], params[name]["kernel"])
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(trainable), strict=True
    ):
        assert np.abs(np.asarray(new - old)).max() > 1e-3, path


@pytest.mark.parametrize(
    "spec", ["int8", "int4_g16", "uint4_g16", "nf4_g16_dq", "fp8_e4m3", "q5_0"]
)
def test_stack_and_unstack(spec):
    layers = [layer(i, spec) for i in range(3)]
    stacked = qjax.stack(layers)
    assert stacked["w"].shape == (3, 32, 32)
    for a, b in zip(qjax.unstack(stacked), layers, strict=True):
        assert_same(a, b)
    x = jnp.ones((2, 32))
    body = lambda c, p: (jnp.tanh(c @ p["w"]), None)
    scanned = qjax.quantized(lambda p, x: jax.lax.scan(body, x, p)[0])(stacked, x)
    for p in layers:
        x = body(x, dense(p))[0]
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_stacked():
    with pytest.raises(ValueError, match=r"w: what is held differently .*int4.* and QTensor\(int8"):
        qjax.stack([layer(0), layer(1, "int8")])
    with pytest.raises(ValueError, match="at least one tree"):
        qjax.stack([])
    with pytest.raises(ValueError, match=r"w: QTensor.* has blocks that span its leading axis"):
        qjax.unstack({"w": layer(0)["w"]})
    with pytest.raises(ValueError, match="b: leading axis of length 3, the others have 2"):
        qjax.unstack({"a": jnp.ones((2, 2)), "b": jnp.ones((3, 2))})
