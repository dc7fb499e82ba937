"""Bytes that we report are bytes that XLA plans for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.io.ggml_types import CODECS, GGML_TYPES, to_qtensor
from qjax.sizes import bits_per_weight, nbytes

W = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
SPECS = {
    "int8": 8 + 32 / 1024,
    **{f"int{n}_g128": n + 16 / 128 for n in range(2, 9)},
    **{f"uint{n}_g64": n + 2 * 16 / 64 for n in range(2, 9)},
    "uint4_g32": 4 + 2 * 16 / 32,
    "nf4_g64": 4 + 32 / 64,
    "nf4_g64_dq": 4 + 8 / 64 + 2 * 32 / (64 * 256),
    "fp8_e4m3_128x128": 8 + 32 / 128**2,
    "q5_0": 5 + 16 / 32,
    "fp4_bnb_g64": 4 + 32 / 64,
    "fp6_e3m2_g32": 6 + 32 / 32,
    "mxfp8": 8 + 8 / 32,
    "mxfp6": 6 + 8 / 32,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 / W.size,
    "tq1_0": 2 + 16 / 256,
}


def planned(tree):
    """Argument bytes of a compiled identity."""
    compiled = jax.jit(lambda t: t).lower(tree).compile()
    return compiled.memory_analysis().argument_size_in_bytes


@pytest.mark.parametrize("spec", SPECS)
def test_quantized_weights(spec):
    q = jax.eval_shape(lambda: qjax.quantize(W, spec, 0))  # shapes and dtypes, nothing compiled
    assert nbytes(q) == pytest.approx(planned(q), rel=0.01)
    assert bits_per_weight(q) == pytest.approx(SPECS[spec], rel=1e-6)
    assert bits_per_weight(q) == 8 * nbytes(q) / W.size


@pytest.mark.parametrize("name", CODECS)
def test_gguf_weights_hold_what_the_file_holds(name):
    """Bits per weight on the device are those of the file's blocks, but for TQ1_0's trits."""
    codec = CODECS[name]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (64, 4 * codec.struct.itemsize), np.uint8)
    q = to_qtensor(raw, name, np.float32, transpose=True)
    block = next(t for t in GGML_TYPES.values() if t.name == name)
    if name == "TQ1_0":  # five trits to a byte in the file
        assert bits_per_weight(q) == 2 + 16 / 256
    else:
        assert bits_per_weight(q) == 8 * block.bytes / block.elements
        assert nbytes(q) == raw.size
    assert nbytes(q) == pytest.approx(planned(q), rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((jnp.int4, 6), (jnp.uint2, 3), (jnp.int8, 12), (jnp.float8_e4m3fn, 12)),
        *((jnp.float4_e2m1fn, 6), (jnp.bool_, 12), (jnp.bfloat16, 24), (jnp.complex64, 96)),
    ],
)
def test_arrays(dtype, size):
    assert nbytes(jnp.zeros((3, 4), dtype)) == size
    assert nbytes(jax.ShapeDtypeStruct((3, 4), dtype)) == size


def test_trees_add_up_and_half_bytes_round_up():
    assert nbytes({"a": jnp.zeros(3, jnp.int4), "b": [jnp.zeros((), jnp.float32), None]}) == 6
