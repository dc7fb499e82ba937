"""google-tunix's Qwen3, Qwen3-MoE and Llama3, unmodified: `make test-thirdparty`."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import dense, dequantized_uses, relative_error

import qjax
from qjax.recipes import ROUTER

if importlib.util.find_spec("tunix") is None:
    pytest.skip("google-tunix is not installed: make test-thirdparty", allow_module_level=True)

with warnings.catch_warnings():  # its dependencies import names that JAX is about to drop
    warnings.simplefilter("ignore", DeprecationWarning)
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of flax, about what tunix calls
]

IDS = jnp.arange(12).reshape(2, 6)
SIZES = {
    "num_layers": 2,
    "vocab_size": 64,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}

# name -> (model, weights in matmuls and lookups: table, 7 per layer, head; router and experts)
MODELS = {
    "qwen3": (lambda: qwen3.Qwen3(qwen3.ModelConfig(**SIZES), rngs=nnx.Rngs(0)), 1 + 2 * 7 + 1),
    "qwen3 tied": (
        lambda: qwen3.Qwen3(qwen3.ModelConfig(**SIZES, use_tied_embedding=True), rngs=nnx.Rngs(0)),
        1 + 2 * 7,
    ),
    "qwen3 experts": (
        lambda: qwen3.Qwen3(
            qwen3.ModelConfig(**SIZES, num_experts=4, num_experts_per_tok=2), rngs=nnx.Rngs(0)
        ),
        1 + 2 * 8 + 1,
    ),
    "llama3": (lambda: llama3.Llama3(llama3.ModelConfig(**SIZES), rngs=nnx.Rngs(0)), 1 + 2 * 7 + 1),
}


def load(name):
    """(function of the state and tokens, random state, number of weights)."""
    make, weights = MODELS[name]
    graph, state = nnx.split(make())
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    random = lambda k, v: jax.random.normal(k, v.shape, v.dtype) * v.shape[0] ** -0.5
    filled = [
        random(k, v) if v.ndim > 1 else jnp.ones_like(v) for k, v in zip(keys, leaves, strict=True)
    ]
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))
    apply = lambda state, ids: nnx.merge(graph, state)(ids, positions, None, mask)[0]
    return apply, jax.tree.unflatten(tree, filled), weights


@pytest.mark.parametrize("spec", ["int8", "int4_g16", "nf4_g16_dq", "fp8_e4m3"])
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_runs_on_codes(name, spec):
    apply, params, weights = load(name)
    sites = qjax.find_sites(apply, params, IDS)
    assert len(sites) == weights
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", spec)), sites)
    assert {u.path for u in qjax.explain(apply, q, IDS).uses} == set(sites)
    assert not dequantized_uses(apply, q, IDS)
    got, wanted = jax.jit(qjax.quantized(apply))(q, IDS), jax.jit(apply)(dense(q), IDS)
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_activations(name):
    apply, params, _ = load(name)
    recipe = qjax.Recipe(qjax.Rule(".*", "int8/int8_token"))
    q = qjax.quantize_params(params, recipe, qjax.find_sites(apply, params, IDS))
    assert not dequantized_uses(apply, q, IDS)
    got, wanted = jax.jit(qjax.quantized(apply))(q, IDS), jax.jit(apply)(params, IDS)
    assert relative_error(got, wanted) < 0.1


def test_calibrated_gptq_of_a_mixture_of_experts():
    """Both ways every site, experts included, loses less of its output than by rounding."""
    apply, params, _ = load("qwen3 experts")
    ids = jax.random.randint(jax.random.key(1), (2, 2, 6), 0, SIZES["vocab_size"])
    gptq = qjax.Recipe(
        qjax.Rule(".*", None, where=qjax.is_gathered),
        qjax.Rule(ROUTER, None),
        qjax.Rule(".*", "int4_g16", qjax.gptq()),
    )
    sites = qjax.find_sites(apply, params, ids[0])
    stats = qjax.calibrate(apply, params, list(ids), gptq)
    # off the TPU its four experts are indexed one by one: uses of one weight, zeros for the others
    assert all(int(stats[f"layers/{i}/mlp/down_proj"].count) == 4 * ids.size for i in range(2))
    logs = [], []
    qjax.quantize_params(params, gptq, sites, stats=stats, log=logs[0].append)
    q = qjax.quantize_sequential(apply, params, list(ids), gptq, log=logs[1].append)
    for seen in logs:
        assert len(seen) == 2 * 7 + 1
        assert all(entry.error_after < entry.error_before for entry in seen)
    assert {u.path for u in qjax.explain(apply, q, ids[0]).uses} >= stats.keys()
    assert not dequantized_uses(apply, q, ids[0])
