"""RTN as an algorithm is what quantize does."""

import jax
import numpy as np
import pytest

import qjax
from qjax.spec import Spec


@pytest.mark.parametrize("method", [None, "mse", "absmax"])
def test_it_is_quantize_with_a_scale_method(method):
    w = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float32)
    q, notes = qjax.rtn(method).quantize(w, Spec.parse("int4_g32"), qjax.Stats())
    wanted = qjax.quantize(w, Spec("int4", 32, True, "bfloat16", None, method or "absmax"), 0)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert notes == {}
