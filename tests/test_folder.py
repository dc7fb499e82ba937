"""Saved folders: every format comes back bit for bit, and a folder that lies is refused."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import qjax
from qjax import sizes
from qjax.formats import FORMATS
from qjax.io import folder, manifest, packing, safetensors
from qjax.qtensor import Activation, QTensor

SHAPE, BLOCK, SCALES = (6, 10), (4, 1), (2, 10)


def random_array(name: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    if name == "uint1":  # packed along the last axis, eight to a byte
        bits = rng.integers(0, 2, shape, np.uint8)
        return jnp.asarray(np.packbits(bits, axis=-1, bitorder="little"))
    dtype = np.dtype(jnp.dtype(name))
    if dtype in packing.BITS:
        raw = rng.integers(0, 1 << packing.BITS[dtype], shape, np.uint8)
    else:
        raw = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        raw = raw & 1 if dtype == np.bool_ else raw
    return jnp.asarray(raw.view(dtype).reshape(shape))


def random_scale(dtype: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_qtensor(name: str, seed: int = 0, **fields) -> QTensor:
    storage = FORMATS[name].storage
    names = (storage,) if isinstance(storage, str) else storage
    planes = tuple(random_array(plane, SHAPE, seed + i) for i, plane in enumerate(names))
    fields = {
        "scale": random_scale("float32", SCALES, seed + 9),
        "zero_point": None,
        "offset": None,
        "activation": None,
        "block": BLOCK,
        "dtype": jnp.dtype("bfloat16"),
    } | fields
    return QTensor(planes if isinstance(storage, tuple) else planes[0], format=name, **fields)


def scales_in(name: str) -> QTensor:
    """Scales of shape SCALES that are themselves quantized, in blocks of two rows."""
    q = random_qtensor(name, 3)
    cut = lambda a: a[: SCALES[0]]
    planes = tuple(map(cut, q.qvalue)) if isinstance(q.qvalue, tuple) else cut(q.qvalue)
    scale = random_scale("float16", (1, 10), 4)
    return QTensor(planes, scale, None, None, None, name, (2, 1), jnp.dtype("float32"))


def same(a, b) -> None:
    """Same structure, static fields, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def round_trip(tmp_path, params, **options):
    folder.write_folder(tmp_path / "saved", params, **options)
    found = folder.read_folder(tmp_path / "saved")
    same(params, found.params)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_round_trips(tmp_path, name):
    round_trip(tmp_path, {"params": {"w": random_qtensor(name)}})


@pytest.mark.parametrize("spec", ["mxfp4", "nvfp4", "q3_k", "iq4_xs"])
def test_scales_of_every_kind_round_trip(tmp_path, spec):
    """Powers of two, and scales under one float32 or under float16s."""
    w = np.random.default_rng(0).standard_normal((256, 12)).astype(np.float32)
    round_trip(tmp_path, {"params": {"w": qjax.quantize(w, spec, 0)}})


def test_every_field_of_a_qtensor_round_trips(tmp_path):
    spec = qjax.Spec.parse("int8/int8_token").activation
    params = {
        "activation": random_qtensor("int8", activation=Activation(spec)),
        "zero_point": random_qtensor("uint4", zero_point=random_array("uint4", SCALES, 1)),
        "offset": random_qtensor("uint4", offset=random_scale("float16", SCALES, 2)),
        "nested": random_qtensor("q4_k", scale=scales_in("uint6"), offset=scales_in("uint6")),
        "param_shape": random_qtensor("int8", param_shape=(2, 3, 10)),
        "tiles": random_qtensor("fp8_e4m3", block=(4, 5), scale=random_scale("float32", (2, 2), 1)),
    }
    round_trip(tmp_path, params)


def test_every_dtype_of_a_plain_array_round_trips(tmp_path):
    params = {
        name: random_array(name, SHAPE, 0)
        for name, dtype in manifest.DTYPES.items()
        if jax.dtypes.canonicalize_dtype(dtype) == dtype
    }
    assert len(params) > 15
    round_trip(tmp_path, params | {"scalar": jnp.float32(3), "empty": jnp.zeros((0, 3), jnp.int4)})


def test_trees_round_trip(tmp_path):
    x = jnp.arange(3)
    round_trip(tmp_path, {"layers": {0: {"w": x}, 10: {"w": x + 1}}, "state": {}, "a/b": x})
    shutil.rmtree(tmp_path / "saved")
    round_trip(tmp_path, x)
    shutil.rmtree(tmp_path / "saved")
    round_trip(tmp_path, {})


@pytest.mark.parametrize("spec", ["int8", "int4_g4", "uint4_g4", "nf4_g2_dq", "int8/int8_token"])
def test_what_quantize_makes_round_trips(tmp_path, spec):
    w = jax.random.normal(jax.random.key(0), (12, 6))
    round_trip(tmp_path, {"w": qjax.quantize(w, spec, axis=0)})


