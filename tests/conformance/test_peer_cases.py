"""The cases in which the nearest JAX peer was seen to fail, by the numbers of docs/peers.md.

Each asserts the right numbers, or an error that says what to do.
"""

import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import dense, dequantized_uses, few, relative_error
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import FORMATS

pytestmark = pytest.mark.usefixtures("standard_promotion")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * shape[0] ** -0.5


def runs_on_codes(fn, params, *args, spec="int8", tables=True, limit=1e-5, jit=jax.jit):
    """Quantizes all weights, asserts that none is opened and that the numbers are right."""
    sites = qjax.find_sites(fn, params, *args)
    recipe = qjax.Recipe(qjax.Rule(".*", spec)) if tables else spec
    q = qjax.quantize_params(params, recipe, sites)
    assert sites
    assert not dequantized_uses(fn, q, *args)
    got, wanted = jit(qjax.quantized(fn))(q, *args), fn(dense(q), *args)
    assert relative_error(got, wanted) < limit
    return q


# --- 1 to 3: what was traced before or after does not matter


@pytest.mark.parametrize("spec", ["int8", "int8/int8_token"])
def test_01_03_a_float_trace_before_leaves_quantization_on(spec):
    helper = jax.jit(lambda x, w: x @ w)
    fn = lambda p, x: helper(jnp.tanh(x @ p["a"]), p["b"])
    params, x = {"a": normal(0, 64, 64), "b": normal(1, 64, 64)}, normal(2, 5, 64)
    before = jax.jit(fn)(params, x)
    q = qjax.quantize_params(params, spec, qjax.find_sites(fn, params, x))
    assert relative_error(jax.jit(qjax.quantized(fn))(q, x), before) > 1e-4
    assert not dequantized_uses(fn, q, x)


@pytest.mark.parametrize("spec", ["int8", "int8/int8_token"])
def test_02_03_a_quantized_trace_before_leaves_the_float_model_float(spec):
    helper = jax.jit(lambda x, w: x @ w)
    fn = lambda p, x: helper(jnp.tanh(x @ p["a"]), p["b"])
    params, x = {"a": normal(0, 64, 64), "b": normal(1, 64, 64)}, normal(2, 5, 64)
    q = qjax.quantize_params(params, spec, qjax.find_sites(fn, params, x))
    jax.jit(qjax.quantized(fn))(q, x)
    exact = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["a"], np.float64))
    exact = exact @ np.asarray(params["b"], np.float64)
    assert relative_error(fn(params, x), exact) < 1e-6
    assert relative_error(jax.jit(fn)(params, x), exact) < 1e-6


# --- 4 to 6: lifted modules


