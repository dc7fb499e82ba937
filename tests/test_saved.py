"""Saved language models: what comes back is what was saved, and a folder that lies is refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import few
from tiny_models import CONFIGS, SIZES, make

import qjax
from qjax import models
from qjax.io import folder
from qjax.models import saved

TINY = pathlib.Path(__file__).parent / "golden" / "tiny_llama_q4_k_m.gguf"


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture(scope="module")
def words():
    vocabulary = {f"w{i}": i for i in range(50)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return models.Tokenizer(backend, bos_id=1, eos_id=None, stop_ids=(2, 3))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", few([*CONFIGS], ["qwen2", "gemma3", "qwen3_moe"]))
def test_models_of_every_family_round_trip(tmp_path, words, family, scan):
    config = dataclasses.replace(CONFIGS[family], scan=scan, dtype=jnp.dtype("bfloat16"))
    model, params = make(config)
    sites = qjax.find_sites(model.apply, params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    qparams = qjax.quantize_params(params, "int4_g16", sites)
    saved.save_folder(tmp_path / "saved", model, qparams, words)
    found, found_params, tokenizer = saved.load_folder(tmp_path / "saved")
    assert found.config == config
    same(found_params, qparams)
    assert tokenizer.encode("w7 w11") == [7, 11]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, None, (2, 3))


def test_a_gguf_keeps_its_codes_tokens_and_logits(tmp_path):
    model, params, tokenizer = models.load(TINY)
    saved.save_folder(tmp_path / "saved", model, params, tokenizer)
    found, found_params, found_tokenizer = saved.load_folder(tmp_path / "saved")
    same(found_params, params)
    text = "Call me <|Ishmael|>. Größe: 12345"
    ids = tokenizer.encode(text)
    assert found_tokenizer.encode(text) == ids
    assert found_tokenizer.decode(ids) == tokenizer.decode(ids)
    assert found_tokenizer.stop_ids == tokenizer.stop_ids
    tokens = jnp.asarray([ids])
    a = jax.jit(qjax.quantized(model.apply))(params, tokens)
    b = jax.jit(qjax.quantized(found.apply))(found_params, tokens)
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def broken(tmp_path, words):
    """A saved model, and a function that changes one field of its metadata."""
    model, params = make(CONFIGS["gemma3"])
    saved.save_folder(tmp_path / "saved", model, params, words)
    path = tmp_path / "saved" / "qjax.json"

    def change(keys, value):
        data = json.loads(path.read_text())
        place = data["metadata"]
        for key in keys[:-1]:
            place = place[key]
        if value is KeyError:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        path.write_text(json.dumps(data))
        return tmp_path / "saved"

    return change


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model",), KeyError, "metadata model: is missing"),
        (("tokenizer",), [], "metadata tokenizer: is missing"),
        (("model", "num_layers"), 1 << 23, "model: Config: local_layers has 3"),
        (("model", "num_layers"), 2, r"model: Config: local_layers has 3"),
        (("model", "num_layers"), True, "model num_layers: is 'True', which is not valid"),
        (("model", "head_dim"), 1 << 20, "model head_dim"),
        (("model", "head_dim"), 10, "parameters params/layers_0/attention"),
        (("model", "hidden_size"), 33, "parameters params/embed/embedding: has shape"),
        (("model", "tied"), False, "parameters params/head/kernel: is missing"),
        (("model", "post_norms"), False, "attention_post_norm/scale: is none that the model has"),
        (("model", "vocab_size"), -1, "model vocab_size"),
        (("model", "norm_epsilon"), "1e-6", "model norm_epsilon"),
        (("model", "norm_epsilon"), float("nan"), "model norm_epsilon"),
        (("model", "rope"), None, "model rope"),
        (("model", "rope", "theta"), 0, "model rope theta"),
        (("model", "rope", "factors"), [1.0], "rope.factors must have"),
        (("model", "rope", "phase"), 0, "model rope phase: is unknown"),
        (("model", "activation"), "relu", "model activation"),
        (("model", "dtype"), "int8", "model dtype"),
        (("model", "scan"), True, "parameters params/layers"),
        (("model", "colour"), 1, "model colour: is unknown"),
        (("model", "num_heads"), KeyError, "model num_heads: is missing"),
        (("tokenizer", "bos_id"), 50, "tokenizer bos_id"),
        (("tokenizer", "stop_ids"), [-1], "tokenizer stop_ids"),
        (("tokenizer", "eos_id"), KeyError, "tokenizer eos_id: is missing"),
    ],
)
def test_metadata_that_lies_is_refused(broken, keys, value, message):
    path = broken(keys, value)
    with pytest.raises(ValueError, match=message) as error:
        saved.load_folder(path)
    assert "qjax.json" in str(error.value)


def test_a_field_that_an_older_folder_lacks_has_its_default(broken):
    found = saved.load_folder(broken(("model", "num_experts"), KeyError))[0].config
    assert found == CONFIGS["gemma3"]
    default = models.Config(**SIZES)
    for name in ("rope", "local_rope", "query_scale", "dtype", "embedding_scale"):
        found = saved.load_folder(broken(("model", name), KeyError))[0].config
        assert getattr(found, name) == getattr(default, name)


def test_layers_beyond_number_are_refused(tmp_path, words):
    model, params = make(CONFIGS["llama"])
    endless = dataclasses.replace(model.config, num_layers=1 << 23)
    saved.save_folder(tmp_path / "saved", models.Decoder(endless), params, words)
    with pytest.raises(ValueError, match=r"qjax.json: model num_layers: is 8388608, of"):
        saved.load_folder(tmp_path / "saved")


def test_a_tokenizer_of_more_tokens_is_refused(tmp_path, words):
    model, params = make(dataclasses.replace(CONFIGS["llama"], vocab_size=49))
    saved.save_folder(tmp_path / "saved", model, params, words)
    with pytest.raises(ValueError, match=r"vocab_size: is 49, tokenizer.json has 50 tokens"):
        saved.load_folder(tmp_path / "saved")


def test_a_folder_without_a_model_is_refused(tmp_path):
    folder.write_folder(tmp_path / "saved", {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds no language model"):
        saved.load_folder(tmp_path / "saved")