def test_metadata_and_files_come_back(tmp_path):
    found = round_trip(
        tmp_path,
        {"w": jnp.ones(2)},
        metadata={"name": "höher", "sizes": [1, 2]},
        files={"tokenizer.json": b"{}"},
    )
    assert found.metadata == {"name": "höher", "sizes": [1, 2]}
    assert {name: path.read_bytes() for name, path in found.files.items()} == {
        "tokenizer.json": b"{}"
    }


def test_shards_hold_what_the_device_holds_and_open_elsewhere(tmp_path):
    w = jax.random.normal(jax.random.key(0), (256, 64))
    params = {str(i): qjax.quantize(w, "int4_g32", axis=0) for i in range(4)} | {"f32": w}
    round_trip(tmp_path, params, shard_bytes=20_000)
    shards = sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors"))
    count = len(shards)
    assert count >= 3
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    safetensors_sizes = [
        array.nbytes
        for shard in shards
        for array in safetensors.read(tmp_path / "saved" / shard)[0].values()
    ]
    assert sum(safetensors_sizes) == sizes.nbytes(params)
    judged = load_file(tmp_path / "saved" / shards[0])["0.qvalue.0"]
    codes = np.asarray(params["0"].qvalue).astype(np.int8).astype(np.uint8).reshape(-1, 2)
    assert judged.dtype == np.uint8
    np.testing.assert_array_equal(judged, (codes[:, 0] & 15) | ((codes[:, 1] & 15) << 4))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"b": [jnp.ones(2)]}}, "a/b: holds a list"),
        ({"a": None}, "a: holds a NoneType"),
        ({"a": 1.5}, "a: holds a float"),
        ({"a": jax.random.key(0)}, "a: dtype key"),
        ({("a", "b"): jnp.ones(2)}, r"the key \('a', 'b'\)"),
        ({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, "a/b: two arrays"),
        (
            {"a": jax.tree.map(lambda x: x.astype(jnp.float32), random_qtensor("int8"))},
            "a: int8 holds its codes as int8",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        folder.write_folder(tmp_path / "saved", params)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch):
    folder.write_folder(tmp_path / "saved", {"w": jnp.ones(2)})

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors, "write", full)
    with pytest.raises(OSError, match="no space"):
        folder.write_folder(tmp_path / "saved", {"w": jnp.zeros(2)}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    same(folder.read_folder(tmp_path / "saved").params, {"w": jnp.ones(2)})


def test_a_killed_write_leaves_no_half_folder(tmp_path):
    program = (
        "import os, sys, jax.numpy as jnp\n"
        "from qjax.io import folder, safetensors\n"
        "write = safetensors.write\n"
        "def dying(*args):\n"
        "    write(*args)\n"
        "    os.kill(os.getpid(), 9)\n"
        "safetensors.write = dying\n"
        "folder.write_folder(sys.argv[1], {'w': jnp.ones(2)})\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "saved").exists()


def test_only_a_folder_of_our_own_is_overwritten(tmp_path):
    target = tmp_path / "saved"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"saved: (exists|is no folder that qjax wrote)"):
            folder.write_folder(target, {"w": jnp.ones(2)}, overwrite=overwrite)
    assert (target / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(target)
    folder.write_folder(target, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="exists; choose another path"):
        folder.write_folder(target, {"w": jnp.zeros(2)})
    folder.write_folder(target, {"w": jnp.zeros(3)}, overwrite=True)
    same(folder.read_folder(target).params, {"w": jnp.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", ["../out.txt", "qjax.json", "a/b", "..", ""])
def test_additional_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="additional file"):
        folder.write_folder(tmp_path / "saved", {"w": jnp.ones(2)}, files={name: b"x"})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    params = {
        "w": random_qtensor("q6_k", scale=scales_in("int8")),
        "b": jnp.ones(3, jnp.bfloat16),
        "a": random_qtensor("int8", activation=Activation(qjax.Spec.parse("int8"))),
    }
    folder.write_folder(tmp_path / "saved", params, files={"notes.txt": b"hello"})
    return tmp_path / "saved"


def at(data, *keys):
    for key in keys:
        data = data[key]
    return data


# What is changed in the manifest, to what, and the field that the error names.
LIES = {
    "another format": ((), "format", "zip", "format: must be 'qjax'"),
    "a newer version": ((), "version", 3, "version: is 3.*update qjax"),
    "a version that is true": ((), "version", True, "version: is True"),
    "shards are no list": ((), "shards", "x", "shards: must be a list"),
    "a shard out of the folder": ((), "shards", ["../model.safetensors"], "qjax.json shards"),
    "a shard by absolute path": ((), "shards", ["/etc/passwd"], "qjax.json shards"),
    "a missing shard": ((), "shards", ["nothing.safetensors"], "'nothing.safetensors' is missing"),
    "no shards": ((), "shards", [], "is in no shard"),
    "a shard twice": ((), "shards", ["a", "a"], "shards: names a file twice"),
    "a file out of the folder": ((), "files", ["../x"], "qjax.json files"),
    "a missing file": ((), "files", ["gone"], "'gone' is missing"),
    "metadata is a list": ((), "metadata", [], "metadata: must be an object"),
    "parameters are an object": ((), "parameters", {}, "parameters: must be a list"),
    "no parameters": ((), "parameters", [], "do not name the tensor"),
    "a path of floats": (("parameters", 0), "path", [1.5], r"parameters\[0\] path"),
    "no path": (("parameters", 0), "path", None, r"parameters\[0\] path"),
    "the path of another": (("parameters", 0), "path", ["b"], "b: appears twice"),
    "a path below another": (("parameters", 1), "path", ["w", "x"], "lies below another"),
    "an empty path": (("parameters", 0), "path", [], "path: is empty"),
    "an unknown format": (("parameters", 0), "qtensor", "int9", "w qtensor: is 'int9'"),
    "another format of planes": (("parameters", 0), "qtensor", "q5_k", "w: q5_k holds"),
    "a format of one plane": (("parameters", 0), "qtensor", "int4", "w qvalue: has 2 planes"),
    "a block of zero": (("parameters", 0), "block", [0, 1], "w block"),
    "a huge block": (("parameters", 0), "block", [1 << 62, 1], "w: scale has shape"),
    "a negative block": (("parameters", 0), "block", [-4, 1], "w block"),
    "an unknown dtype": (("parameters", 0), "dtype", "float31", "w dtype"),
    "an unknown field": (("parameters", 0), "colour", 1, "w colour: is unknown"),
    "a scale that is a number": (("parameters", 0), "scale", 1, "w scale"),
    "no scale": (("parameters", 0), "scale", None, "w scale"),
    "a scale format": (("parameters", 0, "scale"), "qtensor", "int4", "w.scale"),
    "another tensor": (("parameters", 1), "tensor", "w.qvalue.0", "b tensor: .* a second time"),
    "no tensor": (("parameters", 1), "tensor", "nothing", "b tensor: 'nothing' is in no shard"),
    "another shape": (("parameters", 1), "shape", [4], "b shape"),
    "a huge shape": (("parameters", 1), "shape", [1 << 62] * 32, "b shape"),
    "a huge packed shape": (
        ("parameters", 0, "qvalue", 0),
        "shape",
        [1 << 62, 1 << 62],
        "w.qvalue.0 shape",
    ),
    "a negative shape": (("parameters", 1), "shape", [-3], "b shape"),
    "another array dtype": (("parameters", 1), "dtype", "float16", "b shape"),
    "an activation format": (("parameters", 2, "activation"), "format", "x", "a activation format"),
    "an activation block": (("parameters", 2, "activation"), "block", 0, "a activation block"),
    "an activation method": (
        ("parameters", 2, "activation"),
        "scale_method",
        "guess",
        "a activation scale_method",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(saved, lie):
    keys, name, value, message = LIES[lie]
    path = saved / "qjax.json"
    data = json.loads(path.read_text())
    at(data, *keys)[name] = value
    path.write_text(json.dumps(data))
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        folder.read_folder(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize("key", ["version", "shards", "files", "parameters", "metadata"])
def test_every_field_of_the_manifest_is_needed(saved, key):
    path = saved / "qjax.json"
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"qjax.json: {key}: "):
        folder.read_folder(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is no manifest"),
        (b"\xff\xfe", "is no manifest"),
        (b"[" * 100_000, "is no manifest"),
        (b"[1]", "format"),
        (b'{"format": "qjax", "format": "qjax"}', "'format' appears twice"),
    ],
)
def test_a_broken_manifest_is_refused(saved, text, message):
    (saved / "qjax.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"qjax.json: .*{message}|qjax.json: {message}"):
        folder.read_folder(saved)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"qjax.json: is missing"):
        folder.read_folder(tmp_path)


def test_links_out_of_the_folder_are_refused(saved, tmp_path):
    shard = next(saved.glob("*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="link out of the folder"):
        folder.read_folder(saved)


def test_scales_nested_without_end_are_refused(saved):
    path = saved / "qjax.json"
    data = json.loads(path.read_text())
    node = data["parameters"][0]["scale"]
    for _ in range(50):
        node["scale"] = {**node, "qvalue": []}
        node = node["scale"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"qjax.json: w"):
        folder.read_folder(saved)


def test_a_truncated_shard_is_refused(saved):
    shard = next(saved.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=shard.name):
        folder.read_folder(saved)


def test_64_bits_without_x64_are_refused(tmp_path):
    folder.write_folder(tmp_path / "saved", {"w": np.zeros(2, np.int64)})
    with pytest.raises(ValueError, match=r"w: is int64; set .* jax_enable_x64"):
        folder.read_folder(tmp_path / "saved")


def test_float4_is_packed(tmp_path):
    w = np.arange(6).astype(ml_dtypes.float4_e2m1fn).reshape(2, 3)
    found = round_trip(tmp_path, {"w": jnp.asarray(w)})
    assert found.params["w"].dtype == jnp.float4_e2m1fn
