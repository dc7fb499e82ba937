"""Activation: coordinates, static and dynamic quantization, outliers; judged by float64 NumPy."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import dequantized_uses, relative_error, slow
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import activation
from qjax.activation import Activation
from qjax.io import folder

K, N = 48, 32  # rotations act on blocks of 16
KINDS = {
    "scaled": ("input_scale",),
    "permuted": ("permutation",),
    "rotated": ("signs",),
    "all": ("input_scale", "signs", "permutation"),
}
COMPOSED = ["scaled", "all"]
TOKEN = qjax.Spec("int8")
TENSOR = qjax.Spec("int8", ())


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def leaves(kind, k=K, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((*lead, k)), axis=-1)
    found = {
        "input_scale": jnp.asarray(np.exp(rng.normal(size=(*lead, k))), jnp.float32),
        "permutation": jnp.asarray(order, jnp.int32),
        "signs": jnp.asarray(rng.choice([-1, 1], (*lead, k)), jnp.int8),
    }
    return {n: found[n] for n in KINDS[kind]}


def matrix(act, index=()):
    """The [k, k] matrix M of w' = M w, in float64."""
    get = lambda n: None if getattr(act, n) is None else np.asarray(getattr(act, n)[index])
    k = next(v for n in activation.COORDINATES if (v := get(n)) is not None).shape[-1]
    m = np.eye(k)
    if (s := get("input_scale")) is not None:
        m = np.diag(s.astype(np.float64))
    if (signs := get("signs")) is not None:
        block = k & -k
        h = np.kron(np.eye(k // block), scipy.linalg.hadamard(block) / np.sqrt(block))
        m = h @ np.diag(signs.astype(np.float64)) @ m
    return m if (p := get("permutation")) is None else m[p]


def held(w, kind, spec="int8", axis=(-2,), lead=0):
    """A QTensor of w in other coordinates."""
    k = int(np.prod([w.shape[a] for a in axis]))
    act = Activation(axis=axis, **leaves(kind, k, w.shape[:lead]))
    q = qjax.quantize(
        activation.to_storage(act, w), spec, [a + w.ndim for a in axis], batch_axis=range(lead)
    )
    return dataclasses.replace(q, activation=act)


def stored(q):
    """The array of the codes, in the coordinates in which they are held."""
    return np.asarray(qjax.dequantize(dataclasses.replace(q, activation=None)), np.float64)


def in_coordinates(fn, *args, limit=1e-5):
    """Runs fn on quantized weights, asserts that none is opened, and the numbers."""
    hows = [u.how for u in qjax.explain(fn, *args).uses]
    assert hows
    assert all("x in the weight's coordinates" in how for how in hows), hows
    got = jax.jit(qjax.quantized(fn))(*args)
    wanted = fn(*(qjax.dequantize(a) if qjax.is_qtensor(a) else a for a in args))
    assert relative_error(got, wanted) < limit


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (kind, spec) if kind == "all" or spec == "int8" else slow(kind, spec)
        for kind in KINDS
        for spec in ("int8", "int4_g16", "nf4_g16_dq", "uint4_g16")
    ],
)
def test_dequantize_returns_to_the_models_coordinates(kind, spec):
    w = normal(0, K, N)
    q = held(w, kind, spec)
    wanted = np.linalg.solve(matrix(q.activation), stored(q))
    np.testing.assert_allclose(qjax.dequantize(q), wanted, rtol=1e-4, atol=1e-5)
    codes = activation.to_storage(q.activation, w)
    np.testing.assert_allclose(codes, matrix(q.activation) @ np.asarray(w), rtol=1e-4, atol=1e-5)
    in_coordinates(jnp.matmul, normal(1, 5, K), q)


