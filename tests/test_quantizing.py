"""quantize and dequantize: accuracy against float64, edges, transformations, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import all_codes, few, without_round_trips

import qjax
from qjax import quantizing
from qjax.formats import FORMATS

SPECS = [
    *("int8", "int8_g32", "int8_tensor", "int8_g16_asym", "int4", "int4_g24", "int4_16x8"),
    *("uint8", "uint8_g32", "uint4", "uint4_g32", "uint4_g24", "nf4", "nf4_g64", "nf4_g24"),
    *("nf4_g64_dq", "fp8_e4m3", "fp8_e4m3_16x8", "fp8_e4m3_tensor", "fp8_e5m2", "fp8_e5m2_g24"),
    *("int2_g32", "uint2_g32", "int3_g32", "uint3_g24", "int5", "int6_16x8", "uint7_g24"),
    *(
        "fp4_bnb_g32",
        "fp4_e2m1_g32",
        "fp6_e2m3",
        "fp6_e3m2_16x8",
        "uint6",
        "int7_g32",
        "int8/int8_token",
    ),
]
SHORT_GGML = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"]  # blocks of 32, not 256
ZERO_POINTS = [
    qjax.Spec("uint4", 32, False, scale_method="minmax", zero_dtype="uint8"),
    qjax.Spec("int8", None, False, scale_method="minmax", zero_dtype="int8"),
]


MICRO = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "nvfp4"]
FEW = ["int8", "int4_16x8", "int3_g32", "uint2_g32", "uint4_g24", "nf4_g64_dq", "fp8_e4m3"]
FEW += ["mxfp4", "nvfp4", ZERO_POINTS[0]]


def normal(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def steps(spec):
    """Largest distance of two neighboring values of the format, in units of its largest."""
    fmt = FORMATS[qjax.Spec.parse(spec).format]
    values = fmt.decode(jnp.asarray(all_codes(fmt)), jnp.dtype("float32"))
    largest = fmt.max if qjax.Spec.parse(spec).symmetric else fmt.max - fmt.min
    return np.diff(np.sort(np.asarray(values))).max() / largest


@pytest.mark.parametrize("spec", [*SPECS, *MICRO, *ZERO_POINTS], ids=str)
def test_no_element_is_further_off_than_half_a_step(spec):
    """The scale may be rounded (bfloat16: 2^-8 of the largest), hence the second term."""
    w = normal(96, 40)
    q = qjax.quantize(w, spec, 0)
    assert (q.shape, q.dtype, q.format) == (w.shape, w.dtype, qjax.Spec.parse(spec).format)
    largest = np.abs(w).max(0) if qjax.Spec.parse(spec).block != () else np.abs(w).max()
    span = largest if qjax.Spec.parse(spec).symmetric else 2 * largest
    if qjax.Spec.parse(spec).block == (16, 8):
        span = np.repeat(np.abs(w).reshape(96, 5, 8).max((0, 2)), 8)
    error = np.abs(np.asarray(qjax.dequantize(q)) - w)
    coarse = 2 if spec in MICRO and spec != "nvfp4" else 1  # a power of two may be twice too large
    assert np.all(error <= span * (coarse * steps(spec) / 2 + 2**-8))


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_eager_and_jitted_agree_to_the_bit(spec):
    w = normal(96, 40)
    eager = qjax.quantize(w, spec, 0)
    jitted = jax.jit(lambda w: qjax.quantize(w, spec, 0))(w)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(qjax.dequantize(eager), jax.jit(qjax.dequantize)(eager))


@pytest.mark.parametrize(
    ("spec", "shape", "axis", "batch_axis", "block", "scale"),
    [
        ("int8", (96, 40), 0, (), (96, 1), (1, 40)),
        ("int8", (96, 40), 1, (), (40,), (96, 1)),
        ("int8", (96, 40), -2, (), (96, 1), (1, 40)),
        ("int8", (96,), 0, (), (96,), (1,)),
        ("int8", (1, 40), 0, (), (), (1, 40)),
        ("int8", (1, 40), 1, (), (40,), (1, 1)),
        ("int8_tensor", (3, 96, 40), 1, 0, (96, 40), (3, 1, 1)),
        ("int8_tensor", (3, 96, 40), 1, (), (3, 96, 40), (1, 1, 1)),
        ("int4_g32", (96, 40), 0, (), (32, 1), (3, 40)),
        ("int4_g32", (100, 40), 0, (), (32, 1), (4, 40)),
        ("int4_g128", (96, 40), 0, (), (96, 1), (1, 40)),
        ("int4_g1", (6, 40), 0, (), (), (6, 40)),
        ("int4_g32", (4, 80, 16), (0, 1), (), (32, 1), (4, 3, 16)),
        ("int8", (4, 80, 16), (0, 1), (), (4, 80, 1), (1, 1, 16)),
        ("int8", (4, 80, 16), (-3, -1), (), (4, 1, 16), (1, 80, 1)),
        ("nf4_g64", (2, 3, 128, 8), 2, (0, 1), (64, 1), (2, 3, 2, 8)),
        ("nf4_g64", (2, 128, 3, 8), 1, (0, 2), (64, 1, 1), (2, 2, 3, 8)),
        ("fp8_e4m3_128x128", (200, 130), 0, (), (128, 128), (2, 2)),
        ("fp8_e4m3_128x64", (130, 200), 1, (), (64, 128), (3, 2)),
        ("fp8_e4m3_128x64", (7, 128), 1, (), (7, 128), (1, 1)),
    ],
)
def test_blocks(spec, shape, axis, batch_axis, block, scale):
    """Each block's scale is its own largest element over the format's, found by brute force."""
    w = normal(*shape)
    q = qjax.quantize(w, spec, axis, batch_axis=batch_axis)
    assert q.block == block
    assert q.scale.shape == scale
    wide = (1,) * (w.ndim - len(block)) + block
    for index in np.ndindex(scale):
        part = w[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, wide, strict=True))]
        wanted = np.abs(part).max() / np.float32(FORMATS[q.format].max)
        np.testing.assert_array_equal(q.scale[index], np.asarray(wanted, q.scale.dtype))
    close = np.abs(qjax.dequantize(q) - w).max() < np.abs(w).max() * 0.2
    assert close


@pytest.mark.parametrize(
    ("length", "group"),
    [(257, None), (514, None), (1024, None), (997, 300), (1028, 514), (1100, 514), (1100, 1000)],
)
def test_long_strided_blocks_are_reduced_exactly(length, group):
    """Long reductions go in runs; prime, ragged and even lengths keep every block's extremes."""
    w = normal(length, 3)
    spec = qjax.Spec("int8", group)
    q = qjax.quantize(w, spec, 0)
    size = group or length
    starts = range(0, length, size)
    largest = np.stack([np.abs(w[i : i + size]).max(0) for i in starts])
    np.testing.assert_array_equal(q.scale, largest / np.float32(127))


