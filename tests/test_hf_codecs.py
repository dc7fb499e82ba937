"""Quantized matrices of Hugging Face's files: the bytes of the libraries that made them."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import few

import qjax
from qjax.activation import Activation
from qjax.io import (
    awq,
    bitsandbytes,
    bitstream,
    codecs,
    compressed_tensors,
    fine_grained_fp8,
    gptq,
    groups,
    modelopt,
    safetensors,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
GPTQ, AWQ = (np.load(GOLDEN / f"{name}.npz") for name in ("gptq", "awq"))
PACKED, FP8, SMALL = (
    np.load(GOLDEN / f"{name}.npz") for name in ("compressed_tensors", "fp8", "microscaling")
)
BNB, MODELOPT = (np.load(GOLDEN / f"{name}.npz") for name in ("bitsandbytes", "modelopt"))
E4M3 = ml_dtypes.float8_e4m3fn
GPTQ_CASES = [f"w{b}_g64_{kind}" for b in gptq.BITS for kind in ("sym", "asym")]
GPTQ_CASES += ["w4_g64_sym_actorder", "w4_g64_asym_actorder"]


def values(q):
    """[outputs, inputs], float32."""
    return np.asarray(qjax.dequantize(q), np.float32).T


def same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_a_stream_across_words(bits):
    rng = np.random.default_rng(bits)
    for count in (1, 31, 32, 75):
        codes = rng.integers(0, 1 << bits, (2, 3, count)).astype(np.uint8)
        words = bitstream.pack(codes, bits)
        assert words.shape == (2, 3, bitstream.words_of(count, bits))
        stream = sum(int(c) << i * bits for i, c in enumerate(codes[1, 2]))
        held = [stream >> 32 * i & 0xFFFFFFFF for i in range(words.shape[-1])]
        assert words[1, 2].view(np.uint32).tolist() == held
        np.testing.assert_array_equal(bitstream.unpack(words, bits, count), codes)


def gptq_parts(case, version):
    names = {"qweight": "qweight", "qzeros": f"qzeros_{version}"}
    names |= {"scales": "scales", "g_idx": "g_idx"}
    return {part: GPTQ[f"{case}__{name}"] for part, name in names.items()}


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_reads_and_writes_the_bytes_of_gptqmodel(case):
    parts = gptq_parts(case, "v2")
    q = gptq.read(parts, gptq.Settings(int(case[1]), 64, less_one=False), np.float16, "m")
    np.testing.assert_array_equal(values(q), GPTQ[f"{case}__dequant"])
    assert (q.zero_point is None) == ("_sym" in case)
    assert (q.activation is not None) == ("actorder" in case)
    same_bytes(gptq.write(q), parts)


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq_zero_points_less_one(case):
    parts = gptq_parts(case, "v1")
    q = gptq.read(parts, gptq.Settings(int(case[1]), 64), np.float16, "m")
    # What the library writes of a zero point of 0 spoils that one and what is above it in its word.
    zeros, per_word = GPTQ[f"{case}__zeros_int"], {3: 32}.get(int(case[1]), 32 // int(case[1]))
    spoiled = np.logical_or.accumulate((zeros == 0).reshape(-1, per_word, zeros.shape[1]), axis=1)
    whole = ~spoiled.reshape(zeros.shape)
    whole = np.repeat(whole, 64, axis=1)
    if q.activation is not None:
        whole = whole[:, np.argsort(q.activation.permutation)]
    assert whole.mean() > (0.5 if "asym" in case else 0.99)
    found, wanted = values(q), GPTQ[f"{case}__dequant"]
    np.testing.assert_array_equal(found[whole], wanted[whole])
    if q.zero_point is None:
        same_bytes(gptq.write(q, less_one=True), parts)


def test_gptq_refuses_a_zero_point_that_the_format_does_not_hold():
    q = gptq.read(gptq_parts("w4_g64_asym", "v2"), gptq.Settings(4, 64, False), np.float16, "m")
    with pytest.raises(ValueError, match=r"zero points 0 to \d+; the format gptq holds 1 to 16"):
        gptq.write(q, less_one=True)


@pytest.mark.parametrize("group", [64, 128])
def test_awq_reads_and_writes_the_bytes_of_autoawq(group):
    parts = {part: AWQ[f"g{group}__gemm__{part}"] for part in awq.PARTS}
    q = awq.read(parts, awq.Settings(group), np.float16, "m")
    np.testing.assert_array_equal(values(q).T, AWQ[f"g{group}__gemm__dequant_KxN"])
    same_bytes(awq.write(q), parts)


def scheme(case, kind="int"):
    """As ``config.json`` says it, read."""
    group = {"strategy": "channel"}
    if "_g64" in case:
        group = {"strategy": "group", "group_size": 64}
    elif case == "fp8":
        group = {"strategy": "tensor"}
    elif "block" in case:
        sizes = [16, 64] if "16x64" in case else [128, 128]
        group = {"strategy": "block", "block_structure": sizes}
    bits = int(case[1]) if kind == "int" else 8
    weights = {"num_bits": bits, "type": kind, "symmetric": "asym" not in case, **group}
    return weights, settings_of(weights)


def settings_of(weights, targets=("Linear",)):
    groups = {"group_0": {"targets": list(targets), "weights": weights}}
    found = compressed_tensors.settings({"config_groups": groups}, "c")
    return compressed_tensors.scheme_of(found, "model.layers.0.mlp.up_proj", "m")


PACK_CASES = ["w4a16_g64_sym", "w4a16_g64_asym", "w4a16_channel_asym", "w3a16_g64_sym"]
PACK_CASES += ["w5a16_g64_asym", "w8a16_g64_sym"]


@pytest.mark.parametrize("case", PACK_CASES)
def test_compressed_tensors_reads_and_writes_packed_integers(case):
    weights, s = scheme(case)
    parts = {k.split("__")[1]: v for k, v in PACKED.items() if k.startswith(case + "__")}
    wanted = parts.pop("dequant")
    q = compressed_tensors.read(parts, s, np.float32, "m")
    np.testing.assert_array_equal(values(q), wanted)
    found, about = compressed_tensors.write(q)
    same_bytes(found, parts)
    assert about == weights | {"dynamic": False}


def test_compressed_tensors_reads_int8_as_it_is():
    parts = {k: PACKED[f"w8a8__{k}"] for k in ("weight", "weight_scale")}
    q = compressed_tensors.read(parts, scheme("w8a8")[1], np.float32, "m")
    np.testing.assert_array_equal(values(q), PACKED["w8a8__dequant"])


@pytest.mark.parametrize(("case", "format"), [("nvfp4a16", "nvfp4"), ("mxfp4a16", "mxfp4")])
def test_compressed_tensors_reads_and_writes_fp4(case, format):
    """The library's values are in bfloat16 where scales have scales."""
    weights = {"num_bits": 4, "type": "float", "symmetric": True}
    how = {"nvfp4": ("tensor_group", 16, "float8_e4m3fn"), "mxfp4": ("group", 32, "uint8")}[format]
    weights |= {"strategy": how[0], "group_size": how[1], "scale_dtype": f"torch.{how[2]}"}
    s = settings_of(weights)
    held = {k.split("__")[1]: v for k, v in SMALL.items() if k.startswith(case + "__")}
    wanted = held.pop("dequant")
    if format == "nvfp4":
        held["weight_scale"] = held["weight_scale"].view(E4M3)
    q = compressed_tensors.read(held, s, np.float32, "m")
    assert (q.format, compressed_tensors.format_of(weights)) == (format, f"{format}-pack-quantized")
    np.testing.assert_array_equal(values(q).astype(jnp.bfloat16), wanted.astype(jnp.bfloat16))
    found, about = compressed_tensors.write(q)
    assert about == weights | {"dynamic": False}
    for part, array in held.items():
        if part == "weight_global_scale":
            np.testing.assert_allclose(found[part], array, rtol=2**-23)
        else:
            np.testing.assert_array_equal(found[part].view(np.uint8), array.view(np.uint8), part)


