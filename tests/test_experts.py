"""Mixture of experts: against a loop over experts in float64, and with quantized experts.

Against transformers and llama.cpp see test_loading.py.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, relative_error, slow
from tiny_models import CONFIGS, make, some_tokens, stacked

import qjax
from qjax.models import Decoder, generator
from qjax.models.experts import Experts

FAMILIES = ("mixtral", "qwen3_moe")
KEEP_ROUTER = qjax.Rule(r".*/router/kernel", None)


def by_loop(params, x, config):
    """What the experts say, expert by expert and token by token, in float64."""
    router = np.asarray(params["router"]["kernel"], np.float64)
    gate, up, down = (
        np.asarray(params["experts"][name]["kernel"], np.float64) for name in ("gate", "up", "down")
    )
    y = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        token = np.asarray(x[index], np.float64)
        p = np.exp(token @ router)
        p /= p.sum()
        chosen = np.argsort(-p)[: config.experts_per_token]
        total = p[chosen].sum() if config.normalize_experts else 1.0
        for e in chosen:
            hidden = token @ gate[e]
            answer = (hidden / (1 + np.exp(-hidden)) * (token @ up[e])) @ down[e]
            y[index] += p[e] / total * answer
    return y


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_experts_answer(family):
    config = CONFIGS[family]
    params = make(config)[1]["params"]["layers_1"]["mlp"]
    x = jax.random.normal(jax.random.key(1), (2, 7, config.hidden_size))
    found = jax.jit(Experts(config).apply)({"params": params}, x)
    np.testing.assert_allclose(found, by_loop(params, x, config), atol=1e-5, rtol=0)


def test_all_tokens_may_go_to_the_same_experts():
    config = CONFIGS["mixtral"]
    params = dict(make(config)[1]["params"]["layers_1"]["mlp"])
    favored = jnp.zeros((config.hidden_size, config.num_experts)).at[:, (1, 3)].set(9.0)
    params["router"] = {"kernel": favored}
    x = 1 + jax.random.uniform(jax.random.key(1), (1, 9, config.hidden_size))
    found = jax.jit(Experts(config).apply)({"params": params}, x)
    np.testing.assert_allclose(found, by_loop(params, x, config), atol=1e-5, rtol=0)


def test_experts_that_answer_get_gradients_and_the_router_too():
    config = CONFIGS["qwen3_moe"]
    params = make(config)[1]["params"]["layers_0"]["mlp"]
    x = jax.random.normal(jax.random.key(1), (1, 1, config.hidden_size))
    loss = lambda p: jnp.sum(jnp.square(Experts(config).apply({"params": p}, x)))
    grads = jax.jit(jax.grad(loss))(params)
    for name in ("gate", "up", "down"):
        grad = grads["experts"][name]["kernel"]
        assert int(jnp.sum(jnp.any(grad != 0, axis=(1, 2)))) == config.experts_per_token
    assert jnp.any(grads["router"]["kernel"] != 0)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sites_tell_experts_from_contracted_axes(family, scan):
    config = dataclasses.replace(CONFIGS[family], scan=scan)
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), some_tokens())
    sites = qjax.find_sites(model.apply, params, some_tokens())
    found = {p: s[0] for p, s in sites.items() if "/experts/" in p}
    assert len(found) == 3 * (1 if scan else config.num_layers)
    for site in found.values():
        assert site.primitive == "ragged_dot_general"
        assert site.contract_axes == ((2,) if scan else (1,))
        assert site.batch_axes == ((1,) if scan else (0,))


@pytest.mark.parametrize(("family", "scan"), [("mixtral", True), ("qwen3_moe", False)])
@pytest.mark.parametrize("spec", [slow("int8"), "int4_g16", slow("nf4_g16_dq")])
def test_quantized_experts_run_on_codes(family, spec, scan):
    config = dataclasses.replace(CONFIGS[family], num_layers=2 if scan else 1)
    model, params = make(config)
    if scan:
        model = Decoder(dataclasses.replace(config, scan=True))
        params = stacked(params, config.num_layers)
    sites = qjax.find_sites(model.apply, params, some_tokens())
    recipe = qjax.Recipe(KEEP_ROUTER, qjax.Rule(".*", spec))
    qparams = qjax.quantize_params(params, recipe, sites)
    uses = qjax.explain(model.apply, qparams, some_tokens()).uses
    assert {u.path for u in uses} == {p for p in sites if "/router/" not in p}
    assert not [u for u in uses if u.how.startswith("dequantized")]
    how = {u.how for u in uses if "/experts/" in u.path}
    expected = r"ragged dot on codes, scale after" if spec == "int8" else r".*, ragged dot"
    assert all(re.fullmatch(expected, h) for h in how)
    found = jax.jit(qjax.quantized(model.apply))(qparams, some_tokens())
    wanted = jax.jit(model.apply)(dense(qparams), some_tokens())
    assert relative_error(found, wanted) < 1e-5


def test_quantized_experts_generate_what_dequantized_ones_do():
    config = dataclasses.replace(CONFIGS["mixtral"], num_layers=1)
    model, params = make(config)
    recipe = qjax.Recipe(KEEP_ROUTER, qjax.Rule(".*", "int8"))
    sites = qjax.find_sites(model.apply, params, some_tokens())
    qparams = qjax.quantize_params(params, recipe, sites)
    on_codes = generator(qjax.quantized(model.apply), config, max_new_tokens=8)
    on_floats = generator(model.apply, config, max_new_tokens=8)
    found, wanted = on_codes(qparams, some_tokens()), on_floats(dense(qparams), some_tokens())
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
