"""Models of Flax Linen, Flax NNX and plain functions run unmodified, all on codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import dense, dequantized_uses, relative_error, slow

import qjax

pytestmark = pytest.mark.usefixtures("standard_promotion")
IDS = jnp.arange(12).reshape(2, 6)


class LinenBlock(nn.Module):
    """Attention and MLP, as a scan sees it."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(h, h)
        h = nn.Dense(128)(nn.LayerNorm()(x))
        return x + nn.Dense(64)(nn.gelu(h)), None


class LinenLM(nn.Module):
    """Scan over rematerialized layers, tied embedding."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 64)
        block = nn.remat(LinenBlock, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(embed(ids), None)
        return embed.attend(x)


class NNXModel(nnx.Module):
    """Embedding, two linear layers and attention."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, rngs=rngs, decode=False)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        return self.embed.attend(x + self.down(nnx.relu(self.up(x))))


def linen():
    model = LinenLM()
    return model.apply, model.init(jax.random.key(0), IDS)


def nnx_split():
    graph, state = nnx.split(NNXModel(nnx.Rngs(0)))
    return (lambda state, ids: nnx.merge(graph, state)(ids)), state


def plain():
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (50, 64))
    layers = [
        (jax.random.normal(keys[1], (128, 64)) / 8, jnp.zeros(128)),
        (jax.random.normal(keys[2], (64, 128)) / 8, jnp.zeros(64)),
    ]

    def apply(params, ids):
        table, layers = params

        def one(i):
            x = table[i]
            for w, b in layers:
                x = jnp.tanh(w @ x + b)
            return table @ x

        return jax.vmap(jax.vmap(one))(ids)

    return apply, (table, layers)


MODELS = {"linen": (linen, 7), "nnx": (nnx_split, 7), "plain": (plain, 3)}


@pytest.mark.parametrize("spec", [slow("int8"), slow("int4_g16"), "nf4_g16_dq", slow("fp8_e4m3")])
@pytest.mark.parametrize("name", [slow(n) if n == "linen" else n for n in MODELS])
def test_model_runs_on_codes(name, spec):
    make, weights = MODELS[name]
    apply, params = make()
    sites = qjax.find_sites(apply, params, IDS)
    assert len(sites) == weights
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", spec)), sites)
    uses = qjax.explain(apply, q, IDS).uses
    assert len(uses) == weights + 1  # the tied table is used twice
    assert not dequantized_uses(apply, q, IDS)
    got, wanted = jax.jit(qjax.quantized(apply))(q, IDS), jax.jit(apply)(dense(q), IDS)
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("name", [slow(n) if n == "linen" else n for n in MODELS])
def test_dynamic_activations(name):
    make, _ = MODELS[name]
    apply, params = make()
    sites = qjax.find_sites(apply, params, IDS)
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", "int8/int8_token")), sites)
    assert not dequantized_uses(apply, q, IDS)
    got, wanted = jax.jit(qjax.quantized(apply))(q, IDS), jax.jit(apply)(params, IDS)
    assert relative_error(got, wanted) < 0.05


def test_an_unwrapped_model_teaches():
    apply, params = linen()
    q = qjax.quantize_params(params, "int8", qjax.find_sites(apply, params, IDS))
    with pytest.raises(TypeError, match=r"qjax\.quantized"):
        apply(q, IDS)


def test_train_state_applies_a_quantized_model():
    apply, params = linen()
    q = qjax.quantize_params(params, "int8", qjax.find_sites(apply, params, IDS))
    state = TrainState.create(apply_fn=qjax.quantized(apply), params=q, tx=optax.set_to_zero())
    assert state.apply_fn(state.params, IDS).shape == (2, 6, 50)