def modelopt_parts(case):
    parts = {k.split("__")[1]: MODELOPT[k] for k in MODELOPT if k.startswith(f"{case}__")}
    held = parts.pop("values")
    if case.startswith("fp8") or case == "mxfp8":
        parts["weight"] = parts["weight"].view(E4M3)
    if case == "nvfp4":
        parts["weight_scale"] = parts["weight_scale"].view(E4M3)
    return parts, held


MODELOPT_CASES = {
    "nvfp4": ("nvfp4", (16, 1)),
    "fp8": ("fp8_e4m3", (256, 16)),
    "fp8_per_channel_per_token": ("fp8_e4m3", (256, 1)),
    "fp8_pb_wo": ("fp8_e4m3", (128, 128)),
    "mxfp8": ("mxfp8", (32, 1)),
    "mxfp4": ("mxfp4", (32, 1)),
    "w8a16": ("int8", (256, 1)),
    "w8a8_sq_per_channel": ("int8", (256, 1)),
    "w4a16_awq": ("int4", (128, 1)),
}


@pytest.mark.parametrize("case", MODELOPT_CASES)
def test_modelopt_is_read(case):
    assert MODELOPT_CASES.keys() == {k.split("__")[0] for k in MODELOPT}
    parts, held = modelopt_parts(case)
    modelopt.settings({"quant_algo": case.upper()}, "m")
    assert modelopt.shape(parts, None, "m") == held.shape
    q = modelopt.read(parts, None, np.float32, "m")
    assert (q.format, q.block) == MODELOPT_CASES[case]
    if "pre_quant_scale" in parts:
        held = held * parts["pre_quant_scale"]
        x = np.random.default_rng(0).normal(size=(3, held.shape[1])).astype(np.float32)
        y = qjax.quantized(lambda w, x: x @ w)(q, x)
        np.testing.assert_allclose(y, x @ held.T, rtol=1e-5, atol=1e-6)
    # its quantizer multiplies by the reciprocal of a reciprocal
    np.testing.assert_allclose(values(q), held, rtol=4e-7, atol=0)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("nvfp4", {"weight_scale_2": None}, r"'weight_scale_2' must be float32 \(\), is missing"),
        ("nvfp4", {"weight_scale_2": np.float32(0)}, "'weight_scale_2' is 0"),
        ("nvfp4", {"weight": np.zeros((16, 4), np.uint8)}, "no whole groups of 16"),
        ("nvfp4", {"weight": np.zeros((16, 128), np.int16)}, "belong to nothing"),
        ("mxfp4", {"weight_scale": np.zeros((16, 7), np.uint8)}, "'weight_scale' must be"),
        ("mxfp8", {"weight_scale": np.zeros((16, 7), np.uint8)}, "'weight_scale' must be"),
        ("fp8", {"weight": None}, "'weight' must be a matrix, is missing"),
        ("fp8", {"weight_scale": np.zeros((2, 2), np.float32)}, "'weight_scale' must be"),
        ("fp8_pb_wo", {"weight_scale": np.zeros((1, 1, 3, 1), np.float32)}, "'weight_scale' must"),
        ("fp8_pb_wo", {"weight_scale": np.zeros((1, 2, 2, 1), np.float32)}, "'weight_scale' must"),
        ("w8a16", {"weight_scale": np.zeros(15, np.float32)}, "'weight_scale' must be"),
        ("w4a16_awq", {"weight_scale": np.zeros((16, 3), np.float32)}, "of 256 inputs is"),
        ("w4a16_awq", {"weight_scale": np.zeros((8, 2), np.float32)}, "'weight_scale' must be"),
        ("w8a16", {"pre_quant_scale": np.ones(255, np.float32)}, "'pre_quant_scale' must be"),
        ("w8a16", {"pre_quant_scale": np.zeros(256, np.float32)}, "must be positive"),
    ],
)
def test_modelopt_that_does_not_fit_is_refused(case, change, message):
    parts = {k: v for k, v in (modelopt_parts(case)[0] | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        modelopt.read(parts, None, np.float32, "m")


def test_scales_of_the_cache_are_passed_over():
    parts = {f"l.k_proj.{k}": v for k, v in modelopt_parts("fp8")[0].items()}
    scale = {"l.k_proj.k_scale": np.ones((), np.float32)}
    about = {"quant_method": "modelopt", "quant_algo": "FP8"}
    held = codecs.Matrices(about, parts | scale, "c")
    assert held.used == {*parts, *scale}


def test_what_modelopt_does_in_ways_that_are_not_known_is_refused():
    for config, message in (
        ({}, "key 'quant_algo': can be read: .*; is None"),
        ({"quant_algo": "W4A8_AWQ"}, "is 'W4A8_AWQ'"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": [3]}, "object of objects"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}},
            "is 'X'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            modelopt.settings(config, "m")


def test_fp4_that_does_not_fit_is_refused():
    fp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    s = settings_of(fp4)
    good = {k.split("__")[1]: v for k, v in SMALL.items() if k.startswith("nvfp4a16__")}
    good["weight_scale"] = good["weight_scale"].view(E4M3)
    del good["dequant"]
    for part, value, message in (
        ("weight_global_scale", np.zeros(1, np.float32), "is 0.0, must be positive"),
        ("weight_global_scale", np.full(1, 1e-40, np.float32), "must be positive"),
        ("weight_global_scale", np.full(1, np.nan, np.float32), "is nan, must be positive"),
        ("weight_global_scale", None, r"'weight_global_scale' must be float32 \(1,\), is missing"),
        ("weight_scale", good["weight_scale"][:, :-1], "weight_scale"),
        ("weight_packed", good["weight_packed"][:, :-1], "no whole groups of 16"),
        ("weight_packed", None, "codes of nvfp4 must be a matrix of uint8, are missing"),
    ):
        parts = {k: v for k, v in (good | {part: value}).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            compressed_tensors.read(parts, s, np.float32, "m")
    for change, message in (
        ({"group_size": 32}, "nvfp4 has no groups of 32"),
        ({"strategy": "channel"}, "float of 4 bits have no 'strategy' 'channel'"),
        ({"num_bits": 8}, "float of 8 bits have no 'strategy' 'tensor_group'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(fp4 | change)
    w = jnp.ones((64, 32))
    for q in (qjax.quantize(w, "nvfp4", axis=1), qjax.quantize(w[None], "mxfp4", axis=1)):
        with pytest.raises(ValueError, match="a matrix of whole groups"):
            compressed_tensors.write(q)


@pytest.mark.parametrize("case", ["fp8", "fp8_dynamic", "fp8_block", "fp8_block16x64_ragged40x200"])
def test_compressed_tensors_reads_and_writes_fp8(case):
    weights, s = scheme(case, "float")
    held = PACKED if case == "fp8" else FP8
    parts = {k: held[f"{case}__{k}"] for k in ("weight", "weight_scale")}
    parts["weight"] = parts["weight"].view(E4M3)
    q = compressed_tensors.read(parts, s, np.float32, "m")
    np.testing.assert_array_equal(values(q), held[f"{case}__dequant"])
    found, about = compressed_tensors.write(q)
    same_bytes(found, parts)
    assert about == weights | {"dynamic": False}


@pytest.mark.parametrize("case", ["hf_fp8_b32x128", "hf_fp8_b64x64"])
def test_fine_grained_fp8_is_that_of_transformers(case):
    block = [int(v) for v in case.rpartition("_b")[2].split("x")]
    parts = {"weight_scale_inv": FP8[f"{case}__weight_scale_inv"]}
    parts["weight"] = FP8[f"{case}__weight_u8"].view(E4M3)
    s = fine_grained_fp8.settings({"weight_block_size": block}, "c")
    q = fine_grained_fp8.read(parts, s, np.float32, "m")
    np.testing.assert_array_equal(values(q), FP8[f"{case}__dequant"])


def bnb_parts(kind, block):
    """Of a golden matrix, with the JSON that transformers writes."""
    case, name = f"{kind}_bs{block}__", f"weight.quant_state.bitsandbytes__{kind}"
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [64, 256]}
    return {
        "weight": BNB[case + "packed"],
        "weight.absmax": BNB[case + "absmax"],
        "weight.quant_map": BNB[f"{kind}_code"],
        name: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(kind, block):
    parts = bnb_parts(kind, block)
    q = bitsandbytes.read(parts, None, np.float32, "m")
    np.testing.assert_array_equal(values(q), BNB[f"{kind}_bs{block}__dequant"])
    same_bytes(bitsandbytes.write(q), parts | {"weight": parts["weight"].reshape(-1, 1)})


@pytest.mark.parametrize(
    ("file", "dequant", "bound"),
    [
        ("bnb_linear4bit_nf4_nested", "nf4_bs64_nested__dequant", 0),
        ("bnb_linear8bitlt", "int8__dequant", 2.0**-22),  # two products, rounded once here
    ],
)
def test_files_of_bitsandbytes(file, dequant, bound):
    tensors, _ = safetensors.read(GOLDEN / f"{file}.safetensors")
    held = codecs.Matrices({"quant_method": "bitsandbytes"}, tensors, "c")
    assert held.shapes == {"layer.weight": (64, 256)}
    assert tensors.keys() - held.used == {"layer.bias"}
    q = held.read("layer.weight", np.float32)
    np.testing.assert_allclose(values(q), BNB[dequant], rtol=bound, atol=0)
    if file == "bnb_linear8bitlt":  # the scales of the other have scales, which are not written
        written = {f"layer.{part}": v for part, v in bitsandbytes.write(q).items()}
        same_bytes(written, {name: tensors[name] for name in held.used})


def test_bitsandbytes_says_what_does_not_fit():
    parts, name = bnb_parts("nf4", 64), "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(parts[name].tobytes())
    told = lambda **change: np.frombuffer(json.dumps(state | change).encode(), np.uint8)
    for part, value, message in (
        (name, None, "needs one"),
        (name, told(shape=[64]), "is none of a matrix in nf4"),
        (name, told(blocksize=True), "is none of a matrix in nf4"),
        (name, told(quant_type="fp4"), "is none of a matrix in nf4"),
        (name, told(shape=[128, 96], blocksize=64), "rows of 96 inputs are no whole blocks of 64"),
        (name, told(shape=[64, 1 << 40]), "'weight.absmax' must be"),
        (name, told(nested_blocksize=256), "has no blocks of scales"),
        (name, np.frombuffer(b"[]", np.uint8), "must be an object"),
        ("weight.absmax", parts["weight.absmax"][1:], "'weight.absmax' must be .*float32 .255,."),
        ("weight.quant_map", parts["weight.quant_map"] * 2, "holds other values than nf4's"),
        ("weight", parts["weight"][1:], "'weight' must be 8192 bytes, is uint8"),
    ):
        with pytest.raises(ValueError, match=f"^m: .*{message}"):
            bitsandbytes.read(changed(parts, part, value), None, np.float32, "m")
    parts = {"weight": BNB["int8__CB"], "SCB": BNB["int8__SCB"].reshape(-1)}
    for part, value, message in (
        ("SCB", parts["SCB"][1:], r"'SCB' must be float32 \(64,\)"),
        ("weight", parts["weight"].astype("u1"), "'weight' must be a matrix of int8, is uint8"),
        ("weight_format", np.uint8(2) + np.zeros((), "u1"), "'weight_format' must be 0"),
    ):
        with pytest.raises(ValueError, match=f"^m: .*{message}"):
            bitsandbytes.read(changed(parts, part, value), None, np.float32, "m")


def test_a_name_counts_before_a_pattern_and_a_pattern_before_a_class():
    weights = lambda bits: {"num_bits": bits, "type": "int", "strategy": "channel"}
    targets = {8: ["Linear"], 4: [r"re:.*up_proj"], 3: ["model.layers.1.mlp.up_proj"]}
    groups = {str(b): {"targets": t, "weights": weights(b)} for b, t in targets.items()}
    s = compressed_tensors.settings({"config_groups": groups}, "c")
    bits = lambda name: compressed_tensors.scheme_of(s, name, "m").bits
    names = ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")
    assert [bits(n) for n in (*names, "model.layers.1.mlp.up_proj")] == [8, 4, 3]
    del groups["8"]
    s = compressed_tensors.settings({"config_groups": groups}, "c")
    with pytest.raises(ValueError, match="m: no group of 'config_groups' has it as a target"):
        compressed_tensors.scheme_of(s, names[0], "m")


def changed(parts, name, value):
    return {k: v for k, v in parts.items() if k != name} | ({} if value is None else {name: value})


GOOD = gptq_parts("w4_g64_asym_actorder", "v2")
BAD_GPTQ = {
    "missing": ("qzeros", None, r"'qzeros' must be int32 \(4, 8\), is missing"),
    "vector": ("scales", GOOD["scales"][0], r"'scales' .* \(4, 64\), is float16 \(64,\)"),
    "words": ("qweight", GOOD["qweight"][1:], r"'qweight' .* \(32, 64\), is int32 \(31, 64\)"),
    "matrix": ("qweight", GOOD["qweight"][0], r"'qweight' must be a matrix, is int32 \(64,\)"),
    "groups": ("scales", GOOD["scales"][1:], r"'scales' .* \(4, 64\), is float16 \(3, 64\)"),
    "index": ("g_idx", GOOD["g_idx"][16:], r"64 outputs of 240 .* \(30, 64\), is int32 \(32, 64\)"),
    "real index": ("g_idx", GOOD["g_idx"].astype("f4"), r"'g_idx' must be int32 or int64 \(256,\)"),
    "uneven": ("g_idx", GOOD["g_idx"] * 0, "'g_idx' does not put 64 inputs into each group"),
    "negative": ("g_idx", GOOD["g_idx"] - 1, "'g_idx' does not put 64 inputs into each group"),
    "floats": ("qweight", GOOD["qweight"].astype("f4"), "'qweight' must be int32 .* is float32"),
    "scales": ("scales", GOOD["scales"].astype("i4"), "'scales' must be float16 or .* is int32"),
    "double": ("scales", GOOD["scales"].astype("f8"), "'scales' must be float16 or .* is float64"),
}


@pytest.mark.parametrize("name", BAD_GPTQ)
def test_gptq_says_what_does_not_fit(name):
    part, value, message = BAD_GPTQ[name]
    with pytest.raises(ValueError, match=f"^m: .*{message}"):
        gptq.read(changed(GOOD, part, value), gptq.Settings(4, 64, False), np.float16, "m")


def test_awq_and_compressed_tensors_say_what_does_not_fit():
    parts = {part: AWQ[f"g64__gemm__{part}"] for part in awq.PARTS}
    with pytest.raises(
        ValueError, match=r"^m: .*'qzeros' must be int32 \(2, 8\), is int32 \(4, 8\)"
    ):
        awq.read(parts, awq.Settings(128), np.float16, "m")
    case = "w4a16_g64_asym"
    parts = {k.split("__")[1]: v for k, v in PACKED.items() if k.startswith(case + "__")}
    del parts["dequant"]
    s = scheme(case)[1]
    for part, value, message in (
        (
            "weight_packed",
            parts["weight_packed"][:, 1:],
            r"'weight_packed' must be int32 \(64, 32\), is int32 \(64, 31\)",
        ),
        ("weight_zero_point", None, r"'weight_zero_point' must be int32 \(8, 4\), is missing"),
        ("weight_shape", np.array([1 << 60, 1 << 60]), r"'weight_packed' .* is int32 \(64, 32\)"),
        ("weight_shape", np.array([64, -256]), r"'weight_packed' .* is int32 \(64, 32\)"),
        (
            "weight_scale",
            parts["weight_scale"].T,
            r"'weight_scale' must be float16 or .* \(64, 4\), is float32 \(4, 64\)",
        ),
        ("weight", parts["weight_packed"].astype("i1"), "'weight' is int8"),
        ("weight_packed", None, r".* are no tensors of Scheme"),
    ):
        with pytest.raises(ValueError, match=f"^m: .*{message}"):
            compressed_tensors.read(changed(parts, part, value), s, np.float32, "m")


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
BAD_SETTINGS = {
    "method": ({"quant_method": "quip"}, "key 'quant_method': can be read: gptq, awq, .* 'quip'"),
    "bits": ({"quant_method": "gptq", "bits": 5}, "key 'bits': must be one of"),
    "bool": ({"quant_method": "gptq", "bits": True}, "key 'bits'"),
    "group": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "key 'group_size'"),
    "version": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "key 'checkpoint_format': must be 'gptq' or 'gptq_v2', is 'marlin'",
    ),
    "dynamic": ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:x": {}}}, "key 'dynamic'"),
    "awq version": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"},
        "key 'version': only AutoAWQ's 'gemm' is read, is 'gemv'",
    ),
    "llm-awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "backend": "llm-awq"},
        "only AutoAWQ's 'gemm' is read, is 'gemm', backend 'llm-awq'",
    ),
    "float": ({"quant_method": "gptq", "bits": 4.0}, "key 'bits': must be one of"),
    "awq bits": ({"quant_method": "awq", "bits": 8, "group_size": 64}, "AWQ has 4, is 8"),
    "groups": ({"quant_method": "compressed-tensors"}, "key 'config_groups': must be an object"),
    "block": ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two counts"),
    **{
        name: (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": targets, "weights": INT4 | change}},
            },
            message,
        )
        for name, targets, change, message in (
            (
                "mxfp6",
                ["Linear"],
                {"type": "float", "num_bits": 6},
                "weights of 6 bits of type 'float'",
            ),
            ("strategy", ["Linear"], {"strategy": "row"}, "'strategy' must be one of"),
            ("targets", "Linear", {}, "'targets' must be a list of names"),
            ("pattern", ["re:("], {}, "target 're:\\(' is no pattern"),
            ("slow", ["re:(.+)+X"], {}, "repeats a group, or too often"),
            ("huge", ["re:a{99999999999999999999}"], {}, "is no pattern"),
            ("deep", ["re:" + "(" * 20000 + ")" * 20000], {}, "is no pattern"),
            ("size", ["Linear"], {"group_size": None}, "'group_size' must be a count"),
            ("order", ["Linear"], {"actorder": "group"}, "'actorder' 'group' is not read"),
        )
    },
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_are_not_read(name):
    config, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=f"^c: .*{message}"):
        codecs.Matrices(config, {}, "c")


def test_files_hold_nothing_that_is_not_written():
    """What a layout has no place for changes the values, so that leaving it out would be wrong."""
    q = qjax.quantize(jnp.ones((32, 32)), "int4_g16", axis=0)
    ones = jnp.ones(32)
    for changes in ({"input_scale": ones}, {"signs": ones}, {"spec": qjax.Spec("int8")}):
        act = Activation(axis=(-2,) if "spec" not in changes else (), **changes)
        with pytest.raises(ValueError, match="with an activation"):
            groups.from_qtensor(dataclasses.replace(q, activation=act))
    ordered = Activation(axis=(-2,), permutation=jnp.arange(32)[::-1])
    for write in (awq.write, compressed_tensors.write):
        with pytest.raises(ValueError, match="inputs in their order"):
            write(dataclasses.replace(q, activation=ordered))
    both = qjax.quantize(jnp.ones((32, 32)), "uint4_g16", axis=0)
    both = dataclasses.replace(both, zero_point=jnp.ones((2, 32), jnp.uint8))
    with pytest.raises(ValueError, match="these files hold matrices of int2 to int8"):
        groups.from_qtensor(both)
    high = dataclasses.replace(both, offset=None, zero_point=jnp.full((2, 32), 16, jnp.uint8))
    for write in (awq.write, compressed_tensors.write):
        with pytest.raises(ValueError, match="has zero points 16 to 16"):
            write(high)
    assert gptq.write(high, less_one=True)["qzeros"].tolist() == [[-1] * 4] * 2
    for spec, shape, message in (
        ("int5_g16", (32, 32), r"hold \(2, 3, 4, 8\) bits"),
        ("int4_g16", (32, 20), "outputs that fill words of 32"),
        ("int4_g12", (32, 32), "groups that divide the 32 inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            gptq.write(qjax.quantize(jnp.ones(shape), spec, axis=0))
    for spec in ("fp8_e4m3_g16", "fp8_e4m3_1x16"):
        with pytest.raises(ValueError, match="FP8"):
            compressed_tensors.write(qjax.quantize(jnp.ones((32, 32)), spec, axis=0))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_of_signed_codes_are_written_as_unsigned(bits):
    w = np.random.default_rng(bits).normal(0.5, 1, (64, 32)).astype(np.float32)
    spec = qjax.Spec.parse(f"int{bits}_g16_asym")._replace(zero_dtype="int8")
    q = qjax.quantize(jnp.asarray(w), spec, axis=0)
    assert int(q.zero_point.min()) < 0
    back = gptq.read(gptq.write(q), gptq.Settings(bits, 16, less_one=False), np.float32, "m")
    assert back.format == f"uint{bits}"
    np.testing.assert_array_equal(values(back), values(q))


def experts(*changes):
    """A QTensor for each change of the tensors of one matrix."""
    parts = gptq_parts("w4_g64_sym", "v2")
    s = gptq.Settings(4, 64, less_one=False)
    return [gptq.read(parts | change, s, np.float32, "m") for change in changes]


def test_experts_are_brought_into_one_form():
    zeros = GPTQ["w4_g64_asym__qzeros_v2"]
    order = GPTQ["w4_g64_sym_actorder__g_idx"]
    parts = experts({}, {"qzeros": zeros}, {"g_idx": order})
    parts.append(gptq.read(gptq_parts("w4_g64_sym", "v2"), gptq.Settings(4, 64), np.float32, "m"))
    high = {"qzeros": np.full_like(zeros, -1)}  # 15, which stands for 16
    parts.append(gptq.read(gptq_parts("w4_g64_sym", "v2") | high, gptq.Settings(4, 64), "f4", "m"))
    made = groups.alike(parts, "m")
    assert {(q.format, q.zero_point.dtype.name) for q in made} == {("uint4", "uint8")}
    assert len({jax.tree.structure(q) for q in made}) == 1
    for a, b in zip(made, parts, strict=True):
        np.testing.assert_array_equal(values(a), values(b))
    other = gptq.read(gptq_parts("w8_g64_sym", "v2"), gptq.Settings(8, 64, False), "f4", "m")
    with pytest.raises(ValueError, match=r"m: are in unlike forms: .*int4.*int8"):
        groups.alike([parts[0], other], "m")


def test_tensors_that_would_be_passed_over():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    tensors = {f"a.up.{k}": v for k, v in gptq_parts("w4_g64_sym", "v1").items()}
    with pytest.raises(ValueError, match=r"'a.up': there is a tensor 'weight' beside 'qweight'"):
        codecs.Matrices(config, tensors | {"a.up.weight": np.ones((64, 256), "f4")}, "c")
    cache = {"a.self_attn.k_scale": np.ones(1, "f4")}
    assert codecs.Matrices(config, tensors | cache, "c").used == {*tensors, *cache}
    for case in ("w4a16_g64_sym", "w8a8"):
        parts = {k.split("__")[1]: v for k, v in PACKED.items() if k.startswith(case + "__")}
        parts |= {"weight_zero_point": np.ones((64, 1), np.int8)}
        with pytest.raises(ValueError, match="m: has zero points, which"):
            compressed_tensors.read(parts, scheme(case)[1], np.float32, "m")
    empty = {"a.weight": np.ones((0, 256), E4M3), "a.weight_scale_inv": np.ones((0, 2), "f4")}
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match=r"'a': is empty, \(0, 256\)"):
        codecs.Matrices(config, empty, "c")
    held = {"weight": np.ones((64, 256), E4M3), "weight_scale_inv": np.ones((2, 2), "f4")}
    s = fine_grained_fp8.settings(config, "c")
    with pytest.raises(
        ValueError, match=r"'weight_scale_inv' must be .* \(1, 2\), is float32 \(2, 2\)"
    ):
        fine_grained_fp8.read(held, s, np.float32, "m")


BAD_WEIGHTS = {
    "nf4": ("nf4_g16", "is QTensor.nf4"),
    "offset": ("uint4_g16", "is QTensor.uint4"),
    "nested": (qjax.Spec.parse("nf4_g64_dq")._replace(format="int4"), "scales of one level"),
    "across": ("int4_16x16", "in groups along their inputs"),
}


@pytest.mark.parametrize("name", few(list(BAD_WEIGHTS), ["nf4", "across"]))
@pytest.mark.parametrize("write", [gptq.write, awq.write, compressed_tensors.write])
def test_what_a_layout_does_not_hold_is_not_written(name, write):
    spec, message = BAD_WEIGHTS[name]
    q = qjax.quantize(jnp.ones((32, 32)), spec, axis=0)
    with pytest.raises(ValueError, match=message):
        write(q)
