"""IQ1, IQ2 and IQ3 become dense arrays, judged by values that ggml decoded."""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.io import ggml_dense
from qjax.io.ggml_dense import DENSE_TYPES, to_array
from qjax.io.ggml_types import CODECS, GGML_TYPES

RANDOM = np.load(pathlib.Path(__file__).parent / "golden" / "ggml_random_blocks.npz")


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("name", DENSE_TYPES)
def test_decodes_as_ggml_does(name, at_once, monkeypatch):
    monkeypatch.setattr(ggml_dense, "_AT_ONCE", at_once)
    raw, truth = RANDOM[f"{name}__bytes"], RANDOM[f"{name}__dequant"]
    x = to_array(raw, name, np.float32, transpose=False)
    np.testing.assert_array_equal(np.asarray(x).view(np.uint32), truth.view(np.uint32))
    stacked = to_array(np.stack([raw, raw[::-1]]), name, jnp.bfloat16, transpose=True)
    assert stacked.shape == (2, 256, 8)
    np.testing.assert_array_equal(stacked[1, :, ::-1], truth.T.astype(jnp.bfloat16))


def test_no_rows():
    assert to_array(np.zeros((0, 66), np.uint8), "IQ2_XXS", np.float32, True).shape == (256, 0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"IQ3_S tensors .* pip install 'qjax\[gguf\]'"):
        to_array(RANDOM["IQ3_S__bytes"], "IQ3_S", np.float32, False)


def test_a_type_is_either_kept_or_decoded():
    assert not set(DENSE_TYPES) & set(CODECS)
    assert {*DENSE_TYPES, *CODECS} <= {t.name for t in GGML_TYPES.values()}
