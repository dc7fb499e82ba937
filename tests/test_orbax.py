"""Orbax checkpoints: the same bits back, at nominal size, on any mesh; what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import slow
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.io import orbax
from qjax.io.ggml_types import CODECS, to_qtensor

BLOCKS = np.load(pathlib.Path(__file__).parent / "golden" / "ggml_random_blocks.npz")
SPECS = ["int8", "int4_g16", "uint4_g16", "nf4_g16_dq", "fp8_e4m3_16x8", "int8/int8_token"]
ODD = {"int4": (3, 5), "uint4": (7,), "int2": (3, 5), "uint2": (2, 3, 9), "float4_e2m1fn": (5,)}


def weight(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def some_tree():
    """Every kind of leaf: quantized, nested scales, planes, sub-byte arrays, and odd shapes."""
    quantized = {spec: qjax.quantize(weight(32, 24), spec, axis=0) for spec in SPECS}
    ggml = {
        name: to_qtensor(BLOCKS[f"{name}__bytes"], name, np.float32, transpose=True)
        for name in CODECS
    }
    codes = {
        dtype: jnp.asarray(np.arange(np.prod(shape)).reshape(shape) % 3, dtype)
        for dtype, shape in ODD.items()
    }
    plain = {
        "scalar": jnp.float32(3),
        "scalar code": jnp.asarray(-3, jnp.int4),
        "no rows": jnp.zeros((0, 3), jnp.bfloat16),
        "no codes": jnp.zeros((3, 0), jnp.uint4),
        "flags": jnp.asarray([True, False]),
        "host": np.arange(3, dtype=np.int32),
        "half": weight(3).astype(jnp.bfloat16),
    }
    return {"q": quantized, "ggml": ggml, "codes": codes, "plain": plain, "layers": {0: {}}}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_kind_of_leaf_comes_back(tmp_path):
    tree = some_tree()
    orbax.save(tmp_path / "a", tree)
    found = orbax.restore(tmp_path / "a")
    same(tree, found)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    found_abstract = orbax.abstract(tmp_path / "a")
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert jax.tree.leaves(found_abstract) == jax.tree.leaves(wanted)
    assert jax.tree.structure(found_abstract) == jax.tree.structure(tree)


@pytest.mark.parametrize(("spec", "bits"), [("int4_g64", 4.25), ("q4_k", 4.5), ("int8", 8.02)])
def test_a_checkpoint_has_the_nominal_size(spec, bits, tmp_path):
    q = qjax.quantize(weight(2048, 512), spec, axis=0)
    orbax.save(tmp_path / "a", {"w": q})
    size = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert size <= 2048 * 512 * bits / 8 * 1.01 + 20_000


def test_async_save_keeps_what_was_there_when_it_was_called(tmp_path):
    tree = {"w": qjax.quantize(weight(64, 32), "int4_g16", axis=0), "b": weight(32)}
    copy = jax.tree.map(jnp.array, tree)
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save(tmp_path / "a", args=orbax.save_args(tree))
    jax.tree.map(lambda x: x.delete(), tree)  # what donation does
    checkpointer.wait_until_finished()
    checkpointer.close()
    same(copy, orbax.restore(tmp_path / "a"))


def test_steps_of_a_manager(tmp_path):
    trees = {step: {"w": qjax.quantize(weight(64, 8, seed=step), "int8", 0)} for step in (1, 2)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step, tree in trees.items():
            other = ocp.args.JsonSave({"step": step})
            manager.save(step, args=ocp.args.Composite(params=orbax.save_args(tree), other=other))
        manager.wait_until_finished()
    for step, tree in trees.items():
        same(tree, orbax.restore(tmp_path / "run" / str(step) / "params"))


KINDS = (AxisType.Auto, AxisType.Explicit)


def mesh(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("a", "b"), axis_types=(kind, kind))


def placed(tree, dense_specs, on):
    specs = qjax.partition_specs(tree, dense_specs, on)
    is_spec = lambda v: isinstance(v, P)
    return jax.tree.map(lambda spec: NamedSharding(on, spec), specs, is_leaf=is_spec)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        *(("q5_k", AxisType.Auto), ("int4_g16", AxisType.Explicit)),
        *(slow("q5_k", AxisType.Explicit), slow("int4_g16", AxisType.Auto)),
        *(slow(spec, kind) for spec in ("int8", "nf4_g16_dq") for kind in KINDS),
    ],
)
def test_another_mesh(spec, kind, tmp_path):
    tree = {"up": weight(256, 64), "down": weight(256, 12)}
    tree = {name: qjax.quantize(w, spec, axis=0) for name, w in tree.items()}
    first, second = mesh((2, 4), kind), mesh((4, 2), kind)
    before = placed(tree, {"up": P("a", "b"), "down": P(None, "b")}, first)
    orbax.save(tmp_path / "a", jax.device_put(tree, before))
    # Twelve codes are six bytes: four shards of them cannot be read apart.
    after = placed(orbax.abstract(tmp_path / "a"), {"up": P("b", "a"), "down": P("b", "a")}, second)
    found = orbax.restore(tmp_path / "a", after)
    same(tree, found)
    for leaf, where in zip(jax.tree.leaves(found), jax.tree.leaves(after), strict=True):
        assert leaf.sharding == where
    same(tree, orbax.restore(tmp_path / "a"))


def test_shardings_may_be_one_or_a_prefix(tmp_path):
    tree = {"w": qjax.quantize(weight(64, 32), "int4_g16", axis=0), "b": weight(32)}
    orbax.save(tmp_path / "a", tree)
    one = SingleDeviceSharding(jax.devices()[3])
    found = orbax.restore(tmp_path / "a", one)
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {one}
    everywhere = NamedSharding(mesh((2, 4)), P())
    found = orbax.restore(tmp_path / "a", {"w": everywhere, "b": one})
    same(tree, found)
    assert found["w"].qvalue.sharding == found["w"].scale.sharding == everywhere
    with pytest.raises(ValueError, match="prefix"):
        orbax.restore(tmp_path / "a", {"w": one})


def test_a_restored_model_runs(tmp_path):
    q = {"w": qjax.quantize(weight(64, 32), "int4_g16", axis=0)}
    fn = jax.jit(qjax.quantized(lambda p, x: x @ p["w"]))
    orbax.save(tmp_path / "a", q)
    x = weight(4, 64, seed=1)
    np.testing.assert_array_equal(fn(orbax.restore(tmp_path / "a"), x), fn(q, x))


def changed(path, edit):
    """Saves a tree and edits the metadata of its checkpoint."""
    orbax.save(path, {"w": qjax.quantize(weight(64, 32), "int4_g16", axis=0)})
    file = path / "_METADATA"
    metadata = json.loads(file.read_text())
    edit(metadata["custom_metadata"])
    file.write_text(json.dumps(metadata))


def node(manifest):
    return manifest["parameters"][0]


BROKEN = {
    "version": (lambda m: m.update(version=3), "version: is 3, this version of qjax reads 2"),
    "bool version": (lambda m: m.update(version=True), "version: is True"),
    "format": (lambda m: m.update(format="x"), "format: must be 'qjax'"),
    "no parameters": (lambda m: m.pop("parameters"), "parameters: must be a list"),
    "block": (lambda m: node(m).update(block=[8, 1]), r"w: scale has shape \(4, 32\), needed"),
    "quantized as": (lambda m: node(m).update(qtensor="uint4"), "w: uint4 holds its codes as"),
    "unknown format": (lambda m: node(m).update(qtensor="int5x"), "w qtensor: is 'int5x'"),
    "shape": (
        lambda m: node(m)["qvalue"][0].update(shape=[64, 30]),
        r"held as uint8 \(64, 15\), but the tensor 'w.qvalue.0' is uint8 \(64, 16\)",
    ),
    "dtype": (lambda m: node(m)["scale"].update(dtype="float32"), "but the tensor 'w.scale' is bf"),
    "name": (lambda m: node(m)["scale"].update(tensor="v"), "w.scale tensor: 'v' is in no shard"),
    "left over": (lambda m: m.update(parameters=[]), "do not name the tensor 'w.qvalue.0'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_that_does_not_fit_is_refused(case, tmp_path):
    edit, message = BROKEN[case]
    changed(tmp_path / "a", edit)
    for read in (orbax.abstract, orbax.restore):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / "a")
        assert str(caught.value).startswith(str(tmp_path / "a"))


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        orbax.restore(tmp_path / "missing")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="format: must be 'qjax'"):
        orbax.restore(tmp_path / "a")


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a/1: holds a str"):
        orbax.save(tmp_path / "a", {"a": {1: "text"}})
    orbax.save(tmp_path / "a", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="exists"):
        orbax.save(tmp_path / "a", {"w": jnp.ones(3)})
