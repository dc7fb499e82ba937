"""Named recipes on small decoders: what each parameter becomes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.recipes import RECIPES, named
from qjax.tracing import param_path
from qjax.transform import decide

SIZES = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_layers": 2}
SIZES |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


@functools.cache
def decoder(**change):
    """The shapes of a decoder's parameters and their sites, traced once for all recipes."""
    model = models.Decoder(models.Config(**SIZES | change))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    shapes = {param_path(p): v for p, v in leaves}
    return shapes, qjax.find_sites(model.apply, params, tokens)


def decided(name, **change):
    """What the recipe makes of each parameter: the string of its Spec, or why it is kept."""
    shapes, sites = decoder(**change)
    found = decide(shapes, named(name), sites)
    return {
        path: str(d.spec) if d.spec is not None else f"kept: {d.kept}" for path, d in found.items()
    }


@pytest.mark.parametrize("name", [n for n in RECIPES if "_k_" not in n])
def test_projections_are_quantized_the_table_and_router_kept_the_head_in_8_bits(name):
    dense = decided(name)
    spec = str(named(name).rules[-1].spec)
    assert {v for p, v in dense.items() if p.count("layers") and p.endswith("kernel")} == {spec}
    assert dense["params/embed/embedding"].startswith("kept: rule '.*' where is_gathered")
    assert dense["params/head/kernel"].removesuffix("_e4m3") in ("int8", "fp8")
    assert decided(name, tied=True)["params/embed/embedding"].startswith("kept")
    experts = decided(name, num_experts=4, experts_per_token=2, scan=True)
    router = experts["params/layers/block/mlp/router/kernel"]
    assert router.startswith("kept: rule")
    assert experts["params/layers/block/mlp/experts/down/kernel"] == spec


def test_a_mix_of_k_quants():
    mix = decided("q4_k_m")
    layer = "params/layers_1/"
    assert mix[f"{layer}attention/v/kernel"] == mix[f"{layer}mlp/down/kernel"] == "q6_k"
    others = [f"{layer}attention/{n}/kernel" for n in "qko"] + [
        f"{layer}mlp/{n}/kernel" for n in ("gate", "up")
    ]
    assert {mix[p] for p in others} == {"q4_k"}
    assert mix["params/embed/embedding"] == mix["params/head/kernel"] == "q6_k"
    assert decided("q5_k_m")[others[0]] == "q5_k"
    assert decided("q3_k_m")[others[0]] == "q3_k"


def test_mixed_precision_by_path_stands_in_front():
    recipe = qjax.Recipe(qjax.Rule(".*/down/kernel", "int8"), *named("w4a16_gptq").rules)
    assert recipe.rule_for("params/layers_0/mlp/down/kernel", ()).spec.format == "int8"
    assert recipe.rule_for("params/layers_0/mlp/up/kernel", ()).algorithm.name == "gptq"


def output_error(w, x, q):
    """Of the weight alone, in float64."""
    return np.linalg.norm(np.asarray(x, np.float64) @ (np.asarray(w) - qjax.dequantize(q)))


def product_error(w, x, q):
    """Of the product on codes, inputs quantized too."""
    exact = np.asarray(x, np.float64) @ np.asarray(w)
    return np.linalg.norm(jax.jit(qjax.quantized(jnp.matmul))(x, q) - exact)


def power_error(w, x, q):
    """HQQ's: sum |w - w_q|^0.7."""
    return np.sum(np.abs(np.asarray(w, np.float64) - qjax.dequantize(q)) ** 0.7)


# what each algorithm minimizes; none may end above rounding to nearest at the recipe's own Spec
OBJECTIVES = {"gptq": output_error, "awq": output_error, "hqq": power_error}
OBJECTIVES |= {"smoothquant": product_error, "llm_int8": product_error}


def test_algorithms_gain_what_they_are_for_at_their_recipes_specs():
    loud = jnp.ones(128).at[jnp.array([3, 70])].set(30)  # two features in 128, as models have them
    w = jax.random.normal(jax.random.key(0), (128, 8))
    x = jax.random.normal(jax.random.key(1), (64, 128)) * loud[None]
    stats = qjax.Stats(x.T @ x, jnp.abs(x).mean(0), jnp.abs(x).max(0), jnp.square(x).mean(0))
    for name, make in RECIPES.items():
        rule = make().rules[-1]
        if rule.algorithm is not None:
            q = rule.algorithm.finish(*rule.algorithm.quantize(w, rule.spec, stats))
            error = OBJECTIVES[rule.algorithm.name]
            assert error(w, x, q) < error(w, x, qjax.quantize(w, rule.spec, 0)), name


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"no recipe is named 'w4'; there are w8a16, .*q4_k_m"):
        named("w4")
