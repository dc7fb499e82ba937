"""What quantize makes of the golden matrix, bit for bit what other libraries made of it."""

import ctypes
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import FORMATS, join_planes
from qjax.ggml_rounding import GGML_METHODS
from qjax.io.ggml_types import GGML_TYPES, from_qtensor

GOLDEN = pathlib.Path(__file__).parent / "golden"
BNB = np.load(GOLDEN / "bitsandbytes.npz")
FP8 = np.load(GOLDEN / "fp8.npz")
GGML = np.load(GOLDEN / "ggml_types.npz")
MICRO = np.load(GOLDEN / "microscaling.npz")


def nibbles(q):
    """The codes in bitsandbytes' order: row by row of [out, in], earlier ones in high nibbles."""
    codes = np.asarray(q.qvalue).astype(np.uint8).T.reshape(-1, 2)
    return codes[:, :1] << 4 | codes[:, 1:]


def in_rows(x):
    """Of [in, out], flat as bitsandbytes keeps [out, in]."""
    return np.asarray(x).T.ravel()


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize(("format", "name"), [("nf4", "nf4"), ("fp4_bnb", "fp4")])
def test_4_bit_codebooks_are_those_of_bitsandbytes(format, name, block):
    q = qjax.quantize(BNB["input"].T, f"{format}_g{block}", 0)
    np.testing.assert_array_equal(nibbles(q), BNB[f"{name}_bs{block}__packed"])
    np.testing.assert_array_equal(in_rows(q.scale), BNB[f"{name}_bs{block}__absmax"])
    for dequantize in (qjax.dequantize, jax.jit(qjax.dequantize)):
        np.testing.assert_array_equal(dequantize(q).T, BNB[f"{name}_bs{block}__dequant"])


def test_nf4_of_bfloat16_weights_is_that_of_bitsandbytes():
    q = qjax.quantize(jnp.asarray(BNB["input"].T, jnp.bfloat16), "nf4_g64", 0)
    np.testing.assert_array_equal(nibbles(q), BNB["nf4_bs64_bf16in__packed"])
    np.testing.assert_array_equal(in_rows(q.scale), BNB["nf4_bs64_bf16in__absmax"])
    w = qjax.dequantize(q)
    assert w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(w.astype(jnp.float32).T, BNB["nf4_bs64_bf16in__dequant_as_f32"])


def test_double_quantized_nf4_is_that_of_bitsandbytes():
    q = qjax.quantize(BNB["input"].T, "nf4_g64_dq", 0)
    golden = {k.removeprefix("nf4_bs64_nested__"): v for k, v in BNB.items()}
    np.testing.assert_array_equal(nibbles(q), golden["packed"])
    np.testing.assert_array_equal(in_rows(q.scale.qvalue), golden["absmax"])
    np.testing.assert_array_equal(in_rows(q.scale.scale), golden["nested_absmax"])
    np.testing.assert_array_equal(in_rows(q.scale.offset), golden["nested_offset"])
    for dequantize in (qjax.dequantize, jax.jit(qjax.dequantize)):
        np.testing.assert_array_equal(in_rows(dequantize(q.scale)), golden["absmax_dequant"])
        np.testing.assert_array_equal(dequantize(q).T, golden["dequant"])


def test_codebooks_are_those_of_bitsandbytes():
    tables = {"nf4": "nf4_code", "fp4_bnb": "fp4_code"}
    tables["dynamic8"] = "nf4_bs64_nested__nested_quant_map"
    for name, golden in tables.items():
        codes = jnp.arange(len(BNB[golden]), dtype=jnp.uint8)
        values = FORMATS[name].decode(codes, jnp.dtype(jnp.float32))
        np.testing.assert_array_equal(values, BNB[golden])


def test_int8_is_that_of_bitsandbytes():
    """Codes and scales to the bit, and values in the weight's dtype, float16.

    In float32 bitsandbytes multiplies (code * max) * (1/127), we code * (max / 127): the last bit
    may differ.
    """
    q = qjax.quantize(BNB["int8_input_f16"].T, "int8", 0)
    np.testing.assert_array_equal(q.qvalue.T, BNB["int8__CB"])
    np.testing.assert_array_equal(np.ravel(q.scale), BNB["int8__SCB"] / np.float32(127))
    w = qjax.dequantize(q).T
    assert w.dtype == np.float16
    np.testing.assert_array_equal(w, BNB["int8__dequant"].astype(np.float16))
    wide = qjax.dequantize(dataclasses.replace(q, dtype=np.dtype(np.float32))).T
    np.testing.assert_array_max_ulp(np.asarray(wide), BNB["int8__dequant"], maxulp=1)


def fp8_bits(q):
    return np.asarray(q.qvalue.T).view(np.uint8)


