"""Quantized Hugging Face folders: written, read back, and what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few

import qjax
from qjax import models
from qjax.io import safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
HF, QUANTIZED = GOLDEN / "hf", GOLDEN / "hf_quantized"
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3")
SPECS = {  # what a codec holds, scales in float16 but for those of bitsandbytes
    "gptq": "int4_g8",
    "awq": "uint4_g8",
    "compressed-tensors": "int3",
    "bitsandbytes": "nf4_g32",
}
TOKENS = jnp.arange(8)[None]


def spec_of(text):
    spec = qjax.Spec.parse(text)
    spec = spec if spec.format == "nf4" else spec._replace(scale_dtype="float16")
    return spec if spec.symmetric else spec._replace(zero_dtype="uint8")


def quantized(family, *rules):
    """A golden model, its matrices quantized but for routers."""
    model, params, _ = models.load(HF / family)
    sites = qjax.find_sites(model.apply, params, TOKENS)
    tables = qjax.Rule(".*", None, where=qjax.is_gathered, optional=True)
    kept = qjax.Rule(".*/router/.*", None, optional=True)
    recipe = qjax.Recipe(kept, tables, *(qjax.Rule(r, s, optional=True) for r, s in rules))
    return model, qjax.quantize_params(params, recipe, sites)


def equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("name", "format"), [("w4a16", "int4"), ("w4a16_asym", "uint4")])
def test_folders_of_compressed_tensors_give_its_logits(name, format):
    golden = np.load(QUANTIZED / name / "logits.npz")
    model, params, _ = models.load(QUANTIZED / name)
    kernel = params["params"]["layers_1"]["mlp"]["down"]["kernel"]
    assert (kernel.format, kernel.block) == (format, (16, 1))
    assert params["params"]["head"]["kernel"].dtype == jnp.float32
    found = jax.jit(qjax.quantized(model.apply))(params, golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("older", [False, True])
def test_folders_of_modelopt_give_its_logits(older, tmp_path):
    """ModelOpt's own checkpoints had what it says in a file of its own before."""
    source = QUANTIZED / "nvfp4"
    if older:
        source = shutil.copytree(source, tmp_path / "older")
        values = json.loads((source / "config.json").read_text())
        del values["quantization_config"]
        (source / "config.json").write_text(json.dumps(values))
    golden = np.load(QUANTIZED / "nvfp4" / "logits.npz")
    model, params, _ = models.load(source)
    kernel = params["params"]["layers_1"]["mlp"]["down"]["kernel"]
    assert (kernel.format, kernel.block) == ("nvfp4", (16, 1))
    assert params["params"]["head"]["kernel"].dtype == jnp.float32
    found = jax.jit(qjax.quantized(model.apply))(params, golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], atol=1e-5, rtol=0)
    if older:
        (source / "hf_quant_config.json").write_text('{"quantization": 3}')
        with pytest.raises(ValueError, match="key 'quantization': must be"):
            models.load(source)


def test_a_folder_of_compressed_tensors_is_written_again_to_the_byte(tmp_path):
    source = QUANTIZED / "w4a16_asym"
    models.save_hf(tmp_path / "out", models.load(source)[1], source, "compressed-tensors")
    with pytest.raises(ValueError, match="out: exists; choose another path"):  # first of all
        models.save_hf(tmp_path / "out", None, source, "compressed-tensors")
    found, wanted = (safetensors.read_folder(p)[0] for p in (tmp_path / "out", source))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, name)


CASES = [(family, codec) for family in FAMILIES for codec in SPECS]
CASES = [
    case
    for case in CASES
    if case not in (("qwen3_moe", "bitsandbytes"), ("mixtral", "bitsandbytes"))
]
QUICK = [
    ("llama", "gptq"),
    ("mixtral", "compressed-tensors"),
    ("gemma3", "awq"),
    ("qwen2", "bitsandbytes"),
]