@pytest.mark.parametrize("spec", FEW, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0,)])
def test_empty_arrays(spec, shape):
    q = qjax.quantize(np.zeros(shape, np.float32), spec, 0)
    assert qjax.dequantize(q).shape == shape


@pytest.mark.parametrize("spec", [*SPECS, *MICRO, *ZERO_POINTS, *SHORT_GGML], ids=str)
def test_zero_blocks_decode_to_zeros(spec):
    w = normal(64, 3)
    w[:, 1] = 0
    w = jnp.asarray(w)
    out = qjax.dequantize(qjax.quantize(w, spec, 0))
    if "tensor" not in str(spec) and "x8" not in str(spec) and "x128" not in str(spec):
        np.testing.assert_array_equal(out[:, 1], 0)
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(w * 0, spec, 0)), 0)


@pytest.mark.parametrize("spec", [*SPECS, *ZERO_POINTS, *SHORT_GGML], ids=str)
@pytest.mark.parametrize("value", [0.015625, -3.0, 65504.0])
def test_constant_blocks_keep_their_value(spec, value):
    """Exactly, where the value is a code times a scale that float16 holds; else to the scale."""
    w = np.full((64, 3), value, np.float32)
    out = np.asarray(qjax.dequantize(qjax.quantize(w, spec, 0)))
    rtol = 2**-7 if "_dq" in str(spec) or "int4_" in str(spec) else 2**-8
    np.testing.assert_allclose(out, w, rtol=rtol)
    if qjax.Spec.parse(spec).scale_dtype == "float16" and not qjax.Spec.parse(spec).symmetric:
        np.testing.assert_array_equal(out, w)


