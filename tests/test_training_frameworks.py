"""FP8 training under other people's loops: TrainState, NNX, MultiSteps; and on meshes."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import training

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = jax.random.normal(jax.random.key(0), (16, 8))
Y = jnp.tanh(X[:, ::-1] * X)
DELAYED = dataclasses.replace(training.RECIPES["delayed"], history=4)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.gelu(nn.Dense(32)(nn.gelu(nn.Dense(32)(x)))))


def test_flax_train_state():
    class State(TrainState):
        fp8: Any = None

        def apply(self, low, *batch):
            loss, grads, fp8 = low.value_and_grad(self.params, self.fp8, *batch)
            return loss, self.apply_gradients(grads=grads).replace(fp8=fp8)

    model = MLP()
    low = training.fp8(lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2), DELAYED)
    params = model.init(jax.random.key(1), X)
    state = State.create(
        apply_fn=model.apply, params=params, tx=optax.adamw(3e-3), fp8=low.init(params, X, Y)
    )
    step = jax.jit(lambda state: state.apply(low, X, Y))
    first, state = step(state)
    for _ in range(60):
        last, state = step(state)
    assert float(last) < 0.5 * float(first)
    assert (np.asarray(state.fp8.history["params/Dense_1/kernel"]["g"]) > 0).all()


def test_nnx_linear():
    """flax's own FP8 ops cannot be given to nnx.Linear."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    low = training.fp8(lambda p, x, y: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2), "rowwise")
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, moments, state):
        loss, grads, state = low.value_and_grad(params, state, X, Y)
        updates, moments = tx.update(grads, moments, params)
        return loss, optax.apply_updates(params, updates), moments, state

    carry = params, tx.init(params), low.init(params, X, Y)
    assert "up/kernel" in {use.key for use in carry[2].uses}
    first, *carry = step(*carry)
    for _ in range(60):
        last, *carry = step(*carry)
    assert float(last) < 0.5 * float(first)


def test_optax_multi_steps():
    """The amax of all microbatches between two updates enters the history, once."""
    model = MLP()
    low = training.fp8(lambda p, x, y: jnp.mean((model.apply(p, x) - y) ** 2), DELAYED)
    params = model.init(jax.random.key(1), X)
    tx = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)

    @jax.jit
    def micro(params, moments, state, pending, x, y):
        _, grads, seen = low.grads(params, state, x, y)
        updates, moments = tx.update(grads, moments, params)
        pending, done = low.merge(pending, seen), tx.has_updated(moments)
        pick = lambda a, b: jax.tree.map(lambda a, b: jnp.where(done, a, b), a, b)
        state = pick(low.update(state, pending), state)
        pending = pick(jax.tree.map(jnp.zeros_like, pending), pending)
        return optax.apply_updates(params, updates), moments, state, pending

    start = low.init(params, X, Y)
    nothing = jax.tree.map(lambda h: jnp.zeros(h.shape[1:]), start.history)
    carry = params, tx.init(params), start, nothing
    for i in range(8):
        carry = micro(*carry, *(v[4 * (i % 4) : 4 * (i % 4) + 4] for v in (X, Y)))

    wanted, state = params, start
    for _ in range(2):
        _, grads, state = jax.jit(low.value_and_grad)(wanted, state, X, Y)
        wanted = jax.tree.map(lambda p, g: p - 0.1 * g, wanted, grads)
    assert int(carry[2].step) == 2
    for key, history in state.history.items():
        mine = carry[2].history[key]
        np.testing.assert_allclose(mine["x"], history["x"], rtol=1e-4)
        np.testing.assert_allclose(mine["w"], history["w"], rtol=1e-4)
        np.testing.assert_allclose(mine["g"], 4 * history["g"], rtol=1e-4)  # means over a quarter
    assert relative_error(carry[0], wanted) < 1e-3


def plain_loss(p, x):
    def block(x, w):
        h = jax.nn.silu(x @ w["up"])
        return x + h @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(block), x, p["layers"])
    return jnp.mean((x @ p["head"]) ** 2)


@pytest.mark.parametrize(
    "recipe",
    [
        "delayed",
        pytest.param("rowwise", marks=pytest.mark.slow),
        pytest.param("block", marks=pytest.mark.slow),
        pytest.param("nvfp4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_give_the_numbers_of_one_device(kind, recipe):
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape) * shape[-2] ** -0.5
    params = {
        "layers": {"up": normal(0, 2, 32, 64), "down": normal(1, 2, 64, 32)},
        "head": normal(2, 32, 16),
    }
    x = jax.random.normal(keys[3], (8, 4, 32))
    low = training.fp8(plain_loss, recipe)
    run = jax.jit(low.grads)
    value, grads, seen = run(params, low.init(params, x), x)

    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    gathered = kind == AxisType.Explicit  # there the model itself says what is gathered
    specs = {
        "layers": {
            "up": P(None, None if gathered else "fsdp", "tensor"),
            "down": P(None, None if gathered else "tensor", None if gathered else "fsdp"),
        },
        "head": P(),
    }
    if gathered:
        specs["layers"]["up"] = P()
    with jax.set_mesh(mesh):
        place = lambda v, s: jax.device_put(v, NamedSharding(mesh, s))
        p = jax.tree.map(place, params, specs)
        xs = place(x, P(("data", "fsdp")))
        got, got_grads, got_seen = run(p, low.init(p, xs), xs)
    assert relative_error(got, value) < 1e-5
    if recipe == "delayed":
        assert relative_error(got_seen, seen) < 1e-5
    assert relative_error(got_grads, grads) < (0.2 if recipe == "nvfp4" else 2e-2)
