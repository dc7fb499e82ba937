"""A thousand quantized trees that somebody damaged: each a right result or an error that helps.

A right result is what float64 NumPy makes of the leaves as they stand. An error that helps is a
ValueError, TypeError or KeyError that names the parameter and was raised by qjax, or by the model
itself (a missing parameter); never one from the inside of JAX, unless the dense model ends in it
too.
"""

import collections
import dataclasses
import pathlib
import random
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import slow
from jax.sharding import PartitionSpec as P

import qjax
from qjax.formats import FORMATS
from qjax.qtensor import Activation

COUNT, PARTS = 1000, 8  # the first part runs by default
OURS = (str(pathlib.Path(qjax.__file__).parent), __file__)
SPECS = (
    *("int4_g16", "int8", "nf4_g16_dq", "uint4_g8", "int3_g16", "fp8_e4m3_16x8", "mxfp4", "nvfp4"),
    *("q6_k", "int8/int8_token"),
)
FIELDS = ("qvalue", "scale", "zero_point", "offset")
DTYPES = "int4 int8 uint4 uint8 int32 float16 bfloat16 float32 float8_e4m3fn bool complex64".split()
JUNK = (None, 1, 2.5, "text", P("x"), (), [], object(), np.float32(2), True, {}, jnp.zeros(()))
BLOCKS = (
    *((8, 1), (1, 16), (32, 1), (1, 1), (), (3, 5), (1, 1, 16, 1), (2, 16, 1), (64, 64)),
    *((0, 1), (-1, 1), (16.0, 1), ("16", 1), [16, 1], None, 16, "16x1", (None, 1)),
)
SHAPES = ((32, 32), (1024,), (4, 8, 32), (), (31, 33), [32, 32], (-1,), None, 7, ("a",), (256, 32))
X = {rows: jax.random.normal(jax.random.key(rows), (3, rows)) for rows in (32, 256)}


def fn(params, x):
    y = x @ params["first"]["kernel"] + params["first"]["bias"]
    return jnp.tanh(y) @ params["last"]["kernel"]


def healthy(spec):
    rows = 256 if spec == "q6_k" else 32
    w = jax.random.normal(jax.random.key(0), (rows, 32)) / 8
    first = {"kernel": qjax.quantize(w, spec, 0), "bias": jnp.full((1, 32), 0.1)}
    return {"first": first, "last": {"kernel": qjax.quantize(w[:32], "int8", 0)}}


HEALTHY = {spec: healthy(spec) for spec in SPECS}


# --- damage: (random numbers, kernel) -> kernel; or (random numbers, tree) -> tree


def some_field(rng, q):
    return rng.choice([f for f in FIELDS if getattr(q, f) is not None])


def on_field(change):
    def damage(rng, q):
        field = some_field(rng, q)
        value = getattr(q, field)
        if isinstance(value, qjax.QTensor) and rng.random() < 0.5:
            return dataclasses.replace(q, **{field: damage(rng, value)})
        return dataclasses.replace(q, **{field: change(rng, value)})

    return damage


def static(field, values):
    return lambda rng, q: dataclasses.replace(q, **{field: rng.choice(values)})


def cast(rng, tree):
    dtype = rng.choice(DTYPES)
    return jax.tree.map(lambda v: v.astype(dtype), tree)


def other_rank(rng, v):
    change = rng.choice(
        [
            lambda a: a[None],
            lambda a: a[..., None],
            lambda a: a.reshape(-1),
            lambda a: a.T,
            lambda a: a[0] if a.ndim else a,
            lambda a: jnp.stack([a, a]),
        ]
    )
    return jax.tree.map(change, v)


def other_length(rng, v):
    change = rng.choice(
        [
            lambda a: a[:-1],
            lambda a: a[..., :-1],
            lambda a: a[:0],
            lambda a: jnp.concatenate([a, a]),
        ]
    )
    return jax.tree.map(change, v)


def odd_numbers(rng, v):
    number = rng.choice([np.nan, 0.0, -1.0, 3e4])  # inf * 0 depends on the order of a sum
    fill = lambda a: a.at[(0,) * a.ndim].set(number) if a.dtype.kind == "f" else a
    return jax.tree.map(fill, v)


def in_planes(rng, v):
    planes = v if isinstance(v, tuple) else (v,)
    return rng.choice([(*planes, planes[0]), planes[:-1], list(planes), planes[::-1], (planes,)])


