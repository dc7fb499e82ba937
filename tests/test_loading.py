"""Whole checkpoints: logits against transformers and llama.cpp, and everything that is refused."""

import json
import pathlib
import shutil
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import models
from qjax.io import gguf, safetensors
from qjax.models import configs

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny_llama_q4_k_m.gguf"
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3")


def dense(params):
    return jax.tree.map(
        lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, params, is_leaf=qjax.is_qtensor
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_give_the_logits_of_transformers(family):
    model, params, _ = models.load(GOLDEN / "hf" / family)
    golden = np.load(GOLDEN / "hf" / family / "logits.npz")
    found = jax.jit(model.apply)(params, golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5, rtol=0)


def test_gguf_gives_the_log_probabilities_of_llama_cpp():
    model, qparams, _ = models.load(TINY)
    golden = json.loads((GOLDEN / "tiny_llama.json").read_text())
    tokens = jnp.asarray([golden["prompt"]])
    expected = np.asarray(golden["log_probabilities"])
    for apply, params in (
        (qjax.quantized(model.apply), qparams),
        (model.apply, dense(qparams)),
    ):
        found = jax.nn.log_softmax(jax.jit(apply)(params, tokens)[0])
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_experts_of_a_gguf_keep_their_codes_and_agree_with_llama_cpp(name):
    model, qparams, _ = models.load(GOLDEN / f"tiny_experts_{name}.gguf")
    golden = np.load(GOLDEN / f"tiny_experts_{name}.npz")
    for apply, params in (
        (qjax.quantized(model.apply), qparams),
        (model.apply, dense(qparams)),
    ):
        logits = jax.jit(apply)(params, jnp.asarray(golden["prompt"][None], jnp.int32))
        found = jax.nn.log_softmax(logits[0])
        np.testing.assert_allclose(found, golden["log_probabilities"], atol=1e-5, rtol=0)
    experts = qparams["params"]["layers_0"]["mlp"]["experts"]
    held = {key: (q["kernel"].format, q["kernel"].shape) for key, q in experts.items()}
    assert held == {
        "gate": ("q4_0", (4, 64, 96)),
        "up": ("q4_0", (4, 64, 96)),
        "down": ("q5_1", (4, 96, 64)),
    }


def test_quantized_tensors_keep_the_codes_of_the_file():
    _, qparams, _ = models.load(TINY)
    leaves = jax.tree.leaves(qparams, is_leaf=qjax.is_qtensor)
    formats = sorted(leaf.format for leaf in leaves if qjax.is_qtensor(leaf))
    assert formats == ["q4_k"] * 6 + ["q6_k"] * 3
    q = qparams["params"]["layers_0"]["attention"]["q"]["kernel"]
    assert q.shape == (256, 256)
    assert q.block == (32, 1)
    embedding = qparams["params"]["embed"]["embedding"]
    assert embedding.shape == (264, 256)
    assert embedding.block[-1] == 32
    assert all(leaf.dtype == np.float32 for leaf in leaves)


def test_the_dtype_is_that_of_params_and_computation():
    model, qparams, _ = models.load(TINY, dtype=jnp.bfloat16)
    assert model.config.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(qparams, is_leaf=qjax.is_qtensor)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    golden = json.loads((GOLDEN / "tiny_llama.json").read_text())
    logits = jax.jit(model.apply)(dense(qparams), jnp.asarray([golden["prompt"]]))
    expected = np.asarray(golden["log_probabilities"])
    np.testing.assert_allclose(jax.nn.log_softmax(logits[0]), expected, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="dtype must be a floating-point type, is int32"):
        models.load(TINY, dtype=jnp.int32)


def write_gguf(path, source=TINY, keys=None, tensors=None):
    """A copy of `source` by gguf-py, with keys and tensors changed, added, or (None) left out."""
    import gguf as peer

    keys, tensors = dict(keys or {}), dict(tensors or {})
    reader = peer.GGUFReader(source)
    writer = peer.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        element = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    kinds = {int: "UINT32", float: "FLOAT32", str: "STRING", bool: "BOOL"}
    for name, value in keys.items():
        if value is not None:
            kind = peer.GGUFValueType[kinds[type(value)]]
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=peer.GGMLQuantizationType[value[1]])
        elif value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_plain_tensors_become_arrays(tmp_path):
    """F16 in the file gives the logits of the same weights in float32."""
    import gguf as peer

    half = {
        t.name: peer.dequantize(t.data, t.tensor_type).astype(np.float16)
        for t in peer.GGUFReader(TINY).tensors
        if "norm" not in t.name
    }
    model, params, _ = models.load(write_gguf(tmp_path / "half.gguf", tensors=half))
    assert not any(map(qjax.is_qtensor, jax.tree.leaves(params, is_leaf=qjax.is_qtensor)))
    golden = json.loads((GOLDEN / "tiny_llama.json").read_text())
    logits = jax.jit(model.apply)(params, jnp.asarray([golden["prompt"]]))
    expected = np.asarray(golden["log_probabilities"])
    np.testing.assert_allclose(jax.nn.log_softmax(logits[0]), expected, atol=2e-3, rtol=0)