@pytest.mark.parametrize("spec", [*SPECS, *MICRO, *ZERO_POINTS, *SHORT_GGML], ids=str)
def test_tiny_blocks_are_finite_and_no_larger_than_they_were(spec):
    """Denormal ones too; a float16 scale is a multiple of 6e-8, so 16 codes may be 5e-7 off."""
    narrow = qjax.Spec.parse(spec).scale_dtype == "float16"
    for size in (1e-45, 1e-40, 1e-38, 3e-38, 1e-30, 1e-7):
        w = normal(64, 3) * np.float32(size)
        out = np.asarray(qjax.dequantize(qjax.quantize(w, spec, 0)))
        assert np.all(np.isfinite(out))
        assert (
            np.abs(out).max() <= np.abs(w).max() * (1.15 if spec in MICRO else 1.1) + 5e-7 * narrow
        )


@pytest.mark.parametrize("spec", [*SPECS, *MICRO, *ZERO_POINTS, *SHORT_GGML], ids=str)
def test_huge_blocks(spec):
    """Scales that float16 must hold saturate. What float32 cannot compute with raises."""
    w = normal(64, 3, scale=0.2).clip(-1, 1)
    w[:2] = np.array([[1], [-1]])
    narrow = qjax.Spec.parse(spec).scale_dtype == "float16"
    for size in (1e30, 3e37, 3.4e38):
        try:
            q = qjax.quantize(w * np.float32(size), spec, 0)
        except ValueError as error:
            assert size == 3.4e38 or spec == "iq4_nl"  # which sums squares
            assert "holds values too large for" in str(error)  # noqa: PT017
            continue
        out = np.asarray(qjax.dequantize(q))
        assert np.all(np.isfinite(out))
        if narrow:
            assert np.all(out[0] > 6e4)
        else:
            rtol = 0.02 if qjax.Spec.parse(spec).zero_dtype is None else 0.07
            rtol = 0.26 if spec in MICRO else rtol  # no larger power of two: 4 saturates to 3
            np.testing.assert_allclose(out[:2] / np.float32(size), w[:2], rtol=rtol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ["int8", "uint4_g32", "nf4_g64_dq", "fp8_e4m3", "q4_1"])
def test_narrow_weights_are_quantized_from_their_exact_values(spec, dtype):
    w = jnp.asarray(normal(64, 8), dtype)
    q, wide = qjax.quantize(w, spec, 0), qjax.quantize(w.astype(jnp.float32), spec, 0)
    assert (q.dtype, qjax.dequantize(q).dtype) == (dtype, dtype)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(wide).astype(dtype))


@pytest.mark.parametrize(
    "w", [np.eye(4), np.eye(4, dtype=np.float16), np.asfortranarray(np.eye(4))]
)
def test_numpy_weights(w):
    q = qjax.quantize(w, "int8", 0)
    assert isinstance(q.qvalue, jax.Array)
    np.testing.assert_array_equal(qjax.dequantize(q), w)


