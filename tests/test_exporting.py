"""Functions of quantized parameters through jax.export and back."""

import jax
import numpy as np
import pytest
from helpers import few
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


def reloaded(exported, *args):
    loaded = export.deserialize(exported.serialize())
    assert loaded.in_tree == jax.tree.structure((args, {}))
    return loaded.call(*args)


# One for each way to hold codes and for each kind of scale: export sees nothing else of a format.
HELD = ["int8", "int7", "int6", "int5", "int4", "int3", "int2", "uint8", "uint4", "uint2"]
HELD += ["fp8_e4m3", "fp8_e5m2", "mxfp4", "nvfp4", "q3_k", "q4_k", "nf4_g64_dq", "int8/int8_token"]


@pytest.mark.parametrize("name", few([*FORMATS, "nf4_g64_dq", "int8/int8_token"], HELD))
def test_a_reloaded_function_gives_the_same_numbers(name):
    """With 2-bit codes in the weight or its scales only after `prepare`, as the error says."""
    params = {"w": example(name)}
    fn = jax.jit(qjax.quantized(apply))
    exported = export.export(fn)(params, X)
    if any(leaf.dtype in ("int2", "uint2") for leaf in jax.tree.leaves(params)):
        with pytest.raises(ValueError, match=r"the 2-bit codes of .*qjax\.prepare\(qparams\)"):
            exported.serialize()
        params = qjax.prepare(params, unsupported="raise")
        exported = export.export(fn)(params, X)
    np.testing.assert_array_equal(reloaded(exported, params, X), fn(params, X))


@pytest.mark.parametrize("name", ["int4_g64", "nf4_g64_dq", "uint4_g64", "int8/int8_token"])
def test_prepared_weights_are_reloaded(name):
    params = qjax.prepare({"w": example(name)}, unsupported="raise")
    fn = jax.jit(qjax.quantized(apply))
    np.testing.assert_array_equal(reloaded(export.export(fn)(params, X), params, X), fn(params, X))
