"""Structural operations carry codes and scales: the result dequantizes to the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantized_uses
from jax import lax

import qjax

SHAPE = (4, 6, 32)


def tensor(kind: str) -> qjax.QTensor:
    """A QTensor of `SHAPE` with its blocks along the last or the middle axis."""
    w = jax.random.normal(jax.random.key(0), SHAPE)
    spec, _, axis = kind.partition(" along ")
    return qjax.quantize(w, spec, int(axis))


KINDS = [
    "int8 along 2",
    "int4_g8 along 2",
    "int4_g5 along 2",  # ragged
    "int4_g4 along 1",
    "uint4_g8 along 2",
    "nf4_g8_dq along 2",
    "fp8_e4m3_2x8 along 1",
    "int8_tensor along 2",
]

# name -> (operation, kinds for which it has to stay on codes)
ALL = set(KINDS)
OPERATIONS = {
    "transpose": (lambda w: w.transpose(2, 0, 1), ALL),
    "reshape: merge the outer axes": (lambda w: w.reshape(24, 32), ALL - {"int4_g4 along 1"}),
    "reshape: merge the inner axes": (
        lambda w: w.reshape(4, 192),
        {"int4_g8 along 2", "uint4_g8 along 2", "nf4_g8_dq along 2", "int8_tensor along 2"}
        | {"int8 along 2"},
    ),
    "reshape: split the blocked axis": (lambda w: w.reshape(4, 6, 4, 8), ALL - {"int4_g5 along 2"}),
    "reshape: split across blocks": (lambda w: w.reshape(4, 6, 8, 4), ALL - {"int4_g5 along 2"}),
    "reshape: unit axes": (lambda w: w.reshape(1, 4, 6, 1, 32), ALL),
    "expand_dims": (lambda w: w[:, None, :, None], ALL),
    "squeeze": (lambda w: w[:1].squeeze(0), ALL),
    "slice a free axis": (lambda w: w[1:3], ALL),
    "slice at a block": (lambda w: lax.slice_in_dim(w, 8, 24, axis=2), ALL - {"int4_g5 along 2"}),
    "slice inside a block": (
        lambda w: lax.slice_in_dim(w, 3, 24, axis=2),
        {"int8 along 2", "int4_g4 along 1", "int8_tensor along 2"},
    ),
    "dynamic slice of a free axis": (
        lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(9), 2, axis=0),
        ALL,
    ),
    "dynamic index": (lambda w: lax.dynamic_index_in_dim(w, jnp.int32(2), keepdims=False), ALL),
    "split": (lambda w: jnp.concatenate(jnp.split(w, 2, axis=0)[::-1]), ALL),
    "concatenate": (lambda w: jnp.concatenate([w, w], axis=0), ALL),
    "concatenate the blocked axis": (lambda w: jnp.concatenate([w, w], axis=2), set()),
    "cast": (lambda w: w.astype(jnp.bfloat16), ALL),
    "broadcast": (lambda w: jnp.broadcast_to(w[None], (2, *SHAPE)), ALL),
    "barrier": (lambda w: lax.optimization_barrier(w), ALL),
    "stop_gradient": (lambda w: lax.stop_gradient(w), ALL),
    "strided slice": (lambda w: w[:, ::2], set()),
    "reverse": (lambda w: w[::-1], set()),
    "to integers": (lambda w: w.astype(jnp.int32), set()),
}
REASONS_MAY_VARY = {"concatenate the blocked axis"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_moves_codes(name, kind):
    operation, carried = OPERATIONS[name]
    q = tensor(kind)
    got = jax.jit(qjax.quantized(operation))(q)
    wanted = jax.jit(operation)(qjax.dequantize(q))
    assert got.dtype == wanted.dtype
    if "_dq" in kind:  # codes * scale + offset of the scales is contracted or not, as XLA fuses
        np.testing.assert_allclose(np.float32(got), np.float32(wanted), rtol=1e-6)
    else:
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    opened = [use for use in dequantized_uses(operation, q) if "an output" not in use]
    if name not in REASONS_MAY_VARY:
        assert (not opened) == (kind in carried), opened


def planes(format: str, high: str) -> qjax.QTensor:
    """5- and 6-bit codes as planes, random, with a float16 scale per 8 elements."""
    keys = jax.random.split(jax.random.key(1), 3)
    low = jax.random.randint(keys[0], SHAPE, 0, 16).astype(jnp.uint4)
    if high == "uint1":
        top = jax.random.randint(keys[1], (*SHAPE[:-1], SHAPE[-1] // 8), 0, 256).astype(jnp.uint8)
    else:
        top = jax.random.randint(keys[1], SHAPE, 0, 4).astype(jnp.uint2)
    scale = jax.random.uniform(keys[2], (4, 6, 4)).astype(jnp.float16)
    return qjax.QTensor((low, top), scale, None, None, None, format, (8,), np.dtype("float32"))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("format", "high"), [("q5_0", "uint1"), ("q6_k", "uint2")])
def test_planes_follow(name, format, high):
    operation, _ = OPERATIONS[name]
    q = planes(format, high)
    got = jax.jit(qjax.quantized(operation))(q)
    np.testing.assert_array_equal(
        np.asarray(got), np.asarray(jax.jit(operation)(qjax.dequantize(q)))
    )


def test_packed_bits_say_why_they_are_opened():
    q = planes("q5_0", "uint1")
    (use,) = dequantized_uses(lambda w: w.transpose(2, 0, 1) * 2, q)
    assert "bits are packed along the last axis" in use


def test_storage_of_another_shape_is_opened():
    q = qjax.quantize(jax.random.normal(jax.random.key(0), (24, 32)), "int4_g8", 1)
    q = dataclasses.replace(q, block=(1, 8), param_shape=(4, 6, 32))
    assert q.shape == (4, 6, 32)
    got = qjax.quantized(lambda w: w.transpose(1, 0, 2))(q)
    np.testing.assert_array_equal(got, qjax.dequantize(q).transpose(1, 0, 2))