def test_a_file_without_a_head_is_tied(tmp_path):
    path = write_gguf(tmp_path / "tied.gguf", tensors={"output.weight": None})
    model, params, _ = models.load(path)
    assert model.config.tied
    assert "head" not in params["params"]


def test_rope_factors_are_read(tmp_path):
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = write_gguf(tmp_path / "long.gguf", tensors={"rope_freqs.weight": factors})
    model, _, _ = models.load(path)
    assert model.config.rope.factors == tuple(map(float, factors))


Q = "blk.0.attn_q.weight"
REFUSED = {
    "architecture": (
        {"general.architecture": "mamba"},
        {},
        "'general.architecture': is 'mamba'; only llama, qwen2, qwen3, qwen3moe, gemma3 can be",
    ),
    "missing key": (
        {"llama.block_count": None},
        {},
        "key 'llama.block_count': is missing",
    ),
    "key of another type": (
        {"llama.block_count": "1"},
        {},
        "key 'llama.block_count': is '1', must be an integer from 1 to 4096",
    ),
    "count huge": (
        {"llama.block_count": 1 << 31},
        {},
        "key 'llama.block_count': is 2147483648, must be an integer from 1 to 4096",
    ),
    "more layers than tensors": (
        {"llama.block_count": 4096},
        {},
        "missing tensors: blk.1.attn_k.weight, .* more",
    ),
    "heads huge": (
        {"llama.attention.head_count": 1 << 24, "llama.attention.head_count_kv": 1 << 24}
        | {"llama.attention.key_length": 4096, "llama.rope.dimension_count": 4096},
        {},
        r"has shape .*, the configuration says \(68719476736, 256\)",
    ),
    "bool for a number": (
        {"llama.attention.head_count": True},
        {},
        "key 'llama.attention.head_count': is True",
    ),
    "zero": ({"llama.context_length": 0}, {}, "key 'llama.context_length': is 0"),
    "epsilon nan": (
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        {},
        "layer_norm_rms_epsilon': is nan, must be positive and finite",
    ),
    "theta negative": ({"llama.rope.freq_base": -1.0}, {}, "'llama.rope.freq_base': is -1.0"),
    "experts": ({"llama.expert_count": 8}, {}, "'llama.expert_used_count': is missing"),
    "more experts than there are": (
        {"llama.expert_count": 8, "llama.expert_used_count": 9},
        {},
        "experts_per_token must be 1 to 8, the number of experts, is 9",
    ),
    "no experts": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        {},
        "missing tensors: blk.0.ffn_down_exps.weight, ",
    ),
    "shared experts": (
        {"llama.expert_shared_count": 1},
        {},
        "'llama.expert_shared_count': is 1, which the decoder does not have",
    ),
    "sigmoid gates": (
        {"llama.expert_gating_func": 2},
        {},
        "'llama.expert_gating_func': is 2, which the decoder does not have",
    ),
    "yarn": (
        {"llama.rope.scaling.type": "yarn"},
        {},
        "'llama.rope.scaling.type': is 'yarn'; only none, linear can be run",
    ),
    "partial rotary": (
        {"llama.rope.dimension_count": 32},
        {},
        "'llama.rope.dimension_count': is 32, which the decoder does not have",
    ),
    "grouping": (
        {"llama.attention.head_count_kv": 3},
        {},
        "num_heads 4 must be a multiple of num_kv_heads 3",
    ),
    "split": ({"split.count": 2}, {}, "'split.count': the model is split over several files"),
    "vocabulary": (
        {},
        {"token_embd.weight": np.zeros((300, 256), np.float32)},
        "the tokenizer has 264 tokens, 'token_embd.weight' has 300 rows",
    ),
    "no embedding": ({}, {"token_embd.weight": None}, "'token_embd.weight' is missing"),
    "missing tensor": ({}, {Q: None}, f"missing tensors: {Q}"),
    "missing layer": (
        {"llama.block_count": 2},
        {},
        "missing tensors: blk.1.attn_k.weight, .* and 1 more",
    ),
    "extra tensor": (
        {},
        {"blk.0.attn_q_norm.weight": np.ones(64, np.float32)},
        "tensors that this architecture does not have: blk.0.attn_q_norm.weight",
    ),
    "shape": (
        {},
        {Q: np.zeros((128, 256), np.float32)},
        rf"tensor '{Q}' has shape \(128, 256\), the configuration says \(256, 256\)",
    ),
    "transposed": (
        {},
        {"blk.0.attn_k.weight": np.zeros((256, 128), np.float32)},
        r"has shape \(256, 128\), the configuration says \(128, 256\)",
    ),
    "type without a codec": (
        {},
        {Q: (np.zeros((256, 292), np.uint8), "Q8_K")},
        f"tensor '{Q}' has type Q8_K; can be loaded: F32, F16",
    ),
    "rope factors": (
        {},
        {"rope_freqs.weight": np.ones(16, np.float32)},
        r"'rope_freqs.weight' must hold head_dim / 2 = 32 finite divisors, has shape \(16,\)",
    ),
    "tokenizer": ({"tokenizer.ggml.model": "t5"}, {}, "the tokenizer 't5' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_gguf_that_cannot_be_run_is_refused(case, tmp_path):
    keys, tensors, message = REFUSED[case]
    path = write_gguf(tmp_path / "bad.gguf", keys=keys, tensors=tensors)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        models.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 5  # tracing one layer is slow under tracemalloc
    assert peak < 64 << 20
    assert str(caught.value).startswith(str(path))


def folder_of(family, target, changes=None, drop=()):
    """A copy of a golden folder with keys of its config.json changed or left out."""
    shutil.copytree(GOLDEN / "hf" / family, target)
    path = target / "config.json"
    config = json.loads(path.read_text()) | (changes or {})
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))
    return target