@pytest.mark.parametrize(
    ("case", "spec", "rows", "columns"),
    [
        ("fp8_dynamic", "fp8_e4m3", 64, 256),
        ("fp8_block", "fp8_e4m3_128x128", 64, 256),
        ("fp8_block16x64_ragged40x200", "fp8_e4m3_64x16", 40, 200),
    ],
)
def test_fp8_is_that_of_compressed_tensors(case, spec, rows, columns):
    """All but its scale of zero rows, which is float32's epsilon there and 0 here."""
    w = FP8["input_f32"][:rows, :columns]
    q = qjax.quantize(w.T, spec, 0)
    np.testing.assert_array_equal(fp8_bits(q), FP8[f"{case}__weight"])
    scale = FP8[f"{case}__weight_scale"]
    np.testing.assert_array_equal(q.scale.T, np.where(scale == np.finfo("f4").eps, 0, scale))
    np.testing.assert_array_equal(qjax.dequantize(q).T, FP8[f"{case}__dequant"])


@pytest.mark.parametrize(
    ("case", "spec"),
    [("hf_fp8_b32x128", "fp8_e4m3_128x32"), ("hf_fp8_b64x64", "fp8_e4m3_64x64")],
)
def test_fp8_codes_are_those_of_transformers(case, spec):
    """Its scale is 1 / (448 * (1 / max)), three roundings where max / 448 has one."""
    q = qjax.quantize(FP8["input_f32"].T, spec, 0)
    np.testing.assert_array_equal(fp8_bits(q), FP8[f"{case}__weight_u8"])
    np.testing.assert_array_max_ulp(
        np.asarray(q.scale.T), FP8[f"{case}__weight_scale_inv"], maxulp=1
    )
    np.testing.assert_allclose(qjax.dequantize(q).T, FP8[f"{case}__dequant"], rtol=2**-22)


def ggml_spec(name):
    return qjax.Spec.parse(name)._replace(scale_method="ggml")


def mx_bits(q):
    """Codes as bits, [out, in], and the scales' bytes."""
    fmt = FORMATS[q.format]
    codes = np.asarray(join_planes(fmt, q.qvalue).T)
    return codes.view(np.uint8), np.asarray(q.scale.T).view(np.uint8)


def unpacked(packed, bits):
    """Codes of a little-endian bit stream along rows."""
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[..., 0]


def mx_spec(name, method):
    return qjax.Spec.parse(name)._replace(scale_method=method)


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("mxfp6", 6), ("mxfp8", 8)])
def test_mx_is_that_of_compressed_tensors(name, bits):
    q = qjax.quantize(MICRO["input_f32"].T, name, 0)
    codes, scales = mx_bits(q)
    golden = MICRO[f"{name}a16__weight{'_packed' * (bits < 8)}"]
    np.testing.assert_array_equal(codes, unpacked(golden, bits))
    np.testing.assert_array_equal(scales, MICRO[f"{name}a16__weight_scale"])
    for dequantize in (qjax.dequantize, jax.jit(qjax.dequantize)):
        np.testing.assert_array_equal(dequantize(q).T, MICRO[f"{name}a16__dequant"])


def test_mxfp8_is_that_of_modelopt():
    q = qjax.quantize(MICRO["input_f32"].T, mx_spec("mxfp8", "mx_ceil"), 0)
    codes, scales = mx_bits(q)
    np.testing.assert_array_equal(codes, MICRO["modelopt_mxfp8__weight_u8"])
    np.testing.assert_array_equal(scales, MICRO["modelopt_mxfp8__scale"])
    np.testing.assert_array_equal(qjax.dequantize(q).T, MICRO["modelopt_mxfp8__dequant"])