@pytest.mark.parametrize("case", few(CASES, QUICK), ids="-".join)
def test_what_is_written_comes_back(case, tmp_path):
    family, codec = case
    kept = [(".*/down/.*", None)] if codec == "bitsandbytes" else []  # 48 inputs
    model, qparams = quantized(family, *kept, (".*", spec_of(SPECS[codec])))
    models.save_hf(tmp_path / "out", qparams, HF / family, codec)
    again, params, tokenizer = models.load(tmp_path / "out")
    wanted = jax.jit(qjax.quantized(model.apply))(qparams, TOKENS)
    np.testing.assert_array_equal(jax.jit(qjax.quantized(again.apply))(params, TOKENS), wanted)
    assert tokenizer.encode("a b") == models.load(HF / family)[2].encode("a b")
    qtensors = [v for v in jax.tree.leaves(params, is_leaf=qjax.is_qtensor) if qjax.is_qtensor(v)]
    assert {q.format for q in qtensors} == {spec_of(SPECS[codec]).format}
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if again.config.tied:  # transformers has a module of that name all the same
        left_out = {"gptq": "lm_head", "awq": "modules_to_not_convert"}.get(codec, "ignore")
        left_out = "llm_int8_skip_modules" if codec == "bitsandbytes" else left_out
        assert about[left_out] is False or "lm_head" in about[left_out]
    models.save_hf(tmp_path / "again", params, tmp_path / "out", codec)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    equal(models.load(tmp_path / "again")[1], params)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_fp4_comes_back_with_its_codes(format, tmp_path):
    """The reciprocal of a reciprocal is off by a unit in the last place."""
    kept = (".*/(head|down)/kernel", None)  # 48 inputs are no whole groups of 32
    model, qparams = quantized("llama", kept, (".*", format))
    models.save_hf(tmp_path / "out", qparams, HF / "llama", "compressed-tensors")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["format"] == f"{format}-pack-quantized"
    again, params, _ = models.load(tmp_path / "out")
    held = params["params"]["layers_1"]["mlp"]["up"]["kernel"]
    wanted = qparams["params"]["layers_1"]["mlp"]["up"]["kernel"]
    assert (held.format, held.block) == (format, wanted.block)
    bits = lambda q: np.asarray(q.qvalue).view(np.uint8)
    np.testing.assert_array_equal(bits(held), bits(wanted))
    logits = jax.jit(qjax.quantized(model.apply))(qparams, TOKENS)
    found = jax.jit(qjax.quantized(again.apply))(params, TOKENS)
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())
    _, experts = quantized("mixtral", kept, (".*", "nvfp4"))
    with pytest.raises(ValueError, match="nothing of 4-bit floats there"):
        models.save_hf(tmp_path / "x", experts, HF / "mixtral", "compressed-tensors")


def test_each_matrix_has_its_own_form_in_compressed_tensors(tmp_path):
    rules = ((".*/down/kernel", spec_of("int8")), (".*/v/kernel", None))
    rules += ((".*/o/kernel", qjax.Spec.parse("fp8_e4m3_16x16")), (".*", spec_of("int4_g16")))
    model, qparams = quantized("llama", *rules)
    models.save_hf(tmp_path / "out", qparams, HF / "llama", "compressed-tensors")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["format"] == "mixed-precision"
    assert about["ignore"] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    held = {g["weights"]["num_bits"]: g["targets"] for g in about["config_groups"].values()}
    assert len(about["config_groups"]) == 3
    assert held[4][0] == "lm_head"
    again, params, _ = models.load(tmp_path / "out")
    np.testing.assert_array_equal(
        jax.jit(qjax.quantized(again.apply))(params, TOKENS),
        jax.jit(qjax.quantized(model.apply))(qparams, TOKENS),
    )


def test_biases_of_zeros_are_no_parameters_and_others_are_refused(tmp_path):
    _, qparams = quantized("llama", (".*", spec_of("int4_g16")))
    models.save_hf(tmp_path / "out", qparams, HF / "llama", "gptq")
    wanted = models.load(tmp_path / "out")[1]
    tensors, metadata = safetensors.read_folder(tmp_path / "out")
    tensors = {name: np.array(array) for name, array in tensors.items()}
    for name in [name for name in tensors if name.endswith(".qweight")]:  # as AutoGPTQ writes them
        bias = name.replace("qweight", "bias")
        tensors[bias] = np.zeros(tensors[name].shape[1], np.float16)
    write = lambda: safetensors.write(tmp_path / "out" / "model.safetensors", tensors, metadata)
    write()
    equal(models.load(tmp_path / "out")[1], wanted)
    models.save_hf(tmp_path / "again", wanted, tmp_path / "out", "gptq")
    equal(models.load(tmp_path / "again")[1], wanted)
    tensors[bias][3] = 1
    write()
    with pytest.raises(ValueError, match=f"this architecture does not have: {bias}"):
        models.load(tmp_path / "out")