def other_activation(rng, q):
    spec = qjax.Spec.parse("int8/int8_token").activation
    k = q.shape[-2] if q.ndim > 1 else 1
    sound = {"input_scale": jnp.full(k, 2.0), "permutation": jnp.arange(k)[::-1]}
    sound |= {"signs": jnp.ones(k, jnp.int8), "scale": jnp.float32(0.05)}
    damaged = (jnp.ones(k + 1), jnp.ones((2, k)), jnp.ones(k, bool), jnp.arange(k), "text", 1.0)
    leaf = rng.choice(list(sound))
    values = (
        *("int8_token", 3, {}, spec, Activation(spec), Activation("int8"), Activation(None)),
        *(Activation(spec, threshold=t) for t in (2.0, -1.0, "6", 6)),
        *(
            Activation(axis=a, input_scale=sound["input_scale"])
            for a in ((-2,), (0,), (), -2, (-9,))
        ),
        Activation(threshold=6.0),
        Activation(spec, scale=sound["scale"]),
        Activation(spec._replace(block=()), (-2,), **{leaf: sound[leaf]}),
        Activation(spec._replace(block=()), (-2,), **{leaf: rng.choice(damaged)}),
    )
    return dataclasses.replace(q, activation=rng.choice(values))


def nested(rng, q):
    field = some_field(rng, q)
    return dataclasses.replace(q, **{field: q})


def everything_stacked(rng, q):
    return jax.tree.map(lambda a: jnp.stack([a] * rng.choice([1, 2])), q)


KERNEL = {
    "cast everything": cast,
    "cast a leaf": on_field(cast),
    "put junk into a leaf": on_field(lambda rng, v: rng.choice(JUNK)),
    "leaf of another rank": on_field(other_rank),
    "leaf of another length": on_field(other_length),
    "leaf in planes": on_field(in_planes),
    "odd numbers": on_field(odd_numbers),
    "numpy leaves": lambda rng, q: jax.tree.map(np.asarray, q),
    "a QTensor in a leaf": nested,
    "stale format": static("format", (*FORMATS, *FORMATS, "int5x", "", None, 7, ("int4",))),
    "stale block": static("block", BLOCKS),
    "stale dtype": static(
        "dtype", [np.dtype(d) for d in DTYPES] + [None, "float32", 3, jnp.float32]
    ),
    "stale param_shape": static("param_shape", SHAPES),
    "another activation": other_activation,
    "stacked": everything_stacked,
    "transposed without its block": lambda rng, q: jax.tree.map(jnp.transpose, q),
    "junk in its place": lambda rng, q: rng.choice(JUNK),
    "in a container": lambda rng, q: rng.choice([[q], (q, q), {"value": q}]),
    "leaves swapped": lambda rng, q: dataclasses.replace(q, qvalue=q.scale, scale=q.qvalue),
}


def renamed(rng, tree):
    layer = rng.choice(list(tree))
    name = rng.choice(list(tree[layer]))
    rest = {k: v for k, v in tree[layer].items() if k != name}
    return {**tree, layer: {**rest, f"{name}_": tree[layer][name]}}


def missing(rng, tree):
    layer = rng.choice(list(tree))
    name = rng.choice(list(tree[layer]))
    return {**tree, layer: {k: v for k, v in tree[layer].items() if k != name}}


TREE = {
    "renamed": renamed,
    "missing": missing,
    "layer missing": lambda rng, tree: {
        k: v for k, v in tree.items() if k != rng.choice(list(tree))
    },
    "another model's kernel": lambda rng, tree: {
        **tree,
        "first": {**tree["first"], "kernel": HEALTHY[rng.choice(SPECS)]["first"]["kernel"]},
    },
    "cast everywhere": cast,
    "junk for a bias": lambda rng, tree: {
        **tree,
        "first": {**tree["first"], "bias": rng.choice([v for v in JUNK if v != P("x")])},
    },
}
DAMAGE = [*KERNEL] * 2 + [*TREE]


def hostile(seed):
    """(what was done, tree, input)."""
    rng = random.Random(seed)
    kind, spec = DAMAGE[seed % len(DAMAGE)], rng.choice(SPECS)
    tree, x = HEALTHY[spec], X[256 if spec == "q6_k" else 32]
    if kind in TREE:
        return f"{kind} of {spec}", TREE[kind](rng, tree), x
    kernel = KERNEL[kind](rng, tree["first"]["kernel"])
    return f"{kind} of {spec}", {**tree, "first": {**tree["first"], "kernel": kernel}}, x


# --- the judge


