"""FORMATS x structural operations, specs x transforms: the numbers of the dequantized weight."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, few, relative_error, slow
from jax import lax

import qjax
from qjax.activation import Activation
from qjax.formats import FORMATS
from qjax.spec import WHOLE_SPECS

ROOT = pathlib.Path(__file__).resolve().parent.parent


def differences(mode, names):
    """What format_matrix.py finds, in a process that may abort."""
    child = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "format_matrix.py"), mode, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert child.returncode == 0, f"exit {child.returncode} at\n{child.stderr[-3000:]}"
    return json.loads(child.stdout)


def test_every_format_under_some_operations():
    assert differences("few", FORMATS) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_under_every_operation(name):
    assert differences("each", [name]) == []


def layer(w, x):
    return jnp.tanh(x @ w)


def deep(ws, x):
    """Layers of a stack, in a scan."""
    return lax.scan(lambda x, w: (layer(w, x), None), x, ws)[0]


def repeated(ws, x):
    """One layer until a value is reached, two thousand times at most."""
    w = ws[0]

    def step(state):
        i, x = state
        return i + 1, 0.9 * layer(w, x)

    return lax.while_loop(lambda s: (s[0] < 2000) & (jnp.abs(s[1]).max() > 0.1), step, (0, x))


def chosen(ws, x):
    return lax.cond(x[0, 0] > 0, layer, lambda w, x: layer(w.T, x), ws[1], x)


def over_columns(fn):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.P(None, "d")
    sharded = jax.shard_map(layer, mesh=mesh, in_specs=(columns, jax.P()), out_specs=columns)
    return fn(lambda ws, x: sharded(ws[0], x))


def exported(fn):
    wrapped = jax.jit(fn(deep))

    def call(ws, x):
        data = jax.export.export(wrapped)(ws, x).serialize()
        return jax.export.deserialize(data).call(ws, x)

    return call


def grad_of(fn):
    return lambda ws, x: jax.grad(lambda x: jnp.sum(fn(deep)(ws, x) ** 2))(x)


# name -> what is made of `fn`, which is the identity or `quantized`: a function of [layers, k, k]
# and [n, k].
TRANSFORMS = {
    "grad": grad_of,
    "jvp": lambda fn: lambda ws, x: jax.jvp(lambda x: fn(deep)(ws, x), (x,), (x * 2,)),
    "vmap": lambda fn: lambda ws, x: jax.vmap(fn(layer), (0, None))(ws, x),
    "pmap": lambda fn: lambda ws, x: jax.pmap(fn(layer), in_axes=(0, None))(ws, x),
    "scan": lambda fn: jax.jit(fn(deep)),
    "while": lambda fn: jax.jit(fn(repeated)),
    "cond": lambda fn: jax.jit(fn(chosen)),
    "remat": lambda fn: grad_of(lambda body: fn(jax.checkpoint(body))),
    "shard_map": lambda fn: jax.jit(over_columns(fn)),
    "export": exported,
}
SPECS = ["int8", "int4_g128", "int3_g64", "nf4_g64_dq", "nvfp4", "q4_k"]
BY_DEFAULT = ["int4_g128", "nf4_g64_dq"]  # in turns; a scan takes them all


@functools.cache
def stack(spec):
    w = np.random.default_rng(0).standard_normal((2, 256, 256)).astype(np.float32) / 16
    return qjax.quantize(w, spec, 1, batch_axis=0)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        (name, spec) if name == "scan" or spec == BY_DEFAULT[i % 2] else slow(name, spec)
        for i, name in enumerate(TRANSFORMS)
        for spec in SPECS
    ],
)
def test_transforms(name, spec):
    q = stack(spec)
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    if name == "export" and any(v.dtype in ("int2", "uint2") for v in jax.tree.leaves(q)):
        with pytest.raises(ValueError, match=r"2-bit codes of .*qjax\.prepare"):
            TRANSFORMS[name](qjax.quantized)(q, x)
        return
    got = TRANSFORMS[name](qjax.quantized)(q, x)
    wanted = TRANSFORMS[name](lambda fn: fn)(dense(q), x)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert relative_error(got, wanted) < 1e-5


# Planes, codebooks, and scales of every kind; test_activation.py has the others.
BESIDE = ["int5", "fp6_e2m3", "dynamic8", "mxfp4", "nvfp4", "q3_k", "q4_k", "iq4_xs", "tq2_0"]


@pytest.mark.parametrize("name", few([*FORMATS], BESIDE))
def test_activations_of_either_kind(name):
    """int8 and FP8 activations beside codes of any format, in one compilation."""
    w = np.random.default_rng(0).standard_normal((256, 24)).astype(np.float32)
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    q = qjax.quantize(w, name if name in WHOLE_SPECS else f"{name}_g64", 0)
    qs = [
        dataclasses.replace(q, activation=Activation(qjax.Spec.parse(format)))
        for format in ("int8", "fp8_e4m3")
    ]
    got = jax.jit(qjax.quantized(lambda qs, x: [x @ q for q in qs]))(qs, x)
    for y, q, bound in zip(got, qs, (0.02, 0.06), strict=True):
        assert relative_error(y, x @ qjax.dequantize(q)) < bound