@pytest.mark.parametrize("spec", ["int8", "int4_g24", "uint4_g32", "nf4_g64_dq", "q5_1"])
def test_eval_shape_says_what_quantize_gives(spec):
    q = qjax.quantize(normal(64, 8), spec, 0)
    abstract = jax.eval_shape(
        lambda w: qjax.quantize(w, spec, 0), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    )
    assert jax.tree.structure(q) == jax.tree.structure(abstract)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.eval_shape(qjax.dequantize, abstract).shape == (64, 8)


@pytest.mark.parametrize("spec", ["int8", "int4_g24", "int4_16x8", "nf4_g64_dq", "q4_1", "q5_0"])
def test_vmap_is_a_stack_and_so_is_batch_axis(spec):
    """To the bit, but for the mean of double-quantized scales: XLA chooses its order."""
    rtol = 2e-6 if "_dq" in spec else 0
    w = normal(3, 64, 8)
    stacked = qjax.quantize(w, spec, 1, batch_axis=0)
    mapped = jax.vmap(lambda w: qjax.quantize(w, spec, 0))(w)
    assert jax.tree.structure(stacked) == jax.tree.structure(mapped)
    one = qjax.quantize(w[1], spec, 0)
    for s, m, o in zip(*map(jax.tree.leaves, (stacked, mapped, one)), strict=True):
        stack, mapping, alone = (np.asarray(x).astype(np.float32) for x in (s, m, o))
        np.testing.assert_allclose(stack, mapping, rtol)
        np.testing.assert_allclose(stack[1], alone, rtol)
    np.testing.assert_array_equal(jax.vmap(qjax.dequantize)(stacked), qjax.dequantize(stacked))


# One for each way to choose and to hold scales, codes in planes and as floats included.
BAD = [*FEW, "int8_tensor", "int8_g16_asym", "int6_16x8", "nf4", "fp8_e5m2", "fp4_e2m1_g32"]
BAD += ["mxfp8", "mxfp6", ZERO_POINTS[1], "q8_0", "q4_1", "q5_0", "iq4_nl"]


@pytest.mark.parametrize("spec", few([*SPECS, *MICRO, *ZERO_POINTS, *SHORT_GGML], BAD), ids=str)
def test_weights_that_are_no_numbers(spec):
    """They raise when concrete; under jit their blocks decode to NaN, every element of them.

    Wide enough that XLA:CPU's reductions are vectorized, along either axis.
    """
    block = qjax.Spec.parse(spec).block
    rows, columns = block if isinstance(block, tuple) and block else (block or 64, 1)
    if block == () or "_dq" in str(spec) or spec == "nvfp4":  # their scales span all blocks
        tile = slice(None), slice(None)
    else:
        tile = slice(rows), slice(104, 104 + columns)
    for axis in (0, 1) if spec in FEW else (0,):
        decoded = jax.jit(lambda w, axis=axis: qjax.dequantize(qjax.quantize(w, spec, axis)))
        for bad in (np.nan, np.inf, -np.inf):
            w = normal(64, 160)
            w[5, 104] = bad
            hit = np.zeros(w.shape, bool)
            hit[tile] = True
            w, hit = (w, hit) if axis == 0 else (w.T, hit.T)
            with pytest.raises(ValueError, match=r"holds 1 NaN or Inf value"):
                qjax.quantize(w, spec, axis)
            np.testing.assert_array_equal(np.isnan(decoded(w)), hit)


def test_the_error_counts_what_is_bad():
    w = normal(64, 3)
    w[:4, 0] = [np.nan, np.inf, -np.inf, np.nan]
    with pytest.raises(ValueError, match="holds 4 NaN or Inf"):
        qjax.quantize(w, "int8", 0)


