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
from qjax.io import gguf, gguf_writing
from qjax.io.ggml_types import GGML_TYPES
from qjax.models.saved_gguf import FORMATS, save_gguf

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


def test_every_kind_of_key_and_shape_is_written_as_gguf_py_does(tmp_path):
    file = gguf.read(GOLDEN / "gguf_kv_types.gguf")
    tensors = {
        name: gguf_writing.Tensor(info.type, info.shape, lambda name=name: file.raw(name))
        for name, info in file.tensors.items()
    }
    gguf_writing.write(tmp_path / "again.gguf", file.metadata, file.kinds, tensors)
    assert (tmp_path / "again.gguf").read_bytes() == pathlib.Path(file.path).read_bytes()


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


def test_the_file_type_is_that_of_most_weights(tmp_path):
    for spec, wanted in {"q8_0": 7, "q4_k": 15, "mxfp4": 38}.items():
        _, qparams = requantized(LLAMA, spec)
        save_gguf(tmp_path / f"{spec}.gguf", qparams, LLAMA)
        assert gguf.read(tmp_path / f"{spec}.gguf").metadata["general.file_type"] == wanted


def test_what_an_importance_matrix_said_of_other_codes_is_left_out(tmp_path):
    file = gguf.read(LLAMA)
    said = {"quantize.imatrix.file": "wiki.dat", "quantize.imatrix.entries_count": 7}
    kinds = {"quantize.imatrix.file": "string", "quantize.imatrix.entries_count": "i32"}
    tensors = {
        name: gguf_writing.Tensor(info.type, info.shape, lambda name=name: file.raw(name))
        for name, info in file.tensors.items()
    }
    source = tmp_path / "source.gguf"
    gguf_writing.write(source, file.metadata | said, file.kinds | kinds, tensors)
    _, params, _ = qjax.models.load(source)
    save_gguf(tmp_path / "same.gguf", params, source)
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    save_gguf(tmp_path / "new.gguf", requantized(source, "q8_0")[1], source)
    left = gguf.read(tmp_path / "new.gguf")
    assert not said.keys() & left.metadata.keys()
    assert left.metadata.keys() == left.kinds.keys() == file.metadata.keys()


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


def test_what_gguf_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    _, params, _ = qjax.models.load(LLAMA)
    up = "params/layers_0/mlp/up/kernel"
    one = lambda spec: lambda q: qjax.quantize(qjax.dequantize(q), spec, 0)
    where = "layers_0/mlp/up/kernel: "
    refused(
        replaced(params, up, one("int4_g128")), f"{where}.*int4; quantize to one of q4_0", tmp_path
    )
    dynamic = replaced(params, up, one("int8/int8_token"))
    refused(dynamic, f"{where}GGUF has no type for the format int8", tmp_path)
    smooth = lambda q: dataclasses.replace(
        q, activation=qjax.activation.Activation(None, axis=0, input_scale=jnp.ones(256))
    )
    refused(replaced(params, up, smooth), f"{where}GGUF has no place for.*models.fold", tmp_path)
    refused(qjax.prepare(params), "prepared for a kernel.*unprepare", tmp_path)
    refused(
        replaced(params, up, lambda q: qjax.dequantize(q).astype(jnp.int32)),
        f"{where}has dtype int32, must be",
        tmp_path,
    )
    wider = replaced(params, up, lambda q: jnp.zeros((q.shape[0], 32)))
    refused(wider, r"has shape \(32, 256\).*not of one model", tmp_path)
    eight = lambda q: qjax.quantize(qjax.dequantize(q), "q8_0", 0)
    wide = lambda q: dataclasses.replace(eight(q), scale=eight(q).scale.astype(jnp.float32))
    refused(replaced(params, up, wide), f"{where}Q8_0 blocks hold.*float16", tmp_path)
    layer = params["params"]["layers_0"]
    stacked = {"params": {**params["params"], "layers": {"block": layer}}}
    refused(stacked, "layers/block.*unrolled decoder; qjax.unstack", tmp_path)
    less = {"params": {k: v for k, v in params["params"].items() if k != "norm"}}
    refused(less, "output_norm.weight", tmp_path)
    refused(params, "tensors", tmp_path, GOLDEN / "tiny_experts_mixtral.gguf")


def test_a_file_is_replaced_where_that_is_said(tmp_path):
    shutil.copy(LLAMA, tmp_path / "model.gguf")
    path = tmp_path / "model.gguf"
    _, qparams = requantized(path, "q8_0")
    with pytest.raises(ValueError, match=r"model.gguf: exists; .*overwrite=True"):
        save_gguf(path, qparams, path)
    assert path.read_bytes() == LLAMA.read_bytes()
    save_gguf(path, qparams, path, overwrite=True)
    assert gguf.read(path).metadata["general.file_type"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("metadata", "kinds", "match"),
    [
        ({"a": 1}, {}, "key 'a': 1 of type None"),
        ({"a": 300}, {"a": "u8"}, "key 'a': 300 of type 'u8' cannot be written"),
        ({"a": 0.5}, {"a": "u32"}, "key 'a'"),
        ({"a": [1]}, {"a": "array"}, "the type of its elements"),
        ({"a": [1, 300]}, {"a": "array[u8]"}, "not all elements are u8"),
        ({"a": [1, 2]}, {"a": "array[string]"}, "key 'a'"),
        ({"a": "x"}, {"a": "text"}, "key 'a'"),
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
        ("w", "Q8_0", (2, 33), 70, "rows of 33, Q8_0 needs a multiple of 32"),
        ("w", "Q8_0", (2, 32), 67, "67 bytes were made.*takes 68"),
    ],
)
def test_tensors_that_gguf_has_no_place_for_are_refused(name, kind, shape, made, match, tmp_path):
    tensor = gguf_writing.Tensor(TYPES[kind], shape, lambda: np.zeros(made, np.uint8))
    with pytest.raises(ValueError, match=match):
        gguf_writing.write(tmp_path / "no.gguf", {}, {}, {name: tensor})
    assert not list(tmp_path.iterdir())


def test_the_formats_are_those_that_are_read():
    assert {"q4_k", "q6_k", "q8_0", "iq4_nl", "tq2_0", "mxfp4"} <= set(FORMATS)
