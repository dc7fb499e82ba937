"""Recipes, quantize_params and report: nothing is skipped silently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

WIDTH = 64


def model(p, ids):
    x = jnp.take(p["table"], ids, axis=0)
    for layer in p["layers"]:
        x = jnp.tanh(x @ layer["up"] + layer["bias"][None]) @ layer["down"]
    return x @ p["table"].T


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    layer = lambda: {"up": normal(64, 128), "down": normal(128, 64), "bias": normal(128)}
    return {"table": normal(50, 64), "layers": [layer(), layer()]}


@pytest.fixture
def params():
    return make_params()


@pytest.fixture
def sites(params):
    return qjax.find_sites(model, params, jnp.arange(3))


def formats(qparams):
    rows = qjax.report(qparams).rows
    return {r.path: r.format for r in rows}


def test_a_spec_string_takes_every_matmul_and_keeps_tables(params, sites):
    q = qjax.quantize_params(params, "int4_g32", sites)
    assert jax.tree.structure(params) == jax.tree.structure(q, is_leaf=qjax.is_qtensor)
    assert formats(q) == {
        "table": "float32",
        "layers/0/up": "int4 [32,1]",
        "layers/0/down": "int4 [32,1]",
        "layers/0/bias": "float32",
        "layers/1/up": "int4 [32,1]",
        "layers/1/down": "int4 [32,1]",
        "layers/1/bias": "float32",
    }
    assert q["table"] is params["table"]


def test_the_first_rule_that_matches_decides(params, sites):
    recipe = qjax.Recipe(
        qjax.Rule("table", "int8"),
        qjax.Rule(r".*/down", "nf4_g64"),
        qjax.Rule(r"layers/0/.*", None),
        qjax.Rule(r".*", "int4_g32"),
    )
    found = formats(qjax.quantize_params(params, recipe, sites))
    assert found["table"] == "int8 [1,64]" or found["table"] == "int8 [64]"
    assert found["layers/0/down"] == found["layers/1/down"] == "nf4 [64,1]"
    assert found["layers/0/up"] == "float32"
    assert found["layers/1/up"] == "int4 [32,1]"


def test_a_tied_table_is_grouped_along_what_the_head_contracts(params, sites):
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", "int4_g32")), sites)
    assert q["table"].scale.shape == (50, 2)


def test_a_table_that_is_only_looked_up_is_grouped_along_its_rows():
    fn = lambda p: jnp.take(p["table"], jnp.arange(3), axis=0)
    table = {"table": jnp.ones((50, 64))}
    recipe = qjax.Recipe(qjax.Rule(".*", "int4_g32"))
    q = qjax.quantize_params(table, recipe, qjax.find_sites(fn, table))
    assert q["table"].scale.shape == (50, 2)


def test_stacked_layers_and_experts_keep_their_axes():
    def fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.einsum("ebd,edf->ebf", c, w), None), x, p["w"])[0]

    p = {"w": jax.random.normal(jax.random.key(0), (2, 3, 64, 64))}
    sites = qjax.find_sites(fn, p, jnp.ones((3, 5, 64)))
    for spec, shape in [
        ("int8", (2, 3, 1, 64)),
        ("int4_g16", (2, 3, 4, 64)),
        ("int8_tensor", (2, 3, 1, 1)),
    ]:
        assert qjax.quantize_params(p, spec, sites)["w"].scale.shape == shape
    nested = qjax.quantize_params(p, "nf4_g16_dq", sites)["w"].scale
    alone = qjax.quantize(p["w"][1, 2], "nf4_g16_dq", 0).scale
    np.testing.assert_array_equal(nested.qvalue[1, 2], alone.qvalue)


def test_it_is_pure_and_runs_under_jit_and_eval_shape(params, sites):
    quantize = lambda p: qjax.quantize_params(p, "int8", sites)
    eager, jitted = quantize(params), jax.jit(quantize)(params)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
    abstract = jax.eval_shape(quantize, params)
    assert abstract["layers"][0]["up"].shape == (64, 128)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)


def test_without_sites_a_rule_gives_the_axis(params):
    recipe = qjax.Recipe(qjax.Rule(r".*/(up|down)", "int8", axis=0))
    q = qjax.quantize_params(params, recipe)
    assert q["layers"][0]["up"].scale.shape == (1, 128)
    assert not qjax.is_qtensor(q["table"])
    with pytest.raises(ValueError, match=r"layers/0/bias: shape \(128,\) has no site.*axis"):
        qjax.quantize_params(params, "int8")


def test_what_is_quantized_already_is_kept(params, sites):
    once = qjax.quantize_params(
        params, qjax.Recipe(qjax.Rule(".*/up", "int8"), qjax.Rule(".*", None)), sites
    )
    twice = qjax.quantize_params(once, "int4_g32", sites)
    assert twice["layers"][0]["up"] is once["layers"][0]["up"]
    assert twice["layers"][0]["down"].format == "int4"


# --- errors


def test_a_weight_that_no_rule_matches_is_an_error(params, sites):
    with pytest.raises(
        ValueError, match=r"table: shape \(50, 64\).*no rule matches it; add Rule\('table', None\)"
    ):
        qjax.quantize_params(params, qjax.Recipe(qjax.Rule("layers/.*", "int8")), sites)


def test_a_rule_that_matches_nothing_is_an_error(params, sites):
    recipe = lambda **kw: qjax.Recipe(
        qjax.Rule("layers/0/upp", "int8", **kw), qjax.Rule(".*", None)
    )
    with pytest.raises(
        ValueError, match=r"'layers/0/upp' matches no parameter \(close: layers/0/up"
    ):
        qjax.quantize_params(params, recipe(), sites)
    qjax.quantize_params(params, recipe(optional=True), sites)


def test_a_shadowed_rule_has_matched(params, sites):
    qjax.quantize_params(
        params, qjax.Recipe(qjax.Rule(".*", None), qjax.Rule("table", "int8")), sites
    )


def test_sites_of_another_tree_are_an_error(params, sites):
    with pytest.raises(
        ValueError,
        match=r"sites name 'table', which is not in the parameters \(close: params/table",
    ):
        qjax.quantize_params({"params": params}, "int8", sites)


def test_two_contracted_axes_are_an_error_unless_the_rule_says():
    fn = lambda p, x: x @ p["w"] @ p["w"].T
    p = {"w": jnp.ones((64, 32))}
    sites = qjax.find_sites(fn, p, jnp.ones((2, 64)))
    with pytest.raises(
        ValueError, match=r"w: shape \(64, 32\) is contracted over axes \(0,\) and \(1,\)"
    ):
        qjax.quantize_params(p, "int8", sites)
    q = qjax.quantize_params(p, qjax.Recipe(qjax.Rule(".*", "int8", axis=1)), sites)
    assert q["w"].scale.shape == (64, 1)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("spec", ["int8", "int4_g32", "uint4_g32", "nf4_g64_dq", "fp8_e4m3"])
def test_bad_weights_are_named_and_counted(params, sites, spec, bad):
    params["layers"][1]["up"] = params["layers"][1]["up"].at[3, :2].set(bad)
    with pytest.raises(ValueError, match=r"layers/1/up: .*2 NaN or Inf"):
        qjax.quantize_params(params, spec, sites)


def test_rules_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="no regular expression"):
        qjax.Rule("(", "int8")
    with pytest.raises(ValueError, match="int9"):
        qjax.Rule(".*", "int9")
    with pytest.raises(ValueError, match="made of Rules"):
        qjax.Recipe("int8")


# --- report


def test_report_says_what_is_held_and_why_the_rest_was_kept(params, sites):
    q = qjax.quantize_params(params, "int4_g32", sites)
    report = qjax.report(q, params, "int4_g32", sites)
    rows = {r.path: r for r in report.rows}
    up = rows["layers/0/up"]
    assert up.bits_per_weight == 4.5
    assert up.nbytes == 64 * 128 // 2 + 2 * 128 * 2
    w, d = (
        np.asarray(v, np.float64)
        for v in (params["layers"][0]["up"], qjax.dequantize(q["layers"][0]["up"]))
    )
    assert up.sqnr == pytest.approx(10 * np.log10((w**2).sum() / ((w - d) ** 2).sum()), abs=1e-3)
    assert rows["table"].note == "rule '.*' where is_gathered keeps it"
    assert rows["layers/0/bias"].note == "no matmul and no lookup takes it directly"
    held = jax.jit(lambda q: q).lower(q).compile().memory_analysis().argument_size_in_bytes
    assert report.nbytes == pytest.approx(held, rel=0.01)
    assert str(report).splitlines()[-1].split() == [
        "total",
        f"{report.bits_per_weight:.3f}",
        f"{report.nbytes:,}",
    ]


def test_report_of_another_tree_is_an_error(params, sites):
    q = qjax.quantize_params(params, "int8", sites)
    with pytest.raises(ValueError, match="different trees"):
        qjax.report(q, {"params": params})
