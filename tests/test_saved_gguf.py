"""GGUF files that qjax writes, against files of llama.cpp and gguf-py, and read back by gguf-py."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
import qjax.models
from qjax.activation import Activation
from qjax.io import gguf, gguf_writing
from qjax.io.ggml_types import GGML_TYPES
from qjax.models.saved_gguf import save_gguf
from qjax.spec import Spec

GOLDEN = pathlib.Path(__file__).parent / "golden"
LLAMA = GOLDEN / "tiny_llama_q4_k_m.gguf"
MODELS = (LLAMA, *(GOLDEN / f"tiny_experts_{name}.gguf" for name in ("mixtral", "qwen3moe")))
TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


def replaced(params, path, change):
    """The parameters with one of them changed."""
    one = lambda keys, leaf: change(leaf) if qjax.tracing.param_path(keys) == path else leaf
    return jax.tree_util.tree_map_with_path(one, params, is_leaf=qjax.is_qtensor)


def requantized(path, spec):
    """Parameters of a file, all that is multiplied quantized anew."""
    model, params, _ = qjax.models.load(path)
    dense = lambda leaf: qjax.dequantize(leaf) if qjax.is_qtensor(leaf) else leaf
    dense = jax.tree.map(dense, params, is_leaf=qjax.is_qtensor)
    sites = qjax.find_sites(model.apply, dense, jnp.zeros((1, 2), jnp.int32))
    return model, qjax.quantize_params(dense, spec, sites)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_what_was_loaded_gives_the_bytes_of_its_file(path, tmp_path):
    _, params, _ = qjax.models.load(path)
    save_gguf(tmp_path / "again.gguf", params, path)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def copied(source, path, metadata=None, kinds=None, **replacing):
    """A file with other keys or tensors."""
    file = gguf.read(source)
    tensors = {
        name: gguf_writing.Tensor(info.type, info.shape, lambda name=name: file.raw(name))
        for name, info in file.tensors.items()
    }
    keys, types = (file.metadata, file.kinds) if metadata is None else (metadata, kinds)
    gguf_writing.write(path, keys, types, tensors | replacing)
    return path


def test_every_kind_of_key_and_shape_is_written_as_gguf_py_does(tmp_path):
    source = GOLDEN / "gguf_kv_types.gguf"
    assert copied(source, tmp_path / "again.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("spec", ["q8_0", "q4_k", "q5_1", "iq4_nl", "mxfp4"])
def test_gguf_py_reads_what_the_weights_stand_for(spec, tmp_path):
    import gguf as peer

    _, qparams = requantized(LLAMA, spec)
    save_gguf(tmp_path / "new.gguf", qparams, LLAMA)
    reader = peer.GGUFReader(tmp_path / "new.gguf")
    kernel = qparams["params"]["layers_0"]["mlp"]["down"]["kernel"]
    assert kernel.format == spec
    found = {tensor.name: tensor for tensor in reader.tensors}
    down = found["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == spec.upper()
    np.testing.assert_array_equal(
        peer.dequantize(down.data, down.tensor_type), np.asarray(qjax.dequantize(kernel)).T
    )
    # llama's rows of q: those of a head in pairs
    q = np.asarray(qjax.dequantize(qparams["params"]["layers_0"]["attention"]["q"]["kernel"])).T
    heads = reader.fields["llama.attention.head_count"].contents()
    paired = q.reshape(heads, 2, -1, q.shape[1]).swapaxes(1, 2).reshape(q.shape)
    written = found["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(peer.dequantize(written.data, written.tensor_type), paired)
    assert reader.fields["general.quantization_version"].contents() == 2
    kept = {"general.architecture", "tokenizer.ggml.tokens", "llama.block_count"}
    for key in kept:
        assert reader.fields[key].contents() == peer.GGUFReader(LLAMA).fields[key].contents()


def test_a_written_model_is_the_model_that_was_quantized(tmp_path):
    model, qparams = requantized(LLAMA, "q4_k")
    save_gguf(tmp_path / "new.gguf", qparams, LLAMA)
    again, params, tokens = qjax.models.load(tmp_path / "new.gguf")
    assert again == model
    assert tokens.vocab_size == model.config.vocab_size
    ids = jnp.arange(24).reshape(2, 12)
    run = lambda p: jax.jit(qjax.quantized(model.apply))(p, ids)
    np.testing.assert_array_equal(run(params), run(qparams))


def test_what_metadata_say_of_types_follows_them(tmp_path):
    file = gguf.read(LLAMA)
    tell = ("general.file_type", "general.quantization_version")
    metadata = {key: value for key, value in file.metadata.items() if key not in tell}
    kinds = {key: file.kinds[key] for key in metadata}
    source = copied(LLAMA, tmp_path / "source.gguf", metadata, kinds)
    for spec, wanted in {"q8_0": 7, "q4_k": 15, "mxfp4": 38}.items():
        _, qparams = requantized(source, spec)
        save_gguf(tmp_path / f"{spec}.gguf", qparams, source)
        found = gguf.read(tmp_path / f"{spec}.gguf").metadata
        assert found.keys() == file.metadata.keys()
        assert [found[key] for key in tell] == [wanted, 2]
    # that of most matrices, however large one table is
    table = replaced(
        qparams, "params/embed/embedding", lambda q: jnp.zeros(q.shape) + jnp.float32(1 / 3)
    )
    save_gguf(tmp_path / "table.gguf", table, source)
    assert gguf.read(tmp_path / "table.gguf").metadata[tell[0]] == 38


def test_what_an_importance_matrix_made_is_said_of_no_other_bytes(tmp_path):
    file = gguf.read(LLAMA)
    said = {"quantize.imatrix.file": "wiki.dat", "quantize.imatrix.entries_count": 7}
    kinds = {"quantize.imatrix.file": "string", "quantize.imatrix.entries_count": "i32"}
    source = tmp_path / "source.gguf"
    copied(LLAMA, source, file.metadata | said, file.kinds | kinds)
    _, params, _ = qjax.models.load(source)
    save_gguf(tmp_path / "same.gguf", params, source)
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    other = lambda q: qjax.quantize(0.7 * qjax.dequantize(q), q.format, 0)
    again = replaced(params, "params/layers_0/mlp/up/kernel", other)  # the same types
    for name, changed in {"types": requantized(source, "q8_0")[1], "codes": again}.items():
        save_gguf(tmp_path / f"{name}.gguf", changed, source)
        left = gguf.read(tmp_path / f"{name}.gguf")
        assert left.metadata.keys() == left.kinds.keys() == file.metadata.keys()


def test_a_constant_of_the_file_stays(tmp_path):
    factors = np.linspace(1, 2, 32, dtype=np.float32)
    rope = gguf_writing.Tensor(TYPES["F32"], (32,), lambda: factors)
    source = copied(LLAMA, tmp_path / "source.gguf", **{"rope_freqs.weight": rope})
    _, params, _ = qjax.models.load(source)
    save_gguf(tmp_path / "again.gguf", params, source)
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("theirs", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("ours", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_float_is_written_into_what_holds_it(ours, theirs, tmp_path):
    dtype = gguf.DTYPES[theirs]
    name = "blk.0.ffn_up.weight"
    shape = gguf.read(LLAMA).tensors[name].shape
    plain = gguf_writing.Tensor(TYPES[theirs], shape, lambda: np.ones(shape, dtype))
    source = copied(LLAMA, tmp_path / "source.gguf", **{name: plain})
    _, params, _ = qjax.models.load(source)
    for value, same in ((1.5, True), (np.nan, True), (1 + 2.0**-9, None), (1e-30, None)):
        array = jnp.full(shape[::-1], value, ours)
        changed = replaced(params, "params/layers_0/mlp/up/kernel", lambda _, a=array: a)
        save_gguf(tmp_path / "new.gguf", changed, source, overwrite=True)
        written = gguf.read(tmp_path / "new.gguf")
        wide = np.asarray(array, np.float32).T
        np.testing.assert_array_equal(written.array(name).astype(np.float32), wide)
        if same:
            assert written.tensors[name].type.name == theirs


def test_arrays_keep_the_type_of_the_file_where_it_holds_them(tmp_path):
    _, params, _ = qjax.models.load(LLAMA)
    up = "params/layers_0/mlp/up/kernel"
    half = replaced(params, up, lambda q: qjax.dequantize(q).astype(jnp.float16))
    save_gguf(tmp_path / "half.gguf", half, LLAMA)  # the file has blocks there: the array's own
    name = "blk.0.ffn_up.weight"
    assert gguf.read(tmp_path / "half.gguf").tensors[name].type.name == "F16"
    _, wide, _ = qjax.models.load(tmp_path / "half.gguf")
    save_gguf(tmp_path / "again.gguf", wide, tmp_path / "half.gguf")
    same = (tmp_path / "again.gguf").read_bytes() == (tmp_path / "half.gguf").read_bytes()
    assert same, "float32 values that float16 holds stay float16"
    finer = replaced(wide, up, lambda w: w * 1.0001)
    save_gguf(tmp_path / "finer.gguf", finer, tmp_path / "half.gguf")
    file = gguf.read(tmp_path / "finer.gguf")
    assert file.tensors[name].type.name == "F32"
    wanted = np.asarray(finer["params"]["layers_0"]["mlp"]["up"]["kernel"]).T
    np.testing.assert_array_equal(file.array(name), wanted)
    brain = replaced(wide, up, lambda w: w.astype(jnp.bfloat16))
    save_gguf(tmp_path / "brain.gguf", brain, LLAMA)
    assert gguf.read(tmp_path / "brain.gguf").tensors[name].type.name == "BF16"


def refused(params, match, tmp_path, like=LLAMA):
    with pytest.raises(ValueError, match=match):
        save_gguf(tmp_path / "no.gguf", params, like)
    assert not list(tmp_path.iterdir())


UP = "params/layers_0/mlp/up/kernel"
ONE = lambda spec: lambda q: qjax.quantize(qjax.dequantize(q), spec, 0)
ACTIVE = lambda act: lambda q: dataclasses.replace(q, activation=act)
WIDE = lambda q: dataclasses.replace(ONE("q8_0")(q), scale=jnp.ones((8, 256), jnp.float32))
RESHAPED = lambda q: dataclasses.replace(
    qjax.quantize(qjax.dequantize(q).reshape(32, -1), "q8_0", 0), param_shape=(256, 256)
)


REFUSED = {
    "format": (ONE("int4_g128"), "GGUF has no type for the format int4; quantize to one of q4_0"),
    "input scale": (
        ACTIVE(Activation(None, axis=(-2,), input_scale=jnp.ones(256))),
        "models.fold",
    ),
    "activation": (ACTIVE(Activation(Spec.parse("int8"))), "replace.q, activation=None"),
    "dtype": (lambda q: qjax.dequantize(q).astype(jnp.int32), "has dtype int32, must be"),
    "shape": (lambda q: jnp.zeros((q.shape[0], 32)), r"shape \(32, 256\).*not of one model"),
    "scales": (WIDE, "Q8_0 blocks hold.*float16"),
    "held otherwise": (RESHAPED, "dequantize and quantize it"),
    "prepared": (qjax.prepare, "is prepared for a kernel; save what qjax.unprepare gives"),
    "number": (lambda _: 1.0, "is float, neither array nor QTensor"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_parameter_that_gguf_cannot_hold_is_named_and_nothing_is_left(why, tmp_path):
    change, match = REFUSED[why]
    _, params, _ = qjax.models.load(LLAMA)
    refused(replaced(params, UP, change), f"{UP}:? .*{match}", tmp_path)


def test_parameters_of_another_model_are_refused(tmp_path):
    _, params, _ = qjax.models.load(LLAMA)
    inner = params["params"]
    layer = inner["layers_0"]
    refused(
        {"params": {**inner, "layers": {"block": layer}}},
        "params/layers/block/.*unrolled decoder; unstack the layers, and call them layers_0",
        tmp_path,
    )
    refused({"params": {**inner, "adapter": jnp.ones(3)}}, "params/adapter: is no", tmp_path)
    less = {"params": {k: v for k, v in inner.items() if k != "norm"}}
    refused(less, "has 'output_norm.weight', which is not among the parameters", tmp_path)
    more = {"params": {**inner, "layers_1": layer}}
    refused(more, "params/layers_1/.*has no 'blk.1..*not of one model", tmp_path)
    refused(inner, "save_gguf takes .*, not .'embed'", tmp_path)
    refused({**params, "cache": {}}, "not .'cache', 'params'", tmp_path)
    refused(params, "params/.*not of one model", tmp_path, GOLDEN / "tiny_experts_mixtral.gguf")


def test_a_file_is_replaced_where_that_is_said_and_nothing_else(tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(LLAMA, path)
    _, qparams = requantized(path, "q8_0")
    with pytest.raises(ValueError, match=r"model.gguf: exists; .*overwritten"):
        save_gguf(path, qparams, path)
    assert path.read_bytes() == LLAMA.read_bytes()
    save_gguf(path, qparams, path, overwrite=True)
    assert gguf.read(path).metadata["general.file_type"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("link.gguf", "folder.gguf"):
        with pytest.raises(ValueError, match=f"{name}: exists"):
            save_gguf(tmp_path / name, qparams, path)
        with pytest.raises(ValueError, match=f"{name}: is no file, and is not overwritten"):
            save_gguf(tmp_path / name, qparams, path, overwrite=True)
    with pytest.raises(ValueError, match="there is no folder"):
        save_gguf(tmp_path / "none" / "x.gguf", qparams, path)


def test_a_failure_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")

    def fails():
        raise OSError("no space left")

    tensors = {
        "first": gguf_writing.Tensor(TYPES["F32"], (2,), lambda: np.ones(2, "<f4")),
        "second": gguf_writing.Tensor(TYPES["F32"], (2,), fails),
    }
    with pytest.raises(OSError, match="no space"):
        gguf_writing.write(path, {}, {}, tensors)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_floats_of_metadata_are_written_bit_for_bit(tmp_path):
    values = np.array([np.nan, np.inf, 1e-5, -0.0], np.float32)
    metadata = {"a": values, "b": float(np.float32(1e-5)), "c": [], "d": np.nan}
    kinds = {"a": "array[f32]", "b": "f32", "c": "array[string]", "d": "f64"}
    gguf_writing.write(tmp_path / "x.gguf", metadata, kinds, {})
    found = gguf.read(tmp_path / "x.gguf").metadata
    assert found["a"].tobytes() == values.tobytes()
    assert (found["b"], list(found["c"])) == (metadata["b"], [])
    assert np.isnan(found["d"])


@pytest.mark.parametrize(
    ("metadata", "kinds", "match"),
    [
        ({"a": 1}, {}, "key 'a': has no type"),
        ({"": 1}, {"": "u8"}, "key '': is empty"),
        ({"a": 300}, {"a": "u8"}, "key 'a': 300 is no u8"),
        ({"a": 0.5}, {"a": "u32"}, "key 'a': 0.5 is no u32"),
        ({"a": 1e39}, {"a": "f32"}, "key 'a': 1e.39 is no f32"),
        ({"a": "no"}, {"a": "bool"}, "True or False"),
        ({"a": [1]}, {"a": "array"}, "the type of its elements"),
        ({"a": [1]}, {"a": "array[array]"}, "the type of its elements"),
        ({"a": [1, 300]}, {"a": "array[u8]"}, "not all elements are u8"),
        ({"a": [0, 2]}, {"a": "array[bool]"}, "not all elements are bool"),
        ({"a": [2**64]}, {"a": "array[u64]"}, "key 'a'"),
        ({"a": [1, 2]}, {"a": "array[string]"}, "key 'a'"),
        ({"a": "x"}, {"a": "text"}, "GGUF has the types u8, "),
        ({"general.alignment": 3}, {"general.alignment": "u32"}, "must be a u32 power of two"),
        ({"general.alignment": 64}, {"general.alignment": "u64"}, "must be a u32 power of two"),
    ],
)
def test_keys_that_do_not_fit_their_type_are_refused(metadata, kinds, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        gguf_writing.write(tmp_path / "no.gguf", metadata, kinds, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "shape", "made", "match"),
    [
        ("n" * 64, "F32", (2,), 8, "1 to 63 bytes"),
        ("", "F32", (2,), 8, "1 to 63 bytes"),
        ("w", "F32", (1, 1, 1, 1, 2), 8, "1 to 4 axes"),
        ("w", "F32", (0,), 0, "none empty"),
        ("w", "F32", (-1, 2), 0, "none empty"),
        ("w", "Q8_0", (2, 33), 70, "rows of 33, Q8_0 needs a multiple of 32"),
        ("w", "Q8_0", (2, 32), 67, "67 bytes were made.*takes 68"),
    ],
)
def test_tensors_that_gguf_has_no_place_for_are_refused(name, kind, shape, made, match, tmp_path):
    tensor = gguf_writing.Tensor(TYPES[kind], shape, lambda: np.zeros(made, np.uint8))
    with pytest.raises(ValueError, match=match):
        gguf_writing.write(tmp_path / "no.gguf", {}, {}, {name: tensor})
    assert not list(tmp_path.iterdir())
