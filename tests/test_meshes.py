"""Meshes: Auto and Explicit axes, shard_map, constraints; the numbers of one device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantized_uses, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax

SPECS = ["int8", "int4_g16", "int4_g32", "uint4_g16", "nf4_g16_dq", "fp8_e4m3"]
SPECS += ["int3_g16", "fp6_e2m3_g16", "mxfp4", "nvfp4"]
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("d", "t"), axis_types=(KINDS[kind],) * 2)


def weights():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (64, 32)) / 8, jax.random.normal(keys[1], (8, 64))


def put(tree, specs, mesh):
    place = lambda s: NamedSharding(mesh, s)
    return jax.device_put(tree, jax.tree.map(place, specs, is_leaf=lambda v: isinstance(v, P)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("along", ["out", "in"])
def test_sharded_weights_give_the_numbers_of_one_device(kind, spec, along):
    w, x = weights()
    q = qjax.quantize(w, spec, 0)
    mesh = mesh_of(kind)
    dense, x_spec = (P(None, "t"), P("d", None)) if along == "out" else (P("t"), P("d", "t"))

    def fn(p, x):
        if along == "out" or kind == "auto":
            return x @ p["w"]
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("d", None))

    with jax.set_mesh(mesh):
        sharded = put({"w": q}, qjax.partition_specs({"w": q}, {"w": dense}, mesh), mesh)
        x_sharded = jax.device_put(x, NamedSharding(mesh, x_spec))
        got = jax.jit(qjax.quantized(fn))(sharded, x_sharded)
        assert not dequantized_uses(fn, sharded, x_sharded)
    assert relative_error(got, x @ qjax.dequantize(q)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["int4_g24", "nf4_g24_dq", "uint4_g40", "fp8_e4m3_24x8"])
def test_ragged_groups_along_and_across_sharded_axes(spec, kind):
    w, x = weights()
    q, mesh = qjax.quantize(w, spec, 0), mesh_of(kind)

    def fn(p, x):
        where = P(None, "d") if kind == "explicit" else None
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=where)

    with jax.set_mesh(mesh):
        sharded = put({"w": q}, qjax.partition_specs({"w": q}, {"w": P("t", "d")}, mesh), mesh)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P(None, "t")))
        got = jax.jit(qjax.quantized(fn))(sharded, x_sharded)
        assert not dequantized_uses(fn, sharded, x_sharded)
    assert relative_error(got, x @ qjax.dequantize(q)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_shard_map_is_entered_where_shards_hold_whole_blocks(kind, spec):
    w, x = weights()
    q, mesh = {"w": qjax.quantize(w, spec, 0)}, mesh_of(kind)
    one = lambda w, x: jax.lax.psum(x @ w, "t")

    def fn(p, x):
        specs = (P("t", None), P("d", "t"))
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("d", None))(p["w"], x)

    with jax.set_mesh(mesh):
        sharded = put(q, qjax.partition_specs(q, {"w": P("t", None)}, mesh), mesh)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P("d", "t")))
        got = jax.jit(qjax.quantized(fn))(sharded, x_sharded)
        opened = dequantized_uses(fn, sharded, x_sharded)
        w_sharded = jax.device_put(w, NamedSharding(mesh, P("t", None)))
        (site,) = qjax.find_sites(fn, {"w": w_sharded}, x_sharded)["w"]
    assert site.contract_axes == (0,)
    assert relative_error(got, x @ qjax.dequantize(q["w"])) < 2e-6
    cut = ["w: dequantized: a shard of the shard_map would cut its blocks"]
    assert opened == (cut if spec in ("int4_g32", "mxfp4") else [])


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_equal_on_one_device_and_many(kind):
    w, x = weights()
    q, mesh = qjax.quantize(w, "int8/int8_token", 0), mesh_of(kind)
    alone = jax.jit(qjax.quantized(jnp.matmul))(x, q)
    with jax.set_mesh(mesh):
        sharded = put({"w": q}, qjax.partition_specs({"w": q}, {"w": P(None, "t")}, mesh), mesh)
        x_sharded = jax.device_put(x, NamedSharding(mesh, P("d", None)))
        many = jax.jit(qjax.quantized(jnp.matmul))(x_sharded, sharded["w"])
    np.testing.assert_array_equal(alone, many)


@pytest.mark.parametrize("spec", SPECS)
def test_a_constraint_on_a_weight_stays_on_its_codes(spec):
    w, x = weights()
    q, mesh = qjax.quantize(w, spec, 0), mesh_of("auto")
    where = NamedSharding(mesh, P(None, "t"))
    fn = lambda w, x: x @ jax.lax.with_sharding_constraint(w, where)
    assert not dequantized_uses(fn, q, x)
    assert relative_error(jax.jit(qjax.quantized(fn))(q, x), x @ qjax.dequantize(q)) < 2e-6


# --- partition_specs


def test_scales_are_cut_only_between_blocks():
    mesh = jax.sharding.AbstractMesh((4,), ("t",))
    w = jnp.ones((64, 32))
    cases = {
        ("int4_g16", P("t", None)): P("t", None),  # one block to a shard
        ("int4_g32", P("t", None)): P(None, None),  # fewer blocks than shards
        ("int4_g24", P("t", None)): P(None, None),  # a block across two shards
        ("int8", P("t", None)): P(None, None),  # one scale for all of the axis
        ("int4_g32", P(None, "t")): P(None, "t"),
        ("fp8_e4m3_128x128", P(None, "t")): P(None, None),
        ("fp8_e4m3_16x8", P("t", None)): P("t", None),
    }
    for (spec, dense), wanted in cases.items():
        found = qjax.partition_specs(qjax.quantize(w, spec, 0), dense, mesh)
        assert found.qvalue == dense
        assert found.scale == wanted, (spec, dense)


def test_quantized_scales_follow_too():
    mesh = jax.sharding.AbstractMesh((4,), ("t",))
    q = qjax.quantize(jnp.ones((64, 1024)), "nf4_g16_dq", 0)
    found = qjax.partition_specs(q, P(None, "t"), mesh).scale
    assert found.qvalue == P(None, "t")
    assert found.scale == P(None, "t")  # four of the sixteen runs of 256 scales to a shard


def test_logically_partitioned_trees():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
            return nn.Dense(32, kernel_init=init)(x)

    model, x = Model(), jnp.ones((2, 64))
    params = model.init(jax.random.key(0), x)
    q = qjax.quantize_params(params, "int4_g16", qjax.find_sites(model.apply, params, x))
    dense = nn.logical_to_mesh(nn.get_partition_spec(q), [("embed", None), ("mlp", "t")])
    mesh = jax.sharding.AbstractMesh((4,), ("t",))
    kernel = qjax.partition_specs(q, dense, mesh)["params"]["Dense_0"]["kernel"]
    assert kernel.value.qvalue == kernel.value.scale == P(None, "t")


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (P("x"), "w: mesh axis 'x' is unknown; the mesh has t"),
        (P(None, None, "t"), "w: .* has 3 entries for 2 axes"),
        (P(None, "t"), r"w: axis 1 of shape \(64, 30\) is not divided by 4 shards"),
    ],
)
def test_specs_that_do_not_fit(dense, message):
    q = {"w": qjax.quantize(jnp.ones((64, 30)), "int8", 0)}
    with pytest.raises(ValueError, match=message):
        qjax.partition_specs(q, {"w": dense}, jax.sharding.AbstractMesh((4,), ("t",)))