@pytest.mark.parametrize(("least", "version"), [(1, "gptq"), (0, "gptq_v2")])
def test_zero_points_of_zero_need_the_second_version(least, version, tmp_path):
    _, qparams = quantized("llama", (".*", spec_of("uint4_g16")))
    floor = lambda v: v - v.min() + jnp.uint8(least) if v.dtype == jnp.uint8 else v
    qparams = jax.tree.map(floor, qparams)
    lowest = min(int(v.min()) for v in jax.tree.leaves(qparams) if v.dtype == jnp.uint8)
    assert lowest == least
    models.save_hf(tmp_path / "out", qparams, HF / "llama", "gptq")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (about["checkpoint_format"], about["sym"], about["bits"]) == (version, False, 4)
    back = models.load(tmp_path / "out")[1]
    for a, b in zip(
        jax.tree.leaves(back, is_leaf=qjax.is_qtensor),
        jax.tree.leaves(qparams, is_leaf=qjax.is_qtensor),
        strict=True,
    ):
        if qjax.is_qtensor(a):
            np.testing.assert_array_equal(qjax.dequantize(a), qjax.dequantize(b))


def test_a_folder_of_bitsandbytes(tmp_path):
    model, qparams = quantized(
        "qwen2", ("params/head/.*", None), (".*", qjax.Spec.parse("nf4_g16"))
    )
    tensors, metadata = safetensors.read_folder(HF / "qwen2")
    tensors = {k: np.array(v) for k, v in tensors.items()}
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    names |= {"o": "self_attn.o_proj"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    for i in range(2):
        for part in ("attention", "mlp"):
            for name, held in qparams["params"][f"layers_{i}"][part].items():
                q = held["kernel"]
                codes = np.asarray(q.qvalue).T.astype(np.uint8).reshape(-1, 2)
                state = {"quant_type": "nf4", "blocksize": 16, "shape": [*q.shape][::-1]}
                at = f"model.layers.{i}.{names[name]}.weight"
                tensors[at] = (codes[:, :1] << 4) | codes[:, 1:]
                tensors[f"{at}.absmax"] = np.asarray(q.scale).T.reshape(-1)
                tensors[f"{at}.quant_map"] = np.load(GOLDEN / "bitsandbytes.npz")["nf4_code"]
                text = json.dumps(state).encode()
                tensors[f"{at}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    shutil.copytree(HF / "qwen2", tmp_path / "m", ignore=shutil.ignore_patterns("*safetensors*"))
    safetensors.write(tmp_path / "m" / "model.safetensors", tensors, metadata)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    again, params, _ = models.load(tmp_path / "m")
    np.testing.assert_array_equal(
        jax.jit(qjax.quantized(again.apply))(params, TOKENS),
        jax.jit(qjax.quantized(model.apply))(qparams, TOKENS),
    )


def about(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_a_folder_says_what_it_holds(tmp_path):
    shutil.copytree(HF / "llama", tmp_path / "like")
    (tmp_path / "like" / "chat_template.jinja").write_text("{{ messages }}")
    head = ("params/head/kernel", None)
    _, qparams = quantized("llama", head, (".*", spec_of("int4_g16")))
    q = qparams["params"]["layers_0"]["mlp"]["up"]["kernel"]
    order = qjax.activation.Activation(
        axis=(-2,), permutation=jnp.arange(32).reshape(16, 2).T.reshape(-1)
    )
    ordered = dataclasses.replace(q, activation=order)
    turned = jax.tree.map(lambda v: ordered if v is q else v, qparams, is_leaf=qjax.is_qtensor)
    models.save_hf(tmp_path / "a", turned, tmp_path / "like", "gptq")
    assert (about(tmp_path / "a")["desc_act"], about(tmp_path / "a")["lm_head"]) == (True, False)
    equal(models.load(tmp_path / "a")[1]["params"]["layers_0"]["mlp"]["up"]["kernel"], ordered)
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == "{{ messages }}"
    _, whole = quantized("llama", (".*", spec_of("int4")))
    models.save_hf(tmp_path / "b", whole, tmp_path / "like", "gptq")
    found = about(tmp_path / "b")
    assert (found["desc_act"], found["lm_head"], found["group_size"]) == (False, True, -1)
    models.save_hf(tmp_path / "c", qparams, tmp_path / "like", "awq")
    assert about(tmp_path / "c")["zero_point"] is True
    _, groups = quantized("llama", (".*/up/kernel", spec_of("int4")), (".*", spec_of("int4_g16")))
    with pytest.raises(ValueError, match=r"one group for all matrices, here they are \[16, 32\]"):
        models.save_hf(tmp_path / "d", groups, tmp_path / "like", "awq")


def test_arrays_keep_the_type_of_the_file_where_it_holds_them(tmp_path):
    _, qparams = quantized("qwen2", (".*", spec_of("int4_g16")))  # loaded in float32
    scale = qparams["params"]["norm"]["scale"]
    qparams["params"]["norm"]["scale"] = scale + 2.0**-20
    models.save_hf(tmp_path / "out", qparams, HF / "qwen2", "gptq")
    tensors, _ = safetensors.read_folder(tmp_path / "out")
    assert tensors["model.embed_tokens.weight"].dtype.name == "bfloat16"
    assert tensors["model.norm.weight"].dtype.name == "float32"
    equal(models.load(tmp_path / "out")[1], jax.tree.map(jnp.asarray, qparams))


def test_experts_are_what_transformers_looks_for(tmp_path):
    four, eight = spec_of("int4_g16"), spec_of("int8")
    _, qparams = quantized(
        "mixtral", (".*/attention/.*", eight), ("params/head/.*", eight), (".*", four)
    )
    models.save_hf(tmp_path / "out", qparams, HF / "mixtral", "compressed-tensors")
    first, second = about(tmp_path / "out")["config_groups"].values()
    assert (first["targets"], first["weights"]["num_bits"]) == ([r"re:.*\.experts\..*"], 4)
    assert "lm_head" in second["targets"]
    equal(models.load(tmp_path / "out")[1], qparams)
    for rules in (
        [(".*/experts/down/.*", eight), (".*", four)],
        [(".*/experts/down/.*", None), (".*", four)],
        [(".*", qjax.Spec.parse("fp8_e4m3_16x16"))],
    ):
        refused(
            tmp_path,
            "experts: transformers wants all in one form",
            quantized("mixtral", *rules)[1],
            "mixtral",
        )
    model, params, _ = models.load(HF / "mixtral")
    sites = qjax.find_sites(model.apply, params, TOKENS)
    tables = qjax.Rule(".*", None, where=qjax.is_gathered, optional=True)
    all_of_it = qjax.Recipe(tables, qjax.Rule(".*", four, optional=True))
    routed = qjax.quantize_params(params, all_of_it, sites)
    refused(tmp_path, "router/kernel: .* routers aside", routed, "mixtral")


def test_bitsandbytes_has_linear_layers_in_one_form(tmp_path):
    for family, rules, message in (
        ("llama", [(".*/up/.*", "int8"), (".*", "nf4_g16")], "in one form: there are int8, nf4"),
        ("llama", [(".*", "nf4_g16_dq")], "lm_head is .*scales are of one level"),
        ("llama", [(".*", "nf4_g16")], "lm_head is .*in whole groups of 32, 64"),
        ("mixtral", [(".*", "nf4_g16")], "in one form: .*experts.0.* is an expert's"),
    ):
        refused(tmp_path, message, quantized(family, *rules)[1], family, "bitsandbytes")
    _, qparams = quantized("llama", (".*/head/.*", None), (".*", "int8"))
    models.save_hf(tmp_path / "out", qparams, HF / "llama", "bitsandbytes")
    said = about(tmp_path / "out")
    assert (said["load_in_8bit"], said["llm_int8_skip_modules"]) == (True, ["lm_head"])
    again = models.load(tmp_path / "out")[1]
    models.save_hf(tmp_path / "again", again, tmp_path / "out", "bitsandbytes")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def refused(path, message, params, like="llama", codec="compressed-tensors"):
    with pytest.raises(ValueError, match=message):
        models.save_hf(path / "refused", params, HF / like, codec)
    left = {p.name for p in path.iterdir()} - {"out"}
    assert not left, "nothing is left behind"


def test_what_cannot_be_written_is_said_and_nothing_is_left(tmp_path):
    model, params, _ = models.load(HF / "llama")
    _, qparams = quantized("llama", (".*", spec_of("int4_g16")))
    refused(tmp_path, "codec: must be one of gptq, awq", qparams, codec="exl2")
    refused(tmp_path, "params has no quantized matrix", params)
    refused(tmp_path, r"save_hf takes \{\"params\"", qparams["params"])
    refused(tmp_path, "they are not of one model", qparams, like="qwen2")
    fewer = {"params": {k: v for k, v in qparams["params"].items() if k != "layers_1"}}
    refused(tmp_path, "params/layers_1/.*: is missing", fewer)
    _, nf4 = quantized("llama", (".*/up/kernel", "nf4_g16"), (".*", spec_of("int4_g16")))
    refused(tmp_path, r"layers.0.mlp.up_proj is QTensor\(nf4", nf4)
    _, mixed = quantized("llama", (".*/up/kernel", spec_of("int8")), (".*", spec_of("int4_g16")))
    refused(
        tmp_path,
        "all matrices of the layers in one form: there are int4, int8",
        mixed,
        "llama",
        "gptq",
    )
    _, some = quantized("llama", (".*/up/kernel", None), (".*", spec_of("int4_g16")))
    refused(tmp_path, "model.layers.0.mlp.up_proj is not", some, "llama", "gptq")
    _, groups = quantized(
        "llama", (".*/up/kernel", spec_of("int4_g8")), (".*", spec_of("int4_g16"))
    )
    refused(
        tmp_path,
        r"awq has one group for all matrices, here they are \[8, 16\]",
        groups,
        "llama",
        "awq",
    )
    sites = qjax.find_sites(model.apply, params, TOKENS)
    refused(tmp_path, "unprepare or dequantize it", qjax.prepare(qparams, sites))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: exists"):
        models.save_hf(tmp_path / "out", qparams, HF / "llama", "gptq")
    with pytest.raises(ValueError, match="there is no folder"):
        models.save_hf(tmp_path / "no" / "out", qparams, HF / "llama", "gptq")


def test_broken_folders(tmp_path):
    _, qparams = quantized("mixtral", (".*", spec_of("int4_g16")))
    models.save_hf(tmp_path / "good", qparams, HF / "mixtral", "gptq")
    tensors, metadata = safetensors.read_folder(tmp_path / "good")
    tensors = {k: np.array(v) for k, v in tensors.items()}
    expert = "model.layers.0.block_sparse_moe.experts.1.w1"

    def broken(name, message, **change):
        target = tmp_path / name
        shutil.copytree(tmp_path / "good", target)
        held = tensors | {k.replace("__", "."): v for k, v in change.items()}
        held = {k: v for k, v in held.items() if v is not None}
        (target / "model.safetensors").unlink()
        safetensors.write(target / "model.safetensors", held, metadata)
        with pytest.raises(ValueError, match=message):
            models.load(target)

    part = lambda p: f"{expert}.{p}"
    broken(
        "missing", f"matrix '{expert}': .*'scales' must be .* is missing", **{part("scales"): None}
    )
    dense = {part(p): None for p in ("qweight", "qzeros", "scales", "g_idx")}
    dense |= {part("weight"): np.zeros((48, 32), np.float32)}
    broken("dense", "are quantized in part", **dense)
    broken("left", "missing tensors", **{part(p): None for p in ("qweight", "qzeros", "scales")})
    embed = {
        f"model.embed_tokens.{p}": tensors[part(p)]
        for p in ("qweight", "qzeros", "scales", "g_idx")
    }
    broken("table", "'model.embed_tokens': there is a tensor 'weight'", **embed)
    broken(
        "embedding",
        "embed_tokens.weight.*(shape|linear layers)",
        **embed,
        **{"model.embed_tokens.weight": None},
    )
    wide = {
        part("scales"): tensors[part("scales")][:, :32],
        part("qweight"): tensors[part("qweight")][:, :32],
        part("qzeros"): tensors[part("qzeros")][:, :4],
    }
    broken("shape", r"has shape \(32, 32\), the configuration says \(48, 32\)", **wide)