@pytest.mark.parametrize("k", [1, 16, 48, 7])
def test_hadamard_is_sylvesters_in_blocks(k):
    x, block = normal(0, 3, k), k & -k
    h = np.kron(np.eye(k // block), scipy.linalg.hadamard(block) / np.sqrt(block))
    np.testing.assert_allclose(activation.hadamard(x), np.asarray(x) @ h, rtol=1e-5, atol=1e-6)
    again = activation.hadamard(activation.hadamard(x))
    np.testing.assert_allclose(again, x, rtol=1e-5, atol=1e-6)


# --- composed with what models do


@pytest.mark.parametrize("kind", COMPOSED)
def test_two_contracted_axes(kind):
    w = normal(0, 3, 16, N)
    q = held(w, kind, axis=(-3, -2))
    in_coordinates(functools.partial(jnp.einsum, "bthd,hdk->btk"), normal(1, 2, 4, 3, 16), q)
    swapped = lambda x, w: jnp.einsum("btdh,hdk->btk", x, w)
    in_coordinates(swapped, normal(1, 2, 4, 16, 3), q)
    merged = lambda x, w: x @ w.reshape(48, N)
    in_coordinates(merged, normal(1, 2, K), q)


@pytest.mark.parametrize("kind", COMPOSED)
def test_transpose_gather_and_elementwise_use(kind):
    table = held(normal(0, N, K), kind, axis=(-1,))
    ids = jnp.array([3, 0, 31])
    in_coordinates(lambda x, t: x @ t.T, normal(1, 5, K), table)
    in_coordinates(lambda x, t: jnp.einsum("vk,bk->vb", t, x), normal(1, 5, K), table)
    rows = lambda t: t[ids]
    assert not dequantized_uses(rows, table)
    got = qjax.quantized(rows)(table)
    np.testing.assert_allclose(got, qjax.dequantize(table)[ids], rtol=1e-5, atol=1e-6)
    tied = lambda t, ids: t[ids] @ t.T
    assert not dequantized_uses(tied, table, ids)
    assert (
        relative_error(qjax.quantized(tied)(table, ids), tied(qjax.dequantize(table), ids)) < 1e-5
    )
    wide = lambda t: jnp.tanh(t) * 2.0 + t[:1]
    assert relative_error(qjax.quantized(wide)(table), wide(qjax.dequantize(table))) < 1e-5


@pytest.mark.parametrize("kind", COMPOSED)
def test_pieces_along_the_output_keep_it_and_pieces_along_the_features_open_it(kind):
    x, q = normal(1, 5, K), held(normal(0, K, N), kind)
    in_coordinates(lambda x, w: jnp.concatenate([x @ p for p in jnp.split(w, 2, 1)], 1), x, q)
    for fn in (
        lambda x, w: x[:, :16] @ w[:16],
        lambda x, w: x @ jnp.concatenate([w, w], 1),
        lambda x, w: x.reshape(5, 3, 16) @ w.reshape(3, 16, N)[0],
    ):
        assert dequantized_uses(fn, x, q)
        assert relative_error(qjax.quantized(fn)(x, q), fn(x, qjax.dequantize(q))) < 1e-5


@pytest.mark.parametrize(
    ("kind", "lead"), [("scaled", 0), ("all", 1), slow("scaled", 1), slow("all", 0)]
)
def test_experts(kind, lead):
    w = normal(0, 3, K, N)
    q = held(w, kind, "int4_g16", lead=lead)
    experts = jnp.array([2, 0, 4], jnp.int32)
    in_coordinates(functools.partial(jnp.einsum, "etk,ekn->etn"), normal(1, 3, 5, K), q)
    in_coordinates(lambda x, w: lax.ragged_dot(x, w, experts), normal(1, 6, K), q)
    in_coordinates(lambda x, w: x @ w[1], normal(1, 6, K), q)
    some = lambda x, w, i: jnp.einsum("tk,tkn->tn", x, w[i])
    x, i = normal(1, 2, K), jnp.array([2, 0])
    assert relative_error(qjax.quantized(some)(x, q, i), some(x, qjax.dequantize(q), i)) < 1e-5


@pytest.mark.parametrize("lead", [0, 1])
def test_layers(lead):
    q = held(normal(0, 3, K, K) / 8, "all", lead=lead)
    x = normal(1, 5, K)
    scan = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    in_coordinates(scan, x, q)
    loop = lambda x, w: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)
    in_coordinates(loop, x, q)
    if lead:
        got = jax.jit(jax.vmap(qjax.quantized(jnp.matmul), (None, 0)))(x, q)
        assert relative_error(got, jnp.einsum("bk,ekn->ebn", x, qjax.dequantize(q))) < 1e-5
        layers = qjax.unstack({"w": q})
        np.testing.assert_allclose(
            qjax.dequantize(layers[1]["w"]), qjax.dequantize(q)[1], rtol=1e-5, atol=1e-6
        )
        again = qjax.stack(layers)["w"]
        np.testing.assert_array_equal(qjax.dequantize(again), qjax.dequantize(q))


@pytest.mark.parametrize("kind", COMPOSED)
def test_convolution_channels(kind):
    w = normal(0, 3, 3, K, N)
    q = held(w, kind, axis=(-2,))
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    in_coordinates(conv, normal(1, 2, 6, 6, K), q)


@pytest.mark.parametrize("spec", [None, TOKEN])
@pytest.mark.parametrize("kind", COMPOSED)
def test_gradients_are_those_of_the_dense_weight(kind, spec):
    q, x = held(normal(0, K, N), kind, "int4_g16" if spec is None else "int8"), normal(1, 5, K)
    q = dataclasses.replace(q, activation=dataclasses.replace(q.activation, spec=spec))
    weights = normal(2, 5, N)
    loss = lambda x: jnp.sum(qjax.quantized(jnp.matmul)(x, q) * weights)
    wanted = weights @ qjax.dequantize(q).T
    assert relative_error(jax.jit(jax.grad(loss))(x), wanted) < 1e-5
    _, tangent = jax.jvp(
        lambda x: qjax.quantized(jnp.matmul)(x, q), (x,), (weights @ normal(3, N, K),)
    )
    assert relative_error(tangent, weights @ normal(3, N, K) @ qjax.dequantize(q)) < 1e-5


# --- x quantized


def with_activation(q, **fields):
    return dataclasses.replace(q, activation=Activation(**fields))


def test_a_static_scale():
    w, x = normal(0, K, N), normal(1, 5, K).at[0, 0].set(50.0)
    q = with_activation(qjax.quantize(w, "int8", 0), spec=TENSOR, scale=jnp.float32(0.03))
    codes = np.clip(np.round(np.asarray(x) / np.float32(0.03)), -128, 127).astype(np.int64)
    sums = codes @ np.asarray(q.qvalue, np.int64)
    wanted = sums * np.asarray(q.scale, np.float64) * np.float32(0.03)
    np.testing.assert_allclose(qjax.quantized(jnp.matmul)(x, q), wanted, rtol=1e-6)
    (use,) = qjax.explain(jnp.matmul, x, q).uses
    assert use.how == "int8_static dot, scales after"
    lost = qjax.quantized(jnp.matmul)(x.at[1, 3].set(jnp.nan), q)
    np.testing.assert_array_equal(np.isnan(lost).all(1), np.arange(5) == 1)


def test_one_scale_for_the_whole_input():
    w, x = normal(0, K, N), normal(1, 5, K)
    q = with_activation(qjax.quantize(w, "int8", 0), spec=TENSOR)
    scale = np.abs(np.asarray(x)).max() / 127
    codes = np.round(np.asarray(x, np.float64) / scale)
    wanted = codes * scale @ stored(q)
    assert relative_error(qjax.quantized(jnp.matmul)(x, q), wanted) < 1e-6


@pytest.mark.parametrize("ragged", [False, True])
def test_static_scales_of_experts(ragged):
    scales = jnp.array([0.02, 0.03, 0.05])
    q = with_activation(
        qjax.quantize(normal(0, 3, K, N), "int8", 1, batch_axis=0), spec=TENSOR, scale=scales
    )
    x = normal(1, 3, 2, K)
    rounded = np.round(np.asarray(x) / np.asarray(scales)[:, None, None])
    wanted = rounded.clip(-128, 127) * np.asarray(scales, np.float64)[:, None, None] @ stored(q)
    if ragged:
        fn = lambda x, w: lax.ragged_dot(x.reshape(6, K), w, jnp.array([2, 2, 2], jnp.int32))
        wanted = wanted.reshape(6, N)
    else:
        fn = functools.partial(jnp.einsum, "etk,ekn->etn")
    assert not dequantized_uses(fn, x, q)
    assert relative_error(qjax.quantized(fn)(x, q), wanted) < 1e-6


@pytest.mark.parametrize("batched", [False, True])
def test_outlier_features_are_multiplied_apart(batched):
    x = normal(1, 2, 5, K).at[0, 2, 7].set(40.0).at[1, 3, 11].set(-30.0)
    w = normal(0, 2, K, N)
    x, w = (x, w) if batched else (x[:1], w[:1])
    q = with_activation(qjax.quantize(w, "int8", 1, batch_axis=0), spec=TOKEN, threshold=6.0)
    exact, stored_w = np.asarray(x, np.float64), stored(q)
    outlier = np.abs(exact).max(axis=1, keepdims=True) >= 6.0
    inside = np.where(outlier, 0, exact)
    scale = np.abs(inside).max(axis=2, keepdims=True) / 127
    wanted = np.round(inside / scale) * scale @ stored_w + np.where(outlier, exact, 0) @ stored_w
    fn = functools.partial(jnp.einsum, "etk,ekn->etn")
    got = qjax.quantized(fn)(x, q)
    assert relative_error(got, wanted) < 1e-5
    without = dataclasses.replace(q, activation=Activation(TOKEN))
    truth = exact @ stored_w
    assert relative_error(got, truth) * 3 < relative_error(qjax.quantized(fn)(x, without), truth)
    (use,) = qjax.explain(fn, x, q).uses
    assert use.how == "int8_token dot, scales after, outliers from 6 apart"


@pytest.mark.parametrize("activation_spec", ["int8_token", "fp8_e4m3_token"])
@pytest.mark.parametrize(
    "spec", "int8 int8_asym uint8_g16 uint4 nf4_g16_dq fp8_e4m3 fp8_e5m2_g16 q5_1 q8_0".split()
)
def test_any_weight_beside_quantized_activations(spec, activation_spec):
    q = qjax.quantize(normal(0, 64, N), f"{spec}/{activation_spec}", 0)
    x = normal(1, 5, 64)
    kind = FLOATS[activation_spec]
    top = float(jnp.iinfo(kind).max if kind == jnp.int8 else jnp.finfo(kind).max)
    scale = np.abs(np.asarray(x)).max(axis=1, keepdims=True) / np.float32(top)
    codes = jnp.asarray(np.asarray(x) / scale)
    rounded = np.asarray((jnp.round(codes) if kind == jnp.int8 else codes).astype(kind), np.float64)
    wanted = rounded * scale @ stored(q)
    assert relative_error(qjax.quantized(jnp.matmul)(x, q), wanted) < 1e-3


FLOATS = {"int8_token": jnp.int8, "fp8_e4m3_token": jnp.float8_e4m3fn}

# --- meshes, files, errors


def test_leaves_follow_onto_a_mesh():
    mesh = jax.make_mesh((2, 4), ("e", "t"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    q = held(normal(0, 2, K, N), "all", "int4_g16", lead=1)
    fn = functools.partial(jnp.einsum, "etk,ekn->etn")
    x = normal(1, 2, 5, K)
    for dense in (P("e", None, "t"), P("e", "t", None)):
        specs = qjax.partition_specs(q, dense, mesh)
        assert specs.activation.input_scale == P("e", None)
        place = jax.tree.map(
            lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: type(s) is P
        )
        got = jax.jit(qjax.quantized(fn))(x, jax.device_put(q, place))
        assert relative_error(got, fn(x, qjax.dequantize(q))) < 1e-5


@pytest.mark.parametrize("layout", [P("t", None), P(None, "t")])
@pytest.mark.parametrize("kind", KINDS)
def test_explicit_axes(kind, layout):
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Explicit,))
    q, x = held(normal(0, K, N), kind), normal(1, 5, K)
    along = layout[0] == "t"
    out = P() if along else P(None, "t")
    fn = lambda x, w: jnp.einsum("bk,kn->bn", x, w, out_sharding=out)
    with jax.set_mesh(mesh):
        specs = qjax.partition_specs(q, layout, mesh)
        place = jax.tree.map(
            lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: type(s) is P
        )
        sharded = jax.device_put(q, place)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P(None, "t") if along else P()))
        got = jax.jit(qjax.quantized(fn))(x_sharded, sharded)
        opened = jax.jit(qjax.dequantize)(sharded)
    assert opened.sharding.spec == layout
    assert relative_error(got, x @ qjax.dequantize(q)) < 1e-5