def decoded(q):
    """The equation in float64 NumPy."""
    fmt = FORMATS[q.format]
    codes = q.qvalue
    if isinstance(codes, tuple):
        shift, joined, length = 0, 0, codes[0].shape[-1]
        for name, plane in zip(fmt.storage, codes, strict=True):
            bits = np.asarray(plane).astype(np.uint8)
            if name == "uint1":
                bits = np.unpackbits(bits, axis=-1, count=length, bitorder="little")
            joined = joined + (bits.astype(int) << shift)
            shift += int(name.removeprefix("uint"))
        codes = jnp.asarray(joined, jnp.uint8)
    x = np.asarray(fmt.decode(jnp.asarray(codes), jnp.dtype("float32")), np.float64)
    block = (1,) * (x.ndim - len(q.block)) + tuple(q.block)[max(len(q.block) - x.ndim, 0) :]

    def spread(v):
        v = decoded(v) if isinstance(v, qjax.QTensor) else np.asarray(v).astype(np.float64)
        for axis, b in enumerate(block):
            v = np.repeat(v, b, axis)
        return v[tuple(slice(s) for s in x.shape)]

    if q.zero_point is not None:
        x = x - spread(q.zero_point)
    x = x * spread(q.scale)
    x = x if q.offset is None else x + spread(q.offset)
    x = x if q.param_shape is None else x.reshape(q.shape)
    if q.activation is not None and q.activation.permutation is not None:
        x = np.take(x, np.argsort(q.activation.permutation), axis=-2)
    if q.activation is not None and q.activation.signs is not None:
        length = x.shape[-2]
        h = scipy.linalg.hadamard(length) / np.sqrt(length)
        x = (h @ x) * np.asarray(q.activation.signs, np.float64)[:, None]
    if q.activation is not None and q.activation.input_scale is not None:
        x = x / np.asarray(q.activation.input_scale, np.float64)[:, None]
    return np.asarray(jnp.asarray(x, jnp.float32).astype(q.dtype))


def dense(tree):
    leaf = lambda v: jnp.asarray(decoded(v)) if isinstance(v, qjax.QTensor) else v
    return jax.tree.map(leaf, tree, is_leaf=qjax.is_qtensor)


MESH = jax.sharding.AbstractMesh((2,), ("t",))
OTHERS = {  # what else takes a tree of parameters, and never runs the model
    "report": qjax.report,
    "partition_specs": lambda tree: qjax.partition_specs(tree, P(), MESH),
    "partition": lambda tree: qjax.combine(*qjax.partition(tree)),
    "stack": lambda tree: qjax.stack([tree, tree]),
    "unstack": qjax.unstack,
}


def helps(error):
    """Whether our own code raised it and it names a parameter."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return raised_in.startswith(OURS) and re.search("first|last|kernel|bias", str(error))


def takes_or_helps(function, tree):
    try:
        function(tree)
    except (ValueError, TypeError, KeyError) as error:
        if not helps(error) and jax.tree.leaves(tree):
            raise


def judge(tree, x):
    """What became of a tree: "right", "helps", "as dense", or what is wrong with it."""
    try:
        got = qjax.quantized(fn)(tree, x)
    except (ValueError, TypeError, KeyError) as error:
        return "helps" if helps(error) else _as_dense(tree, x, error)
    wanted = fn(dense(tree), x)
    kernel = tree["first"]["kernel"]
    narrow = kernel.dtype != np.float32 or kernel.activation is not None
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        np.asarray(wanted, np.float64),
        rtol=0.1 if narrow else 1e-4,
        atol=0.1 if narrow else 1e-4,
    )
    return "right"


def _as_dense(tree, x, error):
    try:
        fn(dense(tree), x)
    except type(error) as own:
        if type(own) is type(error):
            return "as dense"
    raise error


@pytest.fixture
def _whole_tracebacks():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.parametrize("part", [0, *map(slow, range(1, PARTS))])
@pytest.mark.usefixtures("_whole_tracebacks", "standard_promotion")
def test_hostile_trees(part):
    counts = collections.Counter()
    for seed in range(part * COUNT // PARTS, (part + 1) * COUNT // PARTS):
        what, tree, x = hostile(seed)
        try:
            counts[judge(tree, x)] += 1
            for function in OTHERS.values():
                takes_or_helps(function, tree)
        except Exception as error:
            error.add_note(f"seed {seed}: {what}: {tree.get('first', tree)}")
            raise
    assert counts.total() == COUNT // PARTS
    assert counts["right"] > 10
    assert counts["helps"] > 50
