"""fold: the function stays, and nothing is divided at run time any more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow
from tiny_models import CONFIGS, make, some_tokens, stacked

import qjax
from qjax.activation import Activation
from qjax.models import Decoder, fold

TABLES = qjax.Rule(".*", None, where=qjax.is_gathered, optional=True)
SHARED = (2, 2, 8)  # value heads, query heads of each, size of a head


def family(name, layers=1, scan=False, **changes):
    """A random decoder of fewer layers."""
    config = CONFIGS[name]
    local = config.local_layers[:layers]
    config = dataclasses.replace(config, num_layers=layers, local_layers=local, **changes)
    model, params = make(config)
    if not scan:
        return model, params
    return Decoder(dataclasses.replace(config, scan=True)), stacked(params, layers)


def scaled(params, seed=0, shared=(), rule=lambda path: "int8"):
    """Every kernel in int8 with a random input scale; siblings have the same.

    With `shared` = (kv, groups, head_dim) the scale of o is the same for heads that share a value
    head.
    """
    rng = np.random.default_rng(seed)
    found = {}

    def one(path, w):
        names = [k.key for k in path]
        text = "/".join(names)
        if names[-1] != "kernel" or "router" in names or rule(text) is None:
            return w
        key = (*names[:-2], {"k": "q", "v": "q", "up": "gate"}.get(names[-2], names[-2]))
        shape = w.shape[:-1]
        if key not in found:
            s = rng.uniform(0.5, 2.0, shape)
            if names[-2] == "o" and shared:
                kv, groups, size = shared
                heads = s.reshape(*shape[:-1], kv, groups, size)[..., :1, :]
                s = np.broadcast_to(heads, (*shape[:-1], kv, groups, size)).reshape(shape)
            found[key] = jnp.asarray(s, jnp.float32)
        s = found[key]
        batch = tuple(range(w.ndim - 2))
        q = qjax.quantize(jnp.asarray(w) * s[..., None], rule(text), w.ndim - 2, batch_axis=batch)
        act = dataclasses.replace(q.activation or Activation(), axis=(-2,), input_scale=s)
        return dataclasses.replace(q, activation=act)

    return jax.tree_util.tree_map_with_path(one, params)


def logits(model, params):
    return np.asarray(jax.jit(qjax.quantized(model.apply))(params, some_tokens()), np.float64)


def scales(params):
    leaves = jax.tree.leaves(params, is_leaf=qjax.is_qtensor)
    acts = [v.activation for v in leaves if qjax.is_qtensor(v)]
    return sum(a is not None and a.input_scale is not None for a in acts)


@pytest.mark.parametrize(("name", "scan"), [slow("qwen2", False), ("gemma3", True)])
def test_all_scales_move_where_heads_that_share_values_share_scales(name, scan):
    layers = 2 if scan else 1
    model, params = family(name, layers, scan)
    given = scaled(params, shared=SHARED)
    done = fold(given, model)
    assert not done.skipped
    assert len(done.folded) == scales(given) == 7
    assert scales(done.params) == 0
    before, after = logits(model, given), logits(model, done.params)
    # scales of up and v in bfloat16 are divided: half of 2^-8, in each of 2 L branches
    bound = 4 * 2**-9 * (2 * layers) ** 0.5
    assert np.linalg.norm(after - before) <= bound * np.linalg.norm(before)
    codes = lambda t: [v for v in jax.tree.leaves(t) if v.dtype == jnp.int8]
    for old, new in zip(codes(given), codes(done.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_scales_of_query_heads_that_differ_stay_and_floats_have_their_rows_multiplied():
    model, params = family("llama")
    keep = lambda path: None if path.endswith(("k/kernel", "up/kernel")) else "int8"
    given = scaled(params, rule=keep)
    done = fold(given, model)
    assert [*done.skipped] == ["params/layers_0/attention/o/kernel"]
    assert "share each value head" in done.skipped["params/layers_0/attention/o/kernel"]
    assert scales(done.params) == 1
    assert "params/head/kernel" in done.folded
    # nothing that is divided is in a 16-bit dtype: down's scale goes into a float up
    before = logits(model, given)
    assert np.linalg.norm(logits(model, done.params) - before) <= 1e-5 * np.linalg.norm(before)


def test_of_experts_down_moves_into_up_and_the_rest_is_reported():
    model, params = family("mixtral")
    done = fold(scaled(params, shared=SHARED), model)
    block = "params/layers_0/mlp/experts/"
    assert f"{block}down/kernel" in done.folded
    assert "not one for each feature" in done.skipped[f"{block}up/kernel"]
    assert scales(done.params) == 2


def test_what_cannot_be_divided_stays():
    model, params = family("llama", 3)
    specs = ("nf4_g16_dq", "int8_16x8", "mxfp4")
    reasons = ("codes", "span several outputs", "float8_e8m0fnu")
    of = lambda path: specs[int(path.split("_")[1][0])] if path.endswith("up/kernel") else "int8"
    done = fold(scaled(params, shared=SHARED, rule=of), model)
    assert sorted(done.skipped) == [f"params/layers_{i}/mlp/down/kernel" for i in range(3)]
    for i, reason in enumerate(reasons):
        assert reason in done.skipped[f"params/layers_{i}/mlp/down/kernel"]


@pytest.mark.slow
def test_smoothquant_of_a_whole_model_with_its_int8_activations():
    model, params = family("llama", num_kv_heads=4)
    sites = qjax.find_sites(model.apply, params, some_tokens())
    recipe = qjax.Recipe(TABLES, qjax.Rule(".*", "int8/int8_token", qjax.smoothquant()))
    stats = qjax.calibrate(model.apply, params, [some_tokens()], recipe)
    q = qjax.quantize_params(params, recipe, sites, stats=stats)
    done = fold(q, model)
    assert scales(done.params) == 0
    before, exact = logits(model, q), logits(model, params)
    # an activation near a boundary takes the next code: far less than quantizing changed
    moved = np.linalg.norm(logits(model, done.params) - before)
    assert moved <= 0.5 * np.linalg.norm(before - exact)


def test_the_probe_and_the_names_are_checked(monkeypatch):
    model, params = family("llama")
    given = scaled(params)
    with pytest.raises(ValueError, match="give the model that the parameters belong to"):
        fold(given, Decoder(dataclasses.replace(model.config, intermediate_size=64)))
    # a norm that is multiplied where it should be divided makes another function
    monkeypatch.setattr("qjax.models.folding._divided", lambda v, s: v * s)
    with pytest.raises(ValueError, match="the logits of a probe change by"):
        fold(given, model)
