"""ggml blocks <-> QTensors, judged by bytes that ggml wrote and values that ggml decoded."""

import dataclasses
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.io import ggml_types
from qjax.io.ggml_types import CODECS, GGML_TYPES, from_qtensor, to_qtensor

GOLDEN = pathlib.Path(__file__).parent / "golden"
QUANTIZED = np.load(GOLDEN / "ggml_types.npz")
RANDOM = np.load(GOLDEN / "ggml_random_blocks.npz")
CASES = [
    *((name, QUANTIZED[f"{name}__packed"], QUANTIZED[f"{name}__dequant"]) for name in CODECS),
    *((name, RANDOM[f"{name}__bytes"], RANDOM[f"{name}__dequant"]) for name in CODECS),
]
IDS = [*(f"{name}-quantized" for name in CODECS), *(f"{name}-random" for name in CODECS)]


def bits(x):
    return (np.asarray(x) + np.float32(0)).view(np.uint32)  # MXFP4's code 8 is -0 here, 0 in ggml


def random_raw(rng, name, shape):
    """Bytes of random blocks; of TQ1_0, where several bytes mean the same codes, those of ggml."""
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * CODECS[name].struct.itemsize), np.uint8)
    if name == "TQ1_0":
        blocks = raw.view(CODECS[name].struct)
        for field, step in (("qs", 1), ("qh", 3)):
            values = rng.integers(0, 243 // step, blocks[field].shape) * step
            blocks[field] = -(-values * 256 // 243)
    return raw


@pytest.mark.parametrize("transpose", [False, True], ids=["as-filed", "transposed"])
@pytest.mark.parametrize(("name", "raw", "truth"), CASES, ids=IDS)
def test_decodes_as_ggml_does_and_gives_the_bytes_back(name, raw, truth, transpose):
    q = to_qtensor(raw, name, np.float32, transpose)
    truth = truth.T if transpose else truth
    assert (q.format, q.shape) == (name.lower(), truth.shape)
    np.testing.assert_array_equal(bits(qjax.dequantize(q)), bits(truth))
    np.testing.assert_array_equal(bits(jax.jit(qjax.dequantize)(q)), bits(truth))
    if name != "TQ1_0" or len(raw) > 8:  # random bytes mean codes that ggml writes otherwise
        np.testing.assert_array_equal(from_qtensor(q, transpose), raw)


@pytest.mark.parametrize("name", CODECS)
def test_leading_axes_are_stacked_tensors(name):
    raw = np.stack([RANDOM[f"{name}__bytes"], RANDOM[f"{name}__bytes"][::-1]])
    q = to_qtensor(raw, name, np.float32, transpose=True)
    truth = RANDOM[f"{name}__dequant"]
    np.testing.assert_array_equal(qjax.dequantize(q), np.stack([truth.T, truth[::-1].T]))
    np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(q), qjax.dequantize(q))
    again = to_qtensor(from_qtensor(q, transpose=True), name, np.float32, transpose=True)
    np.testing.assert_array_equal(qjax.dequantize(again), qjax.dequantize(q))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("name", CODECS)
def test_any_number_of_rows(name, rows, transpose):
    """Rows that are no multiple of eight leave bit planes ragged once they are the last axis."""
    rng = np.random.default_rng(rows)
    raw = random_raw(rng, name, (rows, 3))
    q = to_qtensor(raw, name, jnp.bfloat16, transpose)
    np.testing.assert_array_equal(from_qtensor(q, transpose), raw)
    assert qjax.dequantize(q).dtype == jnp.bfloat16


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 8, 29])
@pytest.mark.parametrize("name", CODECS)
def test_large_tensors_hold_the_same_leaves(name, rows, transpose, monkeypatch):
    """Packed on the host and unpacked eight rows at a time, as tensors of many codes are."""
    rng = np.random.default_rng(rows)
    raw = random_raw(rng, name, (2, rows, 2))
    small = to_qtensor(raw, name, np.float32, transpose)
    monkeypatch.setattr(ggml_types, "_SMALL", -1)
    monkeypatch.setattr(ggml_types, "_CODES_AT_ONCE", 1)
    large = to_qtensor(raw, name, np.float32, transpose)
    assert jax.tree.structure(small) == jax.tree.structure(large)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    np.testing.assert_array_equal(from_qtensor(large, transpose), raw)