def test_a_second_call_compiles_nothing():
    w = normal(48, 24)
    qjax.dequantize(qjax.quantize(w, "int4_g16", 0))
    before = quantizing._quantize._cache_size()
    with jax.log_compiles(), pytest.MonkeyPatch.context():
        qjax.quantize(w + 1, qjax.Spec.parse("int4_g16"), axis=(0,))
        qjax.quantize(w, "int4_g16", -2)
    assert quantizing._quantize._cache_size() == before


@pytest.mark.parametrize(
    ("w", "axis", "batch", "message"),
    [
        (
            np.ones((4, 4), np.int32),
            0,
            (),
            r"needs a floating-point array, got int32 of shape \(4, 4\)",
        ),
        (np.ones((4, 4), bool), 0, (), "floating-point array, got bool"),
        (np.float32(1), 0, (), "axis 0 is out of range for an array of 0 axes"),
        (np.ones((4, 4), np.float32), 2, (), "axis 2 is out of range for an array of 2 axes"),
        (np.ones((4, 4), np.float32), -3, (), "axis -3 is out of range"),
        (np.ones((4, 4), np.float32), (), (), "at least one contracted axis"),
        (np.ones((4, 4), np.float32), 0, 0, "none twice"),
        (np.ones((4, 4), np.float32), (0, -2), (), "none twice"),
    ],
)
def test_arguments_that_make_no_sense(w, axis, batch, message):
    with pytest.raises(ValueError, match=message):
        qjax.quantize(w, "int8", axis, batch_axis=batch)


def test_a_qtensor_is_not_quantized_again():
    q = qjax.quantize(np.eye(4, dtype=np.float32), "int8", 0)
    with pytest.raises(ValueError, match=r"QTensor\(int8.* is quantized already"):
        qjax.quantize(q, "int4", 0)


@pytest.mark.parametrize(
    ("spec", "size", "block"),
    [("q8_0", 48, 32), ("q4_1", 0, 32), ("q4_k", 128, 256), ("q6_k", 896, 256)],
)
def test_ggml_blocks_are_whole(spec, size, block):
    with pytest.raises(ValueError, match=f"hold {block} neighbors .* {size} is no multiple"):
        qjax.quantize(np.zeros((size, 4), np.float32), spec, 0)


@pytest.mark.parametrize("spec", few(["q4_k", "q5_k", "q6_k"], ["q4_k", "q6_k"]))
def test_edges_of_k_quants(spec):
    """Zeros, tiny and huge super-blocks beside ordinary ones; stacks; NaN only where it was."""
    w = normal(2, 512, 72)
    w[:, :256, 1] = 0
    w[:, :256, 2] *= 1e-40
    w[:, :256, 3] *= 1e10
    q = qjax.quantize(w, spec, 1, batch_axis=0)
    out = np.asarray(qjax.dequantize(q))
    assert np.all(np.isfinite(out))
    np.testing.assert_array_equal(out[:, :256, 1:3], 0)
    assert np.all(np.sign(out[:, :256, 3]) * w[:, :256, 3] >= 0)
    ordinary = np.ones(w.shape, bool)
    ordinary[:, :256, 1:4] = False
    error = np.linalg.norm((out - w)[ordinary]) / np.linalg.norm(w[ordinary])
    assert error < {"q4_k": 0.08, "q5_k": 0.04, "q6_k": 0.02}[spec]
    mapped = jax.vmap(lambda w: qjax.quantize(w, spec, 0))(w)
    assert jax.tree.structure(q) == jax.tree.structure(mapped)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    w[1, 300, 4] = np.nan
    with pytest.raises(ValueError, match="holds 1 NaN"):
        qjax.quantize(w, spec, 1, batch_axis=0)
    bad = jax.jit(lambda w: qjax.dequantize(qjax.quantize(w, spec, 1, batch_axis=0)))(w)
    hit = np.zeros(w.shape, bool)
    hit[1, 256:, 4] = True
    np.testing.assert_array_equal(np.isnan(bad), hit)