class Layer(nn.Module):
    """A dense layer as a scan sees it."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(32)(x)), None


@pytest.mark.parametrize("spec", ["int8", "int4_g16"])
def test_04_scan_over_layers(spec):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            split = {"params": True}
            return nn.scan(Layer, variable_axes={"params": 0}, split_rngs=split, length=3)()(
                x, None
            )[0]

    model, x = Model(), normal(0, 5, 32)
    runs_on_codes(model.apply, model.init(jax.random.key(0), x), x, spec=spec)


@pytest.mark.parametrize("spec", ["int8", "int4_g16"])
def test_05_vmap_over_experts(spec):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            return lifted(24)(x)

    model, x = Model(), normal(0, 3, 5, 32)
    runs_on_codes(model.apply, model.init(jax.random.key(0), x), x, spec=spec)


def test_06_mutable_collections_come_back():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(24)(x))
            self.sow("intermediates", "x", x)
            return x

    model, x = Model(), normal(0, 5, 32)
    variables = model.init(jax.random.key(0), x)
    apply = lambda v, x: model.apply(v, x, mutable=["batch_stats", "intermediates"])
    q = qjax.quantize_params(variables, "int8", qjax.find_sites(apply, variables, x))
    (y, state), (wanted, wanted_state) = qjax.quantized(apply)(q, x), apply(dense(q), x)
    assert relative_error(y, wanted) < 1e-5
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    assert relative_error(state, wanted_state) < 1e-5


# --- 8: tied embeddings


def test_08_tied_embeddings():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(50, 32)
            return embed.attend(embed(ids))

    ids = jnp.arange(6)
    model = Linen()
    q = runs_on_codes(model.apply, model.init(jax.random.key(0), ids), ids, spec="int4_g16")
    assert qjax.is_qtensor(q["params"]["Embed_0"]["embedding"])

    graph, state = nnx.split(nnx.Embed(50, 32, rngs=nnx.Rngs(0)))
    tied = lambda s, ids: nnx.merge(graph, s).attend(nnx.merge(graph, s)(ids))
    alone = lambda s, ids: nnx.merge(graph, s)(ids)
    for fn in (tied, alone):
        assert qjax.is_qtensor(runs_on_codes(fn, state, ids, spec="int8")["embedding"].get_value())


# --- 9, 10: convolutions and experts


@pytest.mark.parametrize("spec", ["int8", "int4_g16"])
def test_09_convolution_weight_only(spec):
    model, x = nn.Conv(8, (3, 3)), normal(0, 2, 9, 9, 16)
    runs_on_codes(model.apply, model.init(jax.random.key(0), x), x, spec=spec)


def test_09_convolution_with_other_activations():
    model, x = nn.Conv(8, (3, 3)), normal(0, 2, 9, 9, 16)
    params = model.init(jax.random.key(0), x)
    runs_on_codes(model.apply, params, x, spec="int4/int8_token", limit=0.02)


@pytest.mark.parametrize("spec", ["int8", "int4_g16", "int8/int8_token"])
def test_10_ragged_dot(spec):
    fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32))
    limit = 0.02 if "/" in spec else 1e-5
    runs_on_codes(fn, {"w": normal(0, 3, 64, 32)}, normal(1, 5, 64), spec=spec, limit=limit)


# --- 11 to 15: weights used in every way

USES = {
    "11: dot(w, x.T)": lambda w, x: jnp.dot(w, x.T),
    "11: einsum, weight first": lambda w, x: jnp.einsum("oi,bi->bo", w, x),
    "11: dot(x, w.T)": lambda w, x: jnp.dot(x, w.T),
    "12: tensordot": lambda w, x: jnp.tensordot(x, w, axes=((1,), (1,))),
    "12: split": lambda w, x: sum(x @ part.T for part in jnp.split(w, 2, axis=0)),
    "12: slice": lambda w, x: x @ w[4:20].T,
    "12: take": lambda w, x: jnp.take(w, jnp.arange(3), axis=0) @ x.T,
    "13: three operands": lambda w, x: jnp.einsum("bi,oi,o->bo", x, w, jnp.arange(48.0)),
}


@pytest.mark.parametrize("spec", ["int8", "int4_g16"])
@pytest.mark.parametrize("name", USES)
def test_11_to_13_uses(name, spec):
    fn = lambda p, x: USES[name](p["w"], x)
    runs_on_codes(fn, {"w": normal(0, 48, 64)}, normal(1, 5, 64), spec=spec)


@pytest.mark.parametrize("count", [2, 3])
def test_14_weights_of_one_shape_in_one_operation(count):
    fn = lambda p, x: x @ sum(p.values())
    params = {str(i): normal(i, 64, 32) for i in range(count)}
    q = {k: qjax.quantize(v, "int4_g16", 0) for k, v in params.items()}
    x = normal(9, 5, 64)
    assert relative_error(qjax.quantized(fn)(q, x), fn(dense(q), x)) < 1e-5
    opened = dequantized_uses(fn, q, x)
    assert {use.split(":")[0] for use in opened} == set(params)  # and explain says so, for each


def test_12_a_normalized_weight_is_opened_and_explain_says_so():
    fn = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"]))
    q, x = {"w": qjax.quantize(normal(0, 64, 32), "int8", 0)}, normal(1, 5, 64)
    assert relative_error(qjax.quantized(fn)(q, x), fn(dense(q), x)) < 1e-5
    assert dequantized_uses(fn, q, x)


def test_15_an_activation_of_a_weights_shape_is_no_weight():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(1.0), (5, 32))
            h = nn.relu(x)
            return jnp.dot(h, h.T) + w.sum()

    model, x = Model(), normal(0, 5, 32)
    params = model.init(jax.random.key(0), x)
    sites = qjax.find_sites(model.apply, params, x)
    assert sites == {}
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", "int8")), sites)
    np.testing.assert_array_equal(q["params"]["w"], params["params"]["w"])
    np.testing.assert_array_equal(qjax.quantized(model.apply)(q, x), model.apply(params, x))


# --- 16 to 20: formats


def test_16_groups_that_do_not_divide():
    fn = lambda p, x: x @ p["w"]
    runs_on_codes(fn, {"w": normal(0, 100, 32)}, normal(1, 5, 100), spec="int4_g32")


@pytest.mark.parametrize(("spec", "limit"), [("uint4", 0.2), ("uint8", 0.01)])
def test_17_unsigned_integers_keep_the_negative_half(spec, limit):
    w = normal(0, 64, 32)
    assert relative_error(qjax.dequantize(qjax.quantize(w, spec, 0)), w) < limit


def test_17_unknown_formats_list_the_known():
    with pytest.raises(ValueError, match=r"'int1'.*the formats are .*int8"):
        qjax.Spec.parse("int1")


# spec -> bits per weight: codes at their width, scales at theirs, nothing widened
NOMINAL_BITS = {
    "int2_g32": 2 + 16 / 32,
    "int3_g32": 3 + 16 / 32,
    "int4_g32": 4 + 16 / 32,
    "mxfp4": 4 + 8 / 32,
    "mxfp8": 8 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 / (1024 * 512),
    "uint6": 6 + 2 * 32 / 1024,
    "nf4_g64_dq": 4 + (8 + 2 * 32 / 256) / 64,
    "fp8_e4m3_128x128": 8 + 32 / 128**2,
    "q4_k": 4.5,
    "q6_k": 6.5625,
}


@pytest.mark.parametrize("spec", NOMINAL_BITS)
def test_18_what_is_held_has_the_nominal_size(spec):
    q = qjax.quantize(normal(0, 1024, 512), spec, 0)
    plan = jax.jit(qjax.dequantize).lower(q).compile().memory_analysis()
    held = 8 * plan.argument_size_in_bytes / q.size
    assert held == pytest.approx(NOMINAL_BITS[spec], rel=0.01)


@pytest.mark.parametrize("spec", ["nf4_asym", "fp8_e4m3_g32_asym"])
def test_19_asymmetric_codebooks_and_floats_say_what_they_are(spec):
    with pytest.raises(ValueError, match="_asym is for integer formats"):
        qjax.Spec.parse(spec)


def test_20_four_bit_activations_say_what_there_is():
    with pytest.raises(ValueError, match="int8_token"):
        qjax.Spec.parse("int4/int4_token")


# --- 25 to 30


def test_25_a_misspelt_rule():
    fn = lambda p, x: x @ p["kernel"]
    params, x = {"kernel": normal(0, 64, 32)}, normal(1, 5, 64)
    recipe = qjax.Recipe(qjax.Rule("kernal", "int8"), qjax.Rule(".*", None))
    with pytest.raises(ValueError, match=r"'kernal' matches no parameter \(close: kernel\)"):
        qjax.quantize_params(params, recipe, qjax.find_sites(fn, params, x))


def test_26_forward_mode():
    q, x = qjax.quantize(normal(0, 64, 32), "int8/int8_token", 0), normal(1, 5, 64)
    _, tangent = jax.jvp(lambda x: qjax.quantized(jnp.matmul)(x, q), (x,), (x,))
    assert relative_error(tangent, x @ qjax.dequantize(q)) < 1e-5


def test_27_fewer_groups_than_shards():
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q, x = {"w": qjax.quantize(normal(0, 32, 16), "int4_g16", 0)}, normal(1, 5, 32)
    specs = qjax.partition_specs(q, {"w": P("d", None)}, mesh)
    place = lambda s: NamedSharding(mesh, s)
    placed = jax.device_put(q, jax.tree.map(place, specs, is_leaf=lambda v: isinstance(v, P)))
    got = jax.jit(qjax.quantized(lambda p, x: x @ p["w"]))(placed, x)
    assert relative_error(got, x @ qjax.dequantize(q["w"])) < 1e-5


def test_28_plain_functions():
    def fn(params, x, *, scale, name):
        assert name == "head"
        (w, b), v = params
        return {name: scale * (jnp.tanh(x @ w + b) @ v["out"]), "name": name}

    params = ((normal(0, 64, 32), jnp.ones(32)), {"out": normal(1, 32, 8)})
    x, options = normal(2, 5, 64), {"scale": 2, "name": "head"}
    sites = qjax.find_sites(fn, params, x, **options)
    q = qjax.quantize_params(params, "int4_g16", sites)
    got = qjax.quantized(fn)(q, x, **options)
    assert got["name"] == "head"
    assert relative_error(got["head"], fn(dense(q), x, **options)["head"]) < 1e-5
    with pytest.raises(TypeError, match=r"QTensor\(int4.*qjax\.quantized"):
        fn(q, x, **options)


def test_28_equinox():
    model = eqx.nn.MLP(64, 8, 32, 2, key=jax.random.key(0))  # its activation is a leaf of the tree
    fn = lambda model, x: jax.vmap(model)(x)
    q = runs_on_codes(fn, model, normal(0, 5, 64), jit=eqx.filter_jit)
    assert qjax.is_qtensor(q.layers[0].weight)

    arrays, static = eqx.partition(model, eqx.is_array)
    runs_on_codes(lambda a, x: jax.vmap(eqx.combine(a, static))(x), arrays, normal(0, 5, 64))


def test_29_several_methods_and_pickling():
    class Model(nnx.Module):
        def __init__(this, rngs):
            this.a, this.b = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)

        def encode(this, x):
            return jnp.tanh(this.a(x))

        def decode(this, x):
            return this.b(x)

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    x = normal(0, 5, 32)
    encode = lambda s, x: nnx.merge(graph, s).encode(x)
    decode = lambda s, x: nnx.merge(graph, s).decode(x)
    q = runs_on_codes(lambda s, x: decode(s, encode(s, x)), state, x)
    for fn in (encode, decode):
        assert relative_error(qjax.quantized(fn)(q, x), fn(dense(q), x)) < 1e-5
    again = pickle.loads(pickle.dumps(jax.device_get(q)))
    assert jax.tree.structure(again) == jax.tree.structure(q)


def test_30_every_path_is_named():
    fn = lambda p, x: jnp.sort(p["a"] @ x) + p["b"].max()
    q = {"a": qjax.quantize(normal(0, 16, 64), "int8", 1)}
    q["b"] = qjax.quantize(normal(1, 16, 64), "int8", 1)
    hows = {u.path: u.how for u in qjax.explain(fn, q, normal(2, 64, 3)).uses}
    assert hows["a"] == "dot on codes, scale after"
    assert hows["b"] == "dequantized: reduce_max has no rule for it"


# One for each rule that chooses scales and each dtype that holds them.
SCALED = ["int8", "int4", "uint4", "uint2", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4", "dynamic8"]
SCALED += ["mxfp8", "mxfp4", "nvfp4", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k"]
SCALED += ["iq4_nl", "iq4_xs", "tq1_0"]


@pytest.mark.parametrize("name", few([*FORMATS], SCALED))
def test_31_small_weights_are_no_zeros(name):
    w = normal(0, 256, 64) * 16  # of standard deviation 1
    error = lambda w: float(
        jnp.linalg.norm(qjax.dequantize(qjax.quantize(w, name, 0)) - w) / jnp.linalg.norm(w)
    )
    whole = error(w)
    assert all(error(w * std) < 1.5 * whole for std in (0.02, 0.005, 0.002, 0.0005))
