"""prepare and unprepare: bits given back, the same numbers, and what is refused."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, dequantized_uses, relative_error, slow
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from pallas_kernels.frame import Device
from qjax import prepared_products
from qjax.formats import FORMATS
from qjax.io.folder import write_folder
from qjax.prepared import why_not

SPECS = ["int8", "int4_g32", "nf4_g32_dq", "q5_1", "int8/int8_token", "int4_g32/int8_token"]
SHAPES = {  # shape, contracted axes
    "matrix": ((512, 24), 0),
    "turned": ((24, 512), 1),
    "ragged": ((500, 21), 0),
    "layers": ((3, 512, 24), 1),
    "heads out": ((512, 3, 8), 0),
    "heads in": ((4, 128, 24), (0, 1)),
    "layers and heads in": ((2, 4, 64, 24), (1, 2)),
}
FEW = ("ragged", "layers")
ALL = ["int8", "int4", "int4_g128", "int4_g64", "uint4_g32", "nf4_g64", "nf4_g64_dq", "fp8_e4m3"]
ALL += [*(f for f in FORMATS if re.fullmatch(r"q\d_[01k]", f)), "uint8_g32", "uint6_g32"]


def weight(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(spec, shape, axis, **fields):
    if re.fullmatch(r"q\d_[01k]", spec):  # blocks of llama.cpp are whole
        run = 256 if spec.endswith("k") else 32
        if shape[axis if isinstance(axis, int) else axis[-1]] % run:
            return None
    return qjax.quantize(weight(shape), qjax.Spec.parse(spec)._replace(**fields), axis)


def site(shape, axis):
    contracted = axis if isinstance(axis, tuple) else (axis,)
    stacked = tuple(range(len(shape) - 2 - (len(contracted) - 1))) if shape[0] < 4 else ()
    free = tuple(a for a in range(len(shape)) if a not in (*contracted, *stacked))
    return (qjax.Site("w", "dot_general", 1, contracted, (), free, stacked, ""),)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        *((s, FEW) for s in ALL if s not in ("q2_k", "q5_k", "int4_g64", "nf4_g64")),  # like others
        *(slow(s, tuple(SHAPES)) for s in ALL),
    ],
)
def test_every_bit_comes_back(spec, names):
    prepared = 0
    for name in names:
        shape, axis = SHAPES[name]
        q = quantized(spec, shape, axis)
        if q is None:
            continue
        p = qjax.prepare({"w": q}, {"w": site(shape, axis)})["w"]
        if isinstance(p, qjax.QTensor):
            assert "run across layers" in why_not(q, site(shape, axis)), name
            continue
        p.check("w")
        assert p.shape == q.shape
        assert not {v.dtype.name for v in jax.tree.leaves(p)} & {"int4", "uint4", "uint2", "int2"}
        assert_same(qjax.unprepare({"w": p})["w"], q)
        np.testing.assert_array_equal(qjax.dequantize(p), qjax.dequantize(q))
        prepared += 1
    assert prepared >= (1 if names == FEW else 2)


def test_integer_zero_points_come_back():
    q = quantized("uint4_g32", (128, 24), 0, zero_dtype="uint4")
    assert q is not None
    assert q.zero_point is not None
    assert_same(qjax.unprepare(qjax.prepare(q)), q)


USES = {
    "x @ w": (lambda p, x: x @ p["w"], None),
    "turned": (lambda p, x: jnp.einsum("bsk,nk->bsn", x, p["w"].T), None),
    "weight first": (lambda p, x: jnp.einsum("kn,bsk->nbs", p["w"], x), None),
    "heads": (lambda p, x: jnp.einsum("bsk,khd->bshd", x, p["w"].reshape(128, 6, 8)), None),
    "bfloat16": (lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), None),
    "remat": (lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"], x), None),
    "vmap": (lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), 3),
    "scan": (lambda p, x: jax.lax.scan(lambda c, w: (c, c @ w), x, p["w"])[1], 3),
    "one layer": (lambda p, x: x @ p["w"][1], 3),
    "some layers": (lambda p, x: jnp.einsum("bsk,lkn->lbsn", x, p["w"][1:]), 3),
    "experts": (lambda p, x: jnp.einsum("bsk,bkn->bsn", x, p["w"]), 2),
}


TOKENS = ("x @ w", "turned", "bfloat16", "vmap", "scan", "experts")
USES_OF = {"int4_g32": tuple(USES), "int8/int8_token": TOKENS}  # other specs: in a scan


@pytest.mark.parametrize(
    ("spec", "use"),
    [
        (spec, use) if use in USES_OF.get(spec, ("scan",)) else slow(spec, use)
        for spec in SPECS
        for use in USES
    ],
)
def test_uses_run_on_the_kernel_with_the_numbers_of_the_dense_weight(spec, use):
    fn, layers = USES[use]
    shape = (128, 48) if layers is None else (layers, 128, 48)
    q = {"w": qjax.quantize(weight(shape), spec, len(shape) - 2)}
    p, x = qjax.prepare(q), weight((2, 5, 128), 1)
    got = jax.jit(qjax.quantized(fn))(p, x)
    exact = relative_error(got, fn(dense(q), x))
    bound = 0.03 if "token" in spec else 8e-3 if use == "bfloat16" else 2e-6
    assert exact < bound
    if "token" in spec:  # the same rounded activations, other sums
        assert relative_error(got, jax.jit(qjax.quantized(fn))(q, x)) < 5e-3
    hows = [u.how for u in qjax.explain(fn, p, x).uses]
    assert hows
    opened = ["quantized scales opened in the call" in how for how in hows]
    assert all("xla_cpu on" in how for how in hows)
    assert opened == [spec.endswith("_dq")] * len(hows)


@pytest.mark.parametrize("spec", ["int4_g32", "nf4_g32_dq", "int8", "q5_1"])
def test_lookups_dequantize_rows(spec):
    q = {"w": qjax.quantize(weight((40, 128)), spec, 1)}
    p, ids = qjax.prepare(q), jnp.asarray([[1, 39], [0, 7], [-1, 2]], jnp.int32)
    fn = lambda p, i: p["w"][i]
    np.testing.assert_array_equal(jax.jit(qjax.quantized(fn))(p, ids), fn(dense(q), ids))
    (use,) = qjax.explain(fn, p, ids).uses
    assert use.how.startswith("look up codes")
    beyond = lambda p: jnp.take(p["w"], jnp.asarray([3, 99]), axis=0)
    assert jnp.isnan(qjax.quantized(beyond)(p)[1]).all()


@pytest.mark.parametrize("spec", ["int8", "nf4_g32", "int8/int8_token"])
def test_gradients_reach_x_and_not_the_weight(spec):
    q = {"w": qjax.quantize(weight((128, 48)), spec, 0)}
    p, x = qjax.prepare(q), weight((3, 128), 1)
    loss = lambda p, x: jnp.sum(jnp.square(qjax.quantized(lambda p, x: x @ p["w"])(p, x)))
    mine, its = (jax.jit(jax.grad(loss, 1))(tree, x) for tree in (p, q))
    assert relative_error(mine, its) < 5e-3
    t = weight((3, 128), 2)
    tangent = jax.jit(lambda x, t: jax.jvp(functools.partial(loss, p), (x,), (t,))[1])(x, t)
    assert relative_error(tangent, jnp.vdot(mine, t)) < 1e-4


def test_a_prepared_weight_is_one_frozen_leaf():
    params = {"w": qjax.prepare(qjax.quantize(weight((128, 8)), "int4_g32", 0)), "b": jnp.ones(8)}
    trainable, frozen = qjax.partition(params)
    assert trainable["w"] is None
    assert qjax.is_qtensor(frozen["w"])
    assert qjax.combine(trainable, frozen)["w"] is params["w"]
    layers = qjax.unstack(qjax.stack([params, params]))
    assert_same(layers[1]["w"], params["w"])
    moved = jax.device_put(params, jax.devices()[3])
    assert_same(qjax.unprepare(moved)["w"], qjax.unprepare(params)["w"])


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(40, 64)
        x = embed(tokens)
        x = x + nn.Dense(64)(nn.gelu(nn.Dense(96)(x)))
        return embed.attend(x)


def test_a_model_with_a_tied_head():
    model, tokens = Tied(), jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    params = model.init(jax.random.key(0), tokens)
    sites = qjax.find_sites(model.apply, params, tokens)
    recipe = qjax.Recipe(qjax.Rule(".*", "int4_g32"))
    q = qjax.quantize_params(params, recipe, sites)
    p = qjax.prepare(q, sites, unsupported="raise")
    got = jax.jit(qjax.quantized(model.apply))(p, tokens)
    assert relative_error(got, model.apply(dense(q), tokens)) < 2e-6
    assert not dequantized_uses(model.apply, p, tokens)


# --- what is not prepared


KEPT = {
    "fp8_e4m3_128x128": (None, "its blocks run along several axes: give sites"),
    "int8_tensor": (None, "its blocks run along several axes: give sites"),
    "fp8_e4m3_64x64": (0, r"its blocks of \(64, 64\) run along other axes"),
    "int4_g33": (0, "groups of 33 codes do not fill bytes"),
}


@pytest.mark.parametrize("spec", KEPT)
def test_what_no_layout_takes_stays_and_is_listed(spec):
    contracted, message = KEPT[spec]
    q = {
        "w": qjax.quantize(weight((128, 128)), spec, 0),
        "v": qjax.quantize(weight((64, 8)), "int8", 0),
    }
    sites = None if contracted is None else {"w": site((128, 128), contracted)}
    p = qjax.prepare(q, sites)
    assert p["w"] is q["w"]
    (row,) = (r for r in qjax.report(p, sites=sites).rows if r.path == "w")
    assert re.match(f"not prepared: .*{message}", row.note)
    with pytest.raises(ValueError, match=f"w: .*{message}"):
        qjax.prepare(q, sites, unsupported="raise")


def test_a_convolution_is_not_prepared():
    fn = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME")
    q = {"w": qjax.quantize(weight((8, 4, 3)), "int8", 1)}
    sites = qjax.find_sites(fn, dense(q), jnp.ones((1, 4, 9)))
    assert isinstance(qjax.prepare(q, sites)["w"], qjax.QTensor)
    with pytest.raises(ValueError, match="the kernel of a convolution"):
        qjax.prepare(q, sites, unsupported="raise")


def test_wrong_options():
    with pytest.raises(ValueError, match="'keep' or 'raise', is 'skip'"):
        qjax.prepare({}, unsupported="skip")
    q = {"w": qjax.quantize(weight((64, 8)), "int4_g32", 0)}
    with pytest.raises(ValueError, match=r"layout 'rows' is none of nibbles, bytes"):
        qjax.prepare(q, layout="rows")
    with pytest.raises(ValueError, match="bytes: int4 codes are no whole bytes"):
        qjax.prepare(q, layout="bytes", unsupported="raise")


def test_a_use_that_it_was_not_prepared_for_is_flagged():
    p = {"w": qjax.prepare(qjax.quantize(weight((64, 64)), "int4_g32", 0))}
    fn = lambda p, x: x @ p["w"].T
    x = weight((2, 64), 1)
    assert relative_error(qjax.quantized(fn)(p, x), x @ qjax.dequantize(p["w"]).T) < 2e-6
    (use,) = qjax.explain(fn, p, x).uses
    assert use.how == "dequantized in the call: it was prepared for another contraction"


def test_files_want_it_unprepared(tmp_path):
    p = {"w": qjax.prepare(qjax.quantize(weight((64, 8)), "int4_g32", 0))}
    with pytest.raises(ValueError, match=r"w: Prepared\(int4.*unprepare it first"):
        write_folder(tmp_path / "out", p)
    with pytest.raises(ValueError, match=r"has no qvalue: qjax.unprepare it first"):
        _ = p["w"].qvalue


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (lambda v: v.astype(jnp.float16), "w: codes of a weight in layout 'nibbles' must be uint8"),
        (lambda v: v[:-1], r"w: (codes|scale) of a weight in layout 'nibbles' must be"),
    ],
)
def test_hurt_arrays_are_named(hurt, message):
    p = {"w": qjax.prepare(qjax.quantize(weight((64, 8)), "int4_g32", 0))}
    hurt = jax.tree.map(hurt, p)
    with pytest.raises(ValueError, match=message):
        qjax.quantized(lambda p: jnp.ones((1, 64)) @ p["w"])(hurt)


def test_it_does_not_pass_for_an_array():
    p = qjax.prepare(qjax.quantize(weight((64, 8)), "int4_g32", 0))
    with pytest.raises(TypeError, match=r"Prepared\(int4.*qjax.quantized\(fn\)"):
        jnp.sum(p)


@pytest.mark.parametrize("spec", ["int4_g32", "nf4_g64", "fp8_e4m3"])
def test_lookups_in_tiles_for_hopper_open_those_tiles_only(spec):
    device = Device("gpu", "NVIDIA H100 80GB HBM3")
    q = qjax.quantize(weight((40, 128)), spec, 1)
    p = qjax.prepare({"w": q}, device=device)["w"]
    ids = jnp.asarray([[1, 39], [0, 17]], jnp.int32)
    got = jax.jit(qjax.quantized(lambda w, i: w[i]))(p, ids)
    np.testing.assert_array_equal(got, qjax.dequantize(q)[ids])
    (use,) = qjax.explain(lambda w, i: w[i], p, ids).uses
    assert use.how == f"look up codes, dequantize rows, on {p.layout}"
    beyond = qjax.quantized(lambda w: jnp.take(w, jnp.asarray([3, 40, -41]), axis=0))(p)
    np.testing.assert_array_equal(jnp.isnan(beyond).all(1), [False, True, True])


HOPPER = {  # spec: layout
    "int4_g128": "hopper4",
    "q4_1": "hopper4",
    "nf4_g64": "hopper4",
    "q8_0": "hopper8",
    "fp8_e4m3": "hopper8",
}


def test_weights_for_hopper_and_back():
    device = Device("gpu", "NVIDIA H100 80GB HBM3")
    q = {spec: qjax.quantize(weight((256, 40)), spec, 0) for spec in HOPPER}
    p = qjax.prepare(q, device=device, unsupported="raise")
    assert {spec: v.layout for spec, v in p.items()} == HOPPER
    back = qjax.unprepare(p)
    for spec, wanted in q.items():
        assert_same(back[spec], wanted)
    floats = {"w": qjax.quantize(weight((256, 40)), "fp8_e4m3/fp8_e4m3_token", 0)}
    with pytest.raises(ValueError, match="hopper8: of quantized activations its kernels take int8"):
        qjax.prepare(floats, device=device, unsupported="raise")


# --- compiled programs


def test_a_scan_copies_no_slice():
    layers, k = 6, 256
    q = {"w": qjax.quantize(weight((layers, k, k)), "int4_g32", 1)}
    p = qjax.prepare(q)
    fn = qjax.quantized(lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0])
    compiled = jax.jit(fn).lower(p, jnp.ones((1, k))).compile()
    text = compiled.as_text()
    codes = re.findall(rf"= u8\[(?:1,)?{k},{k // 2}\]\S* (\S+)\(", text)
    assert "copy" not in codes
    stack = re.findall(rf"= u8\[{layers},{k},{k // 2}\]\S* (\S+)\(", text)
    assert set(stack) <= {"parameter", "get-tuple-element"}
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * k * k


@pytest.mark.parametrize("spec", ["int4_g32", "nf4_g32_dq", "q6_k", "int8/int8_token", "fp8_e4m3"])
def test_export_and_reload(spec):
    q = {"w": qjax.quantize(weight((256, 24)), spec, 0)}
    p, x = qjax.prepare(q), weight((3, 256), 1)
    leaves, tree = jax.tree.flatten(p)
    fn = qjax.quantized(lambda p, x: x @ p["w"])
    exported = jax.export.export(
        jax.jit(lambda leaves, x: fn(jax.tree.unflatten(tree, leaves), x))
    )(leaves, x)
    reloaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(reloaded.call(leaves, x), jax.jit(fn)(p, x))


# --- meshes

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def put(tree, specs, mesh):
    place = lambda s: NamedSharding(mesh, s)
    return jax.device_put(tree, jax.tree.map(place, specs, is_leaf=lambda v: isinstance(v, P)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("along", ["out", "in"])
@pytest.mark.parametrize("spec", ["int8", "int4_g16", "nf4_g16", "int8/int8_token"])
def test_sharded_weights_give_the_numbers_of_one_device(kind, along, spec):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(KINDS[kind],) * 2)
    q, x = {"w": qjax.quantize(weight((64, 32)), spec, 0)}, weight((8, 64), 1)
    p = qjax.prepare(q)
    where, x_spec = (P(None, "t"), P("d", None)) if along == "out" else (P("t"), P("d", "t"))

    def fn(p, x):
        if along == "out" or kind == "auto":
            return x @ p["w"]
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("d", None))

    alone = jax.jit(qjax.quantized(jnp.matmul))(x, q["w"])
    with jax.set_mesh(mesh):
        sharded = put(p, qjax.partition_specs(p, {"w": where}, mesh), mesh)
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        call = jax.jit(qjax.quantized(fn))
        got, text = call(sharded, x), call.lower(sharded, x).compile().as_text()
    assert relative_error(got, alone) < (1e-5 if "token" in spec else 2e-6)
    assert " all-gather" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map(kind):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(KINDS[kind],) * 2)
    q, x = {"w": qjax.quantize(weight((64, 32)), "int4_g16", 0)}, weight((8, 64), 1)
    one = lambda w, x: jax.lax.psum(x @ w, "t")

    def fn(p, x):
        specs = (P("t", None), P("d", "t"))
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("d", None))(p["w"], x)

    with jax.set_mesh(mesh):
        p = qjax.prepare(q)
        p = put(p, qjax.partition_specs(p, {"w": P("t", None)}, mesh), mesh)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P("d", "t")))
        got = jax.jit(qjax.quantized(fn))(p, x_sharded)
        assert not dequantized_uses(fn, p, x_sharded)
    assert relative_error(got, x @ qjax.dequantize(q["w"])) < 2e-6


def test_a_spec_that_cuts_a_group_is_refused():
    p = {"w": qjax.prepare(qjax.quantize(weight((64, 32)), "int4_g32", 0))}
    mesh = jax.sharding.AbstractMesh((4,), ("t",))
    with pytest.raises(ValueError, match=r"w: 4 shards cannot cut k = 64 .* a multiple of 32"):
        qjax.partition_specs(p, {"w": P("t", None)}, mesh)


def test_outlier_features_beside_a_prepared_weight() -> None:
    keys = jax.random.split(jax.random.key(5), 2)
    q = qjax.quantize(jax.random.normal(keys[0], (64, 24)), "int8/int8_token", axis=0)
    q = dataclasses.replace(q, activation=dataclasses.replace(q.activation, threshold=6.0))
    x = jax.random.normal(keys[1], (3, 64)).at[1, 7].set(90.0)
    run = jax.jit(qjax.quantized(lambda w, x: x @ w))
    fast = qjax.prepare({"w": q})["w"]
    assert isinstance(fast, qjax.Prepared)
    np.testing.assert_allclose(run(fast, x), run(q, x), rtol=1e-5, atol=1e-5)
    plain = dataclasses.replace(q, activation=dataclasses.replace(q.activation, threshold=None))
    exact = x @ qjax.dequantize(q)
    assert abs(run(fast, x) - exact).max() < abs(run(plain, x) - exact).max() / 3


# --- one launch, experts, refused cuts


class Layer(nn.Module):
    """Three products of one x, with what comes between them in a trace."""

    @nn.compact
    def __call__(self, x):
        q, k = nn.Dense(48, use_bias=False, name="q")(x), nn.Dense(16, name="k")(x)
        return jnp.concatenate([q.reshape(*q.shape[:-1], 48), k, x @ jnp.eye(64)], axis=-1)


def test_products_of_one_x_are_one_op_with_the_same_numbers():
    x = weight((2, 3, 64), 1)
    params = jax.jit(Layer().init)(jax.random.key(0), x)
    sites = qjax.find_sites(Layer().apply, params, x)
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*kernel", "int4_g32")), sites)
    p = qjax.prepare(q, sites)
    fn = qjax.quantized(Layer().apply)
    jaxpr = jax.make_jaxpr(fn)(p, x)
    calls = [e for e in jaxpr.eqns if e.params.get("name") == "_once"]  # of quantized_matmul.op
    assert [len(e.outvars) for e in calls] == [2]
    wanted = jax.jit(Layer().apply)(dense(q), x)
    assert relative_error(jax.jit(fn)(p, x), wanted) < 2e-6
    assert_same(qjax.unprepare(p), q)
    loss = lambda x, fn, tree: jnp.sum(jnp.square(fn(tree, x)))
    mine = jax.jit(jax.grad(lambda x: loss(x, fn, p)))(x)
    its = jax.jit(jax.grad(lambda x: loss(x, Layer().apply, dense(q))))(x)
    assert relative_error(mine, its) < 2e-6
    many = jax.jit(jax.vmap(lambda x: fn(p, x)))(x)
    assert relative_error(many, wanted) < 2e-6
    uses = qjax.explain(Layer().apply, p, x).uses
    assert [u.path for u in uses] == ["params/q/kernel", "params/k/kernel"]
    assert all(u.how == "xla_cpu on nibbles" for u in uses)  # no launch to share on a CPU


def test_explain_names_a_launch_that_weights_share(monkeypatch):
    monkeypatch.setattr(
        prepared_products, "joins", lambda problems: None
    )  # as on a device that has one
    p = {n: qjax.prepare(qjax.quantize(weight((64, 24)), "int4_g32", 0)) for n in "abc"}
    fn = lambda p, x: (x @ p["a"], x @ p["b"].T.T, (2 * x) @ p["c"])
    hows = {u.path: u.how for u in qjax.explain(fn, p, weight((3, 64))).uses}
    assert hows == {
        "a": "xla_cpu on nibbles, in one launch with b",
        "b": "xla_cpu on nibbles, in one launch with a",
        "c": "xla_cpu on nibbles",
    }


def test_joined_layers_scan_and_export():
    q = {n: qjax.quantize(weight((3, 64, 64), i), "int4_g32", 1) for i, n in enumerate("ab")}
    p, x = qjax.prepare(q), weight((2, 64), 1)
    body = lambda c, w: (jnp.tanh(c @ w["a"]) + c @ w["b"] / 8, None)
    fn = lambda p, x: jax.lax.scan(body, x, p)[0]
    leaves, tree = jax.tree.flatten(p)
    run = jax.jit(lambda leaves, x: qjax.quantized(fn)(jax.tree.unflatten(tree, leaves), x))
    assert relative_error(run(leaves, x), fn(dense(q), x)) < 1e-5
    reloaded = jax.export.deserialize(jax.export.export(run)(leaves, x).serialize())
    np.testing.assert_array_equal(reloaded.call(leaves, x), run(leaves, x))


def test_weights_that_differ_are_not_one_op():
    p = {
        "a": qjax.prepare(qjax.quantize(weight((64, 24)), "int4_g32", 0)),
        "b": qjax.prepare(qjax.quantize(weight((64, 24), 1), "int8", 0)),
    }
    fn = lambda p, x: (x @ p["a"], x @ p["b"], jnp.sin(x) @ p["a"])
    x = weight((3, 64), 2)
    got = jax.jit(qjax.quantized(fn))(p, x)
    for mine, its in zip(got, fn(dense(qjax.unprepare(p)), x), strict=True):
        assert relative_error(mine, its) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_joined_weights_are_cut_each_for_itself(kind):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(KINDS[kind],) * 2)
    q = {n: qjax.quantize(weight((64, s), s), "int4_g16", 0) for n, s in (("a", 32), ("b", 8))}
    x = weight((8, 64), 1)
    fn = qjax.quantized(lambda p, x: (x @ p["a"], x @ p["b"]))
    wanted = [x @ qjax.dequantize(v) for v in q.values()]
    with jax.set_mesh(mesh):
        p = qjax.prepare(q)
        where = {"a": P(None, "t"), "b": P(None, "t") if kind == "auto" else P()}
        p = put(p, qjax.partition_specs(p, where, mesh), mesh)
        x = jax.device_put(x, NamedSharding(mesh, P("d", None)))
        call = jax.jit(fn)
        got, text = call(p, x), call.lower(p, x).compile().as_text()
    for mine, its in zip(got, wanted, strict=True):
        assert relative_error(mine, its) < 2e-6
    assert " all-gather" not in text


@pytest.mark.parametrize("rows", [2, 7])
def test_experts_are_not_opened(rows):
    q = {"w": qjax.quantize(weight((3, 64, 24)), "int4_g32", 1)}
    sizes, x = jnp.asarray([1, 0, rows - 2], jnp.int32), weight((rows, 64), 1)
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes)
    p = qjax.prepare(q)
    (use,) = qjax.explain(fn, p, x).uses
    assert use.how == f"xla_cpu on nibbles, {'row by row' if rows < 3 else 'expert by expert'}"
    w = np.asarray(qjax.dequantize(q["w"]), np.float64)
    owner = np.repeat(np.arange(3), np.asarray(sizes))
    wanted = np.zeros((rows, 24))  # rows beyond the last group are zeros
    for row, e in enumerate(owner):
        wanted[row] = np.asarray(x[row], np.float64) @ w[e]
    run = qjax.quantized(fn)
    assert relative_error(jax.jit(run)(p, x), wanted) < 2e-6
    mine = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(run(p, x)))))(x)
    its = jax.grad(lambda x: jnp.sum(jnp.square(fn(dense(q), x))))(x)
    assert relative_error(mine, its) < 2e-6


@pytest.mark.parametrize("cut", ["x", "weight"])
def test_explicit_axes_that_cut_a_group_are_refused_while_tracing(cut):
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Explicit,))
    p, x = qjax.prepare(qjax.quantize(weight((64, 32)), "int4_g32", 0)), weight((2, 64), 1)
    fn = lambda p, x: jnp.einsum("bi,io->bo", x, p, out_sharding=P())
    with jax.set_mesh(mesh):
        place = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
        if cut == "x":
            x = place(x, P(None, "t"))
        else:
            codes = place(p.arrays["codes"], P(None, "t"))
            p = dataclasses.replace(p, arrays=p.arrays | {"codes": codes})
        with pytest.raises(ValueError, match=r"8 shards cannot cut k = 64 .* a multiple of 32"):
            jax.jit(qjax.quantized(fn)).trace(p, x)