@pytest.mark.parametrize("spec", ["q4_0", "q4_k", "q6_k"])
def test_ggml_blocks_run_along_the_innermost_contracted_axis(spec):
    w = normal(2, 256, 3)
    q = qjax.quantize(w, spec, (0, 1))
    for i in range(2):
        one = qjax.quantize(w[i], spec, 0)
        np.testing.assert_array_equal(qjax.dequantize(q)[i], qjax.dequantize(one))


def test_asymmetric_groups_start_at_their_smallest_value():
    w = normal(64, 4) + np.float32(5)
    q = qjax.quantize(w, "uint4_g32", 0)
    lows = w.reshape(2, 32, 4).min(1)
    np.testing.assert_array_equal(q.offset, lows.astype(np.float16))
    assert np.abs(qjax.dequantize(q) - w).max() < np.ptp(w) / 25


def test_zero_points_are_codes_and_zero_is_exact():
    """As GPTQ and AWQ files hold it: scale = range with zero / 15, zero point = -min / scale."""
    w = normal(64, 4) + np.float32(0.5)
    w[3] = 0
    w[:, 2] = np.abs(w[:, 2])
    q = qjax.quantize(w, ZERO_POINTS[0], 0)
    low, high = np.minimum(w.reshape(2, 32, 4).min(1), 0), np.maximum(w.reshape(2, 32, 4).max(1), 0)
    scale = (high.astype(np.float64) - low) / 15
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(q.zero_point, np.round(-low / scale))
    codes = np.clip(
        np.round(w / np.repeat(scale, 32, 0)) + np.repeat(np.round(-low / scale), 32, 0), 0, 15
    )
    np.testing.assert_array_equal(np.asarray(q.qvalue).astype(np.uint8), codes)
    np.testing.assert_array_equal(qjax.dequantize(q)[3], 0)


def test_dequantize_rounds_the_product_before_the_sum():
    """XLA:CPU would fuse them under jit; judged by float32 numpy, one rounding per operation."""
    w = normal(256, 64) + np.float32(1)
    spec = qjax.Spec("uint8", 64, False, "float32", None, "minmax")
    q = qjax.quantize(w, spec, 0)
    scale, offset = (np.repeat(np.asarray(x), 64, 0) for x in (q.scale, q.offset))
    wanted = np.asarray(q.qvalue).astype(np.float32) * scale + offset
    for dequantize in (qjax.dequantize, jax.jit(qjax.dequantize)):
        np.testing.assert_array_equal(dequantize(q), wanted)


def test_fp8_weights_can_be_quantized_from_narrow_floats():
    w = normal(8, 8).astype(ml_dtypes.float8_e5m2)
    out = qjax.dequantize(qjax.quantize(jnp.asarray(w), "int8", 0))
    assert out.dtype == w.dtype


USED_WHERE_MADE = [
    "int4_g32",
    "uint4_g32",
    "fp8_e4m3",
    "fp8_e4m3_g32",
    "fp8_e5m2",
    "nvfp4",
    "mxfp8",
]
USED_WHERE_MADE += ["nf4_g64_dq", "q8_0", "q4_1", "q4_k", "q3_k", "iq4_xs"]


LIKE_OTHERS = ("fp8_e4m3_g32", "fp8_e5m2", "q8_0", "q3_k")  # fp8_e4m3, q4_1 and iq4_xs


@pytest.mark.parametrize(
    "spec", few(USED_WHERE_MADE, [s for s in USED_WHERE_MADE if s not in LIKE_OTHERS])
)
def test_no_rounding_is_a_cast_there_and_back(spec):
    """XLA for a GPU leaves such casts out, and codes and scales would be used unrounded."""
    w = jax.random.normal(jax.random.key(0), (256, 6))
    both = lambda w: qjax.dequantize(qjax.quantize(w, spec, 0))
    got = jax.jit(without_round_trips(both))(w)
    np.testing.assert_array_equal(got, jax.jit(both)(w))