@pytest.mark.parametrize(("name", "bytes_per_code"), [("Q4_0", 0.5), ("Q8_0", 1.0)])
def test_the_host_holds_no_more_than_the_codes(name, bytes_per_code):
    raw = np.zeros((40_000, 1024 // 32 * CODECS[name].struct.itemsize), np.uint8)
    tracemalloc.start()
    q = to_qtensor(raw, name, np.float32, transpose=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert q.shape == (40_000, 1024)
    assert peak < 40_000 * 1024 * (bytes_per_code + 2 / 32) + (12 << 20)


@pytest.mark.parametrize("name", CODECS)
def test_codes_survive_a_scale_of_any_bits(name):
    """NaN payloads and signed zeros in the float16 members come back as they went in."""
    raw = random_raw(np.random.default_rng(0), name, (8, 1))
    blocks = raw.view(CODECS[name].struct)
    floats = [n for n in ("d", "m", "dmin") if blocks.dtype.fields.get(n, "?")[0] == np.float16]
    for member in floats:
        patterns = [0x7E01, 0xFE01, 0x7C00, 0xFC00, 0x8000, 0x0000, 0x0001, 0x83FF]
        blocks[member][:, 0] = np.array(patterns, np.uint16).view(np.float16)
    np.testing.assert_array_equal(from_qtensor(to_qtensor(raw, name, np.float32, True), True), raw)


@pytest.mark.parametrize("type_id", GGML_TYPES)
def test_type_table_agrees_with_the_gguf_package(type_id):
    import gguf

    known = {int(t): (t.name, gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    known |= {9: ("Q8_1", (32, 36))}  # the package says 40; ggml's own static_assert says 36
    known.setdefault(42, ("Q2_0", (64, 18)))  # newer than gguf 0.19
    assert known[type_id] == (GGML_TYPES[type_id].name, GGML_TYPES[type_id][1:])


def test_codecs_fill_the_blocks_of_the_type_table():
    sizes = {t.name: (t.elements, t.bytes) for t in GGML_TYPES.values()}
    for name, codec in CODECS.items():
        assert sizes[name] == (codec.elements, codec.struct.itemsize)


@pytest.mark.parametrize(
    ("raw", "name", "message"),
    [
        (np.zeros((2, 35), np.uint8), "Q8_0", r"multiple of 34, got uint8 of shape \(2, 35\)"),
        (np.zeros(34, np.uint8), "Q8_0", r"\[\.\.\., rows, row_bytes\]"),
        (np.zeros((2, 34), np.int8), "Q8_0", "got int8"),
        (np.zeros((2, 66), np.uint8), "IQ2_XXS", "'IQ2_XXS' has no codec; those that do: Q4_0"),
    ],
)
def test_bytes_that_are_no_blocks_raise(raw, name, message):
    with pytest.raises(ValueError, match=message):
        to_qtensor(raw, name, np.float32, False)


def test_qtensors_that_are_no_blocks_raise():
    w = jnp.ones((512, 8))
    with pytest.raises(ValueError, match="'INT8' has no codec"):
        from_qtensor(qjax.quantize(w, "int8", 0), True)
    q = to_qtensor(RANDOM["Q4_K__bytes"], "Q4_K", np.float32, True)
    with pytest.raises(ValueError, match=r"blocks of \(32,\)"):
        from_qtensor(q, False)
    wide = dataclasses.replace(q, offset=qjax.dequantize(q.offset))
    with pytest.raises(ValueError, match="'offset': 'float32'"):
        from_qtensor(wide, True)
    q8 = to_qtensor(RANDOM["Q8_0__bytes"], "Q8_0", np.float32, True)
    wide = dataclasses.replace(q8, scale=q8.scale.astype(jnp.float32))
    with pytest.raises(ValueError, match="'scale': 'float32'"):
        from_qtensor(wide, True)


@pytest.mark.parametrize(("columns", "needed"), [(64, 36), (96, None)])
def test_row_bytes(columns, needed):
    q4_k = next(t for t in GGML_TYPES.values() if t.name == "NVFP4")
    if needed is None:
        with pytest.raises(
            ValueError, match="96 elements is no whole number of NVFP4 blocks of 64"
        ):
            q4_k.row_bytes(columns)
    else:
        assert q4_k.row_bytes(columns) == needed