@pytest.mark.parametrize("shards", [P("t", None), P(None, "t")])
def test_shard_map(shards):
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    q, x = held(normal(0, K, N), "all"), normal(1, 5, K)
    along = shards[0] == "t"
    one = lambda x, w: lax.psum(x @ w, "t") if along else x @ w
    specs = (P(None, "t") if along else P(), shards)
    out = P() if along else P(None, "t")
    fn = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=out)
    assert bool(dequantized_uses(fn, x, q)) == along
    assert relative_error(jax.jit(qjax.quantized(fn))(x, q), x @ qjax.dequantize(q)) < 1e-5


def test_saved_and_loaded(tmp_path):
    q = held(normal(0, 2, K, N), "all", "int4_g16", lead=1)
    act = dataclasses.replace(q.activation, spec=TENSOR, threshold=6.0, scale=jnp.ones(2))
    tree = {"w": dataclasses.replace(q, activation=act)}
    folder.write_folder(tmp_path / "q", tree)
    again = folder.read_folder(tmp_path / "q").params
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_exported_and_read_again():
    q, x = held(normal(0, K, N), "all", "int4_g16"), normal(1, 5, K)
    act = dataclasses.replace(q.activation, spec=TENSOR, threshold=6.0, scale=jnp.float32(0.03))
    q, fn = dataclasses.replace(q, activation=act), jax.jit(qjax.quantized(jnp.matmul))
    data = jax.export.export(fn)(x, q).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x, q), fn(x, q))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            Activation(axis=(-2,), input_scale=jnp.ones(5)),
            r"input_scale .* shape \(48,\), got float",
        ),
        (Activation(axis=(-2,), permutation=jnp.ones(48)), "permutation must be an integer array"),
        (Activation(input_scale=jnp.ones(48)), "input_scale needs the axis"),
        (Activation(axis=(0,), signs=jnp.ones(48)), r"rising axes from -2 to -1, got \(0,\)"),
        (Activation(TOKEN, scale=jnp.float32(1)), r"needs a spec with block=\(\)"),
        (Activation(threshold=6.0), "positive float beside a spec"),
        (Activation("int8"), "must be None or a Spec"),
        ("int8", "must be an Activation or None, got str"),
    ],
)
def test_what_cannot_be(act, message):
    q = dataclasses.replace(qjax.quantize(normal(0, K, N), "int8", 0), activation=act)
    with pytest.raises(ValueError, match=rf"^w: activation.*{message}"):
        qjax.quantized(lambda p, x: x @ p["w"])({"w": q}, normal(1, 5, K))
