"""Functions of quantized parameters through jax.export and back."""

import jax
import numpy as np
import pytest
from jax import export

import qjax
from qjax.formats import FORMATS
from qjax.spec import WHOLE_SPECS

W = np.random.default_rng(0).standard_normal((256, 24)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)


def apply(params, x):
    return jax.nn.relu(x @ params["w"])


def example(name):
    if name in FORMATS and name not in WHOLE_SPECS:
        name = f"{name}_g64"
    return qjax.quantize(W, name, 0)


@pytest.mark.parametrize("name", [*FORMATS, "nf4_g64_dq", "int8/int8_token"])
def test_a_reloaded_function_gives_the_same_numbers(name):
    """Or, with 2-bit codes in the weight or its scales, the error names the remedy."""
    q = example(name)
    fn = jax.jit(qjax.quantized(apply))
    exported = export.export(fn)({"w": q}, X)
    if any(leaf.dtype in ("int2", "uint2") for leaf in jax.tree.leaves(q)):
        with pytest.raises(ValueError, match=r"the 2-bit codes of .*qjax\.prepare\(qparams\)"):
            exported.serialize()
        return
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == jax.tree.structure((({"w": q}, X), {}))
    np.testing.assert_array_equal(loaded.call({"w": q}, X), fn({"w": q}, X))
