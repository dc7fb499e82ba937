"""HQQ against a float64 implementation of its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import FORMATS, join_planes
from qjax.spec import Spec


def heavy(size=96, out=24, seed=0):
    return np.random.default_rng(seed).standard_t(3, (size, out)).astype(np.float32)


def reference(w, scale, low, high, start, p=0.7, beta=10.0, kappa=1.01, iterations=20):
    """(least sum |w - w_q|^p, at the start) of one block per column; equations 5 to 8."""
    zero, best, first = start, None, None
    for _ in range(iterations + 1):
        codes = np.clip(np.round(w / scale + zero), low, high)
        e = w - (codes - zero) * scale
        norm = np.sum(np.abs(e) ** p, axis=0)
        first = norm if first is None else first
        best = norm if best is None else np.minimum(best, norm)
        shrunk = np.sign(e) * np.maximum(
            np.abs(e) - np.maximum(np.abs(e), 1e-30) ** (p - 1) / beta, 0
        )
        zero = np.mean(codes - (w - shrunk) / scale, axis=0)
        beta *= kappa
    return best, first


@pytest.mark.parametrize("spec", ["uint4", "uint2_g96", "int3_g96_asym", "uint8"])
def test_the_best_iterate_of_the_equations(spec):
    w = heavy()
    spec = Spec.parse(spec)._replace(scale_dtype="float32")
    q, notes = qjax.hqq().quantize(jnp.asarray(w), spec, qjax.Stats())
    fmt, scale = FORMATS[spec.format], np.asarray(q.scale, np.float64)
    start = fmt.min - w.min(0) / scale[0]
    best, first = reference(w.astype(np.float64), scale[0], fmt.min, fmt.max, start)
    found = np.sum(np.abs(w - np.asarray(qjax.dequantize(q), np.float64)) ** 0.7, axis=0)
    np.testing.assert_allclose(found.sum(), best.sum(), rtol=0.01)
    assert np.all(found <= first * (1 + 1e-4))
    assert notes["error"] == pytest.approx(found.sum() / w.size, rel=1e-4)
    assert notes["start_error"] == pytest.approx(first.sum() / w.size, rel=0.01)
    assert found.sum() < first.sum()


def test_zero_points_are_floats_and_ragged_blocks_take_their_own_elements():
    w = heavy(80)
    q, _ = qjax.hqq().quantize(jnp.asarray(w), Spec.parse("uint4_g32"), qjax.Stats())
    q.check()
    assert (q.zero_point.dtype, q.zero_point.shape) == (jnp.float16, (3, 24))
    last, _ = qjax.hqq().quantize(jnp.asarray(w[64:]), Spec.parse("uint4_g32"), qjax.Stats())
    np.testing.assert_array_equal(q.zero_point[2], last.zero_point[0])
    codes = lambda q: np.asarray(join_planes(FORMATS["uint4"], q.qvalue).astype(jnp.uint8))
    np.testing.assert_array_equal(codes(q)[64:], codes(last))
    x = np.random.default_rng(1).normal(size=(3, 80)).astype(np.float32)
    y = qjax.quantized(lambda w, x: x @ w)(q, x)
    np.testing.assert_allclose(y, x @ np.asarray(qjax.dequantize(q)), rtol=1e-4, atol=1e-4)


def test_stacks_and_blocks_of_zeros():
    w = np.stack([heavy(seed=1), np.zeros((96, 24), np.float32)])
    run = lambda w: qjax.hqq().quantize(w, Spec.parse("uint4_g32"), qjax.Stats())
    q, notes = jax.jit(jax.vmap(run))(w)
    np.testing.assert_array_equal(qjax.dequantize(q)[1], w[1])
    assert np.all(np.isfinite(notes["error"]))


@pytest.mark.parametrize("spec", ["int4_g64", "nf4_g64", "q4_k"])
def test_it_needs_zero_points(spec):
    with pytest.raises(ValueError, match=rf"hqq moves zero points, and {spec} has none; .*uint4"):
        qjax.hqq().quantize(jnp.ones((256, 4)), Spec.parse(spec), qjax.Stats())
    with pytest.raises(ValueError, match="p must be above 0 and at most 1, got 2"):
        qjax.hqq(p=2)