def test_mxfp4_scales_are_those_of_modelopt():
    """Its codes are rounded half towards zero, ours half to even; its zeros are -0."""
    w = MICRO["input_f32"]
    q = qjax.quantize(w.T, mx_spec("mxfp4", "mx_ceil"), 0)
    codes, scales = mx_bits(q)
    np.testing.assert_array_equal(scales, MICRO["modelopt_mxfp4__scale"])
    theirs = unpacked(MICRO["modelopt_mxfp4__weight"], 4)
    values = np.abs(w / np.repeat(np.exp2(scales.astype(np.float32) - 127), 32, 1))
    middle = np.isin(values, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    differ = (codes != theirs) & ~((w == 0) & (theirs == 8))
    assert not np.any(differ & ~middle)


def test_nvfp4_is_that_of_modelopt():
    q = qjax.quantize(MICRO["input_f32"].T, "nvfp4", 0)
    codes = np.asarray(q.qvalue.T).view(np.uint8)
    np.testing.assert_array_equal(codes, unpacked(MICRO["modelopt_nvfp4__weight"], 4))
    scales = np.asarray(q.scale.qvalue.T).view(np.uint8)
    np.testing.assert_array_equal(scales, MICRO["modelopt_nvfp4__weight_scale_u8"])
    np.testing.assert_array_equal(
        np.ravel(q.scale.scale), MICRO["modelopt_nvfp4__weight_scale_2"].ravel()
    )
    for dequantize in (qjax.dequantize, jax.jit(qjax.dequantize)):
        np.testing.assert_array_equal(dequantize(q).T, MICRO["modelopt_nvfp4__dequant"])


def test_nvfp4_codes_are_those_of_compressed_tensors():
    """It keeps the reciprocal of the outer scale, and 0.125 as the scale of zeros."""
    q = qjax.quantize(MICRO["input_f32"].T, "nvfp4", 0)
    codes = np.asarray(q.qvalue.T).view(np.uint8)
    np.testing.assert_array_equal(codes, unpacked(MICRO["nvfp4a16__weight_packed"], 4))
    theirs = MICRO["nvfp4a16__weight_scale"]
    scales = np.asarray(q.scale.qvalue.T).view(np.uint8)
    zero = np.all(MICRO["input_f32"].reshape(64, 16, 16) == 0, -1)
    np.testing.assert_array_equal(scales[~zero], theirs[~zero])
    outer = 1 / MICRO["nvfp4a16__weight_global_scale"]
    np.testing.assert_allclose(np.ravel(q.scale.scale), outer, rtol=2**-23)


@pytest.mark.parametrize("name", GGML_METHODS)
def test_ggml_types_are_those_of_ggml_to_the_byte(name):
    w = GGML["input"]
    packed = GGML[f"{name.upper()}__packed"]
    np.testing.assert_array_equal(from_qtensor(qjax.quantize(w, ggml_spec(name), 1), False), packed)
    q = qjax.quantize(w.T, ggml_spec(name), 0)
    np.testing.assert_array_equal(from_qtensor(q, True), packed)
    np.testing.assert_array_equal(qjax.dequantize(q).T, GGML[f"{name.upper()}__dequant"])


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"])
def test_weights_on_a_grid_are_fitted_as_ggml_does(name):
    """Several fits leave nothing but rounding errors, and the last bit of a scale decides."""
    packed = from_qtensor(qjax.quantize(GGML["grid_input"], name, 1), False)
    np.testing.assert_array_equal(packed, GGML[f"{name.upper()}_grid__packed"])


@pytest.mark.slow
@pytest.mark.parametrize("name", GGML_METHODS)
def test_ggml_types_of_many_weights_are_those_of_llama_cpp(name):
    """Half a million weights of many sizes, some on a grid, some with outliers."""
    xllamacpp = pytest.importorskip("xllamacpp.xllamacpp", reason="needs the extra `peers`")
    quantize = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    kind = next((i, t) for i, t in GGML_TYPES.items() if t.name == name.upper())
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 2048)) * np.exp(rng.normal(0, 1, (256, 1))) * 0.02
    w[::3] = np.round(w[::3] * 200) / 200 + 0.0
    w[1::5] *= 1 + 10 * (rng.random(w[1::5].shape) < 0.05)
    w = w.astype(np.float32)
    packed = np.zeros((len(w), kind[1].row_bytes(w.shape[1])), np.uint8)
    quantize(kind[0], w.ctypes.data, packed.ctypes.data, 0, *w.shape, None)
    np.testing.assert_array_equal(from_qtensor(qjax.quantize(w, ggml_spec(name), 1), False), packed)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ternary_weights_are_kept_exactly(name):
    q = qjax.quantize(GGML["ternary_input"], name, 1)
    packed = GGML[f"{name.upper()}_ternary__packed"]
    np.testing.assert_array_equal(from_qtensor(q, False), packed)
    held = GGML["ternary_input"].astype(np.float16)
    np.testing.assert_array_equal(qjax.dequantize(q), held.astype(np.float32))


@pytest.mark.parametrize(
    "name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "mxfp4"]
)
def test_ggml_types_of_many_weights_are_those_of_the_gguf_package(name):
    """A second judge on a million weights: ties and signs that a small matrix lacks."""
    import gguf
    from gguf import quants

    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 4096), np.float32) * np.exp(rng.normal(0, 1, (256, 1)))
    w = w.astype(np.float32)
    w[::3] = np.round(w[::3] * 4) / 4 + 0.0  # the package keeps the sign of a block of -0.0
    packed = quants.quantize(w, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(from_qtensor(qjax.quantize(w, ggml_spec(name), 1), False), packed)


def test_requantizing_q4_1_to_uint4_groups_is_lossless():
    """Q4_1 spans its codes 0 to 15, so the minimum and maximum give back its scale and offset."""
    w = GGML["Q4_1__dequant"].T
    q = qjax.quantize(w, "uint4_g32", 0)
    assert (q.scale.dtype, q.offset.dtype) == (jnp.float16, jnp.float16)
    np.testing.assert_array_equal(qjax.dequantize(q), w)