BAD_CONFIGS = {
    "model_type": ("llama", {"model_type": "gpt_neox"}, "'model_type': is 'gpt_neox'; only llama"),
    "missing": ("llama", {"hidden_size": None}, "key 'hidden_size': is missing"),
    "float": ("llama", {"num_hidden_layers": 2.0}, "key 'num_hidden_layers': is 2.0"),
    "activation": ("llama", {"hidden_act": "relu"}, "key 'hidden_act': is 'relu'; only silu"),
    "bias": ("llama", {"attention_bias": True}, "key 'attention_bias': is True, which the decoder"),
    "mlp bias": ("llama", {"mlp_bias": True}, "key 'mlp_bias': is True"),
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "quip"}},
        "key 'quant_method': can be read: gptq, awq, .*, bitsandbytes, modelopt, is 'quip'",
    ),
    "rope type": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "key 'rope_parameters.rope_type': is 'yarn'; only default, linear, llama3 can be run",
    ),
    "rope a list": ("llama", {"rope_parameters": [1]}, r"'rope_parameters': is \[1\]"),
    "rope bounds": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "'rope_parameters.low_freq_factor': is 4.0, must be below",
    ),
    "window": ("qwen2", {"use_sliding_window": True}, "key 'use_sliding_window': is True"),
    "layer types": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "key 'layer_types'",
    ),
    "layer types short": ("gemma3", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
    "softcapping": ("gemma3", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping': is 3"),
    "tied a number": ("llama", {"tie_word_embeddings": 1}, "'tie_word_embeddings': is 1"),
    "layers": (
        "llama",
        {"num_hidden_layers": 1, "layer_types": None},
        "not have: model.layer",
    ),
    "experts": (
        "mixtral",
        {"num_local_experts": 4096},
        "names 4096 experts in each of 2 layers; the folder holds 41 tensors",
    ),
    "another expert": ("mixtral", {"num_local_experts": 3}, "not have: .*experts.3.w1.weight"),
    "missing expert": ("qwen3_moe", {"num_experts": 5}, "missing tensors: .*experts.4.down_proj"),
    "chosen experts": (
        "qwen3_moe",
        {"num_experts_per_tok": 5},
        "experts_per_token must be 1 to 4, the number of experts, is 5",
    ),
    "experts in some layers": (
        "qwen3_moe",
        {"mlp_only_layers": [1]},
        r"key 'mlp_only_layers': is \[1\], which the decoder does not have",
    ),
    "vocabulary": ("llama", {"vocab_size": 95}, "'lm_head.weight' has shape|embed_tokens.weight'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_folder_that_cannot_be_run_is_refused(case, tmp_path):
    family, changes, message = BAD_CONFIGS[case]
    folder = folder_of(family, tmp_path / "model", changes)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert str(caught.value).startswith(str(folder))


def rewrite(folder, edit):
    tensors, metadata = safetensors.read(folder / "model.safetensors")
    tensors = {name: np.array(value) for name, value in tensors.items()}
    edit(tensors)
    safetensors.write(folder / "model.safetensors", tensors, metadata)


def test_a_tied_head_may_be_a_copy_but_nothing_else(tmp_path):
    folder = folder_of("qwen3", tmp_path / "model")
    golden = np.load(folder / "logits.npz")

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    rewrite(folder, copy)
    model, params, _ = models.load(folder)
    assert "head" not in params["params"]
    found = jax.jit(model.apply)(params, golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5, rtol=0)

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float16(1)

    rewrite(folder, differ)
    with pytest.raises(ValueError, match=r"does not have: lm_head\.weight"):
        models.load(folder)


def test_integer_weights_are_refused(tmp_path):
    folder = folder_of("qwen3", tmp_path / "model")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int8)}))
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' has dtype int8"):
        models.load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(name, tmp_path):
    folder = folder_of("qwen3", tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: is missing"):
        models.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 99_999, '"a"'])
