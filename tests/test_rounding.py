"""scale_method "mse": the clip of least squared error, judged in float64."""

import jax
import numpy as np
import pytest
from helpers import few

import qjax
from qjax.formats import FORMATS
from qjax.rounding import SCALE_METHODS

# What the search starts from, and how much less error it must leave on normal weights. int8 and the
# floats gain next to nothing by clipping.
GAINS = {
    "int2_g32": 0.35,
    "int3_g32": 0.75,
    "int4_g24": 0.9,
    "int4": 0.9,
    "int8": 1.0,
    "int4_16x8": 0.9,
    "uint2_g32": 0.7,
    "uint3_g24": 0.9,
    "uint4_tensor": 0.8,
    "nf4_g64": 0.95,
    "nf4_g64_dq": 0.96,
    "fp4_bnb_g64": 0.9,
    "fp4_e2m1_g32": 0.9,
    "fp6_e3m2_g32": 0.95,
    "fp8_e4m3": 1.0,
    "mxfp4": 0.999,
    "mxfp6_e3m2": 1.0,
    "nvfp4": 0.9,
}
ZERO_POINT = qjax.Spec("uint3", 32, False, scale_method="minmax", zero_dtype="uint8")


def weights(seed=0, shape=(192, 40)):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    w[::17] *= 4
    w[:, 3] += 8
    w[:, 5] = 0
    w[:, 6] = 0.25
    w[:, 7] *= 1e-30
    w[:, 8] *= 1e30
    return w


def block_errors(w, spec):
    """Squared errors in float64, summed over the blocks of w along axis 0."""
    q = qjax.quantize(w, spec, 0)
    squares = (np.asarray(qjax.dequantize(q), np.float64) - w) ** 2
    rows, columns = (1,) * (2 - len(q.block)) + q.block
    starts = np.arange(0, len(w), rows), np.arange(0, w.shape[1], columns)
    return np.add.reduceat(np.add.reduceat(squares, starts[0], 0), starts[1], 1)


def with_mse(spec):
    return qjax.Spec.parse(spec)._replace(scale_method="mse")


LIKE_OTHERS = "int3_g32 int4 uint3_g24 nf4_g64 fp4_e2m1_g32 fp6_e3m2_g32 mxfp6_e3m2".split()


@pytest.mark.parametrize(
    "spec", few([*GAINS, ZERO_POINT], [*(GAINS.keys() - LIKE_OTHERS), ZERO_POINT]), ids=str
)
def test_no_block_is_worse_than_unclipped(spec):
    """But for double quantization, which rounds the chosen scales once more."""
    w = weights()
    before, after = block_errors(w, spec), block_errors(w, with_mse(spec))
    assert np.all(np.isfinite(after))
    if spec != "nf4_g64_dq":
        assert np.all(after <= before * (1 + 1e-5))
    normal = np.random.default_rng(1).standard_normal((192, 40)).astype(np.float32)
    gain = block_errors(normal, with_mse(spec)).sum() / block_errors(normal, spec).sum()
    assert gain <= GAINS.get(spec, 0.95)


@pytest.mark.parametrize(
    ("name", "base"), [("int4_g32", 32), ("nf4_g32", 32), ("fp6_e2m3_g32", 32)]
)
def test_no_finer_search_finds_much_more(name, base):
    """Against 500 clips in float64 numpy, each with the scale rounded as it is held."""
    w = np.random.default_rng(2).standard_normal((32, 16)).astype(np.float32)
    spec = with_mse(name)
    found = block_errors(w, spec).ravel()
    fmt = FORMATS[spec.format]
    best = np.full(16, np.inf)
    for factor in np.linspace(0.2, 1, 500):
        scale = (np.abs(w).max(0) * factor / fmt.max).astype(np.float32)
        scale = np.asarray(scale.astype(spec.scale_dtype), np.float32)
        codes = fmt.encode(jax.numpy.asarray(w / scale))
        values = np.asarray(fmt.decode(codes, np.dtype("float32")), np.float64)
        best = np.minimum(best, ((values * scale - w) ** 2).sum(0))
    assert np.all(found <= best * 1.1)
    assert found.sum() <= best.sum() * 1.03


@pytest.mark.parametrize("spec", ["int4_g32", "uint3_g32", "mxfp4", "nvfp4"])
def test_it_runs_under_jit_and_vmap(spec):
    w = np.random.default_rng(3).standard_normal((2, 64, 8)).astype(np.float32)
    stacked = qjax.quantize(w, with_mse(spec), 1, batch_axis=0)
    mapped = jax.jit(jax.vmap(lambda w: qjax.quantize(w, with_mse(spec), 0)))(w)
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("spec", ["int4_g32", "uint4_g32", "mxfp4", "nvfp4"])
def test_bad_weights_stay_bad(spec):
    w = np.ones((64, 3), np.float32)
    w[5, 1] = np.nan
    out = jax.jit(lambda w: qjax.dequantize(qjax.quantize(w, with_mse(spec), 0)))(w)
    assert np.all(np.isnan(out[:32, 1]))
    with pytest.raises(ValueError, match="holds 1 NaN"):
        qjax.quantize(w, with_mse(spec), 0)


def test_scales_with_codes_of_their_own_are_refused():
    with pytest.raises(ValueError, match=r"cannot choose the scales of q4_k.*use \"ggml\""):
        qjax.quantize(np.ones((256, 2), np.float32), with_mse("q4_k"), 0)


def test_the_rules_of_llama_cpp_are_for_its_types():
    spec = qjax.Spec("nf4", 64, scale_method="ggml")
    with pytest.raises(ValueError, match=r'"ggml" is for q8_0, q4_0, .*; nf4 has no rule'):
        qjax.quantize(np.ones((64, 2), np.float32), spec, 0)


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_powers_of_two_need_their_own_rule(method):
    spec = qjax.Spec("fp4_e2m1", 32, method == "absmax", "float8_e8m0fnu", scale_method=method)
    with pytest.raises(ValueError, match="holds powers of two: choose them by"):
        qjax.quantize(np.ones((64, 2), np.float32), spec, 0)


def test_every_method_has_a_docstring_with_its_rule():
    for name, method in SCALE_METHODS.items():
        assert method.__doc__ is not None, name