def test_a_broken_config_is_refused(text, tmp_path):
    folder = folder_of("qwen3", tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(folder)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    folder = folder_of("qwen3", tmp_path / "model")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    size = len(state["model"]["vocab"])
    state["model"]["vocab"] |= {f"word{i}": size + i for i in range(100)}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, vocab_size in"):
        models.load(folder)


OLD = {"rope_theta": 5e5, "rope_parameters": None}
SPELLINGS = {
    "theta": (
        "qwen3",
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "linear": (
        "llama",
        {"rope_theta": 5e5, "rope_parameters": None}
        | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ),
    "gemma": (
        "gemma3",
        {
            "rope_parameters": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": None,
            "sliding_window_pattern": 2,
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_old_and_new_configs_mean_the_same(case):
    family, old, new = SPELLINGS[case]
    config = json.loads((GOLDEN / "hf" / family / "config.json").read_text())
    assert configs.from_hf(config | old, "old") == configs.from_hf(config | new, "new")


def test_gguf_and_folder_describe_the_same_gemma():
    """What the converter writes for a config, and the config, give one `Config`."""
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.context_length": 64,
        "gemma3.embedding_length": 32,
        "gemma3.block_count": 7,
        "gemma3.feed_forward_length": 48,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 16,
        "gemma3.attention.value_length": 16,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": 5,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    config = json.loads((GOLDEN / "hf" / "gemma3" / "config.json").read_text()) | {
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    found = configs.from_gguf(metadata, "a", vocab_size=96, tensors=())
    assert found == configs.from_hf(config, "b")


def test_the_file_is_read_but_once_and_stays_as_it_is(tmp_path):
    """Loading copies: the file may be replaced or deleted afterwards."""
    path = tmp_path / "model.gguf"
    shutil.copy(TINY, path)
    model, qparams, _ = models.load(path)
    before = jax.jit(model.apply)(dense(qparams), jnp.arange(8)[None])
    path.write_bytes(b"")
    after = jax.jit(model.apply)(dense(qparams), jnp.arange(8)[None])
    np.testing.assert_array_equal(before, after)
    assert gguf.read(TINY).tensors


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_S"])
def test_types_without_codes_are_loaded_as_arrays(kind, tmp_path):
    """Of llama's q, whose rows are permuted: decoding and moving rows commute."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    raw = np.random.default_rng(0).integers(0, 256, (256, size), np.uint8)
    raw[:, :2] = np.array([0.01], np.float16).view(np.uint8)
    path = write_gguf(tmp_path / "iq.gguf", tensors={Q: (raw, kind)})
    truth = dequantize(raw, GGMLQuantizationType[kind])
    _, params, _ = models.load(path)
    q = params["params"]["layers_0"]["attention"]["q"]["kernel"]
    order = truth.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    np.testing.assert_array_equal(q, order.T)
