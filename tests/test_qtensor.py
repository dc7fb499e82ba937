"""QTensor: a pytree that takes any leaf, and says at first use what is wrong with it."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.qtensor import check

W = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
Q = qjax.quantize(W, "int4_g32", 0)
AFFINE = qjax.quantize(W, "uint4_g32", 0)
PLANES = qjax.quantize(W, "q5_0", 0)
NESTED = qjax.quantize(W, "nf4_g32_dq", 0)


def broken(q, **leaves):
    return dataclasses.replace(q, **leaves)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (broken(Q, format="int9"), "unknown format 'int9'; the formats are int8, int7"),
        (
            broken(Q, qvalue=Q.qvalue.astype(jnp.bfloat16)),
            "codes as int4, got bfloat16; a tree map",
        ),
        (broken(Q, qvalue=Q.qvalue.astype(jnp.int8)), "codes as int4, got int8"),
        (broken(Q, qvalue=None), "codes as int4, got NoneType"),
        (broken(Q, qvalue=3), "codes as int4, got int"),
        (broken(Q, qvalue=(Q.qvalue, Q.qvalue)), "holds its codes as int4, got int4 and int4"),
        (broken(PLANES, qvalue=PLANES.qvalue[:1]), "as uint4 and uint1, got uint4"),
        (broken(PLANES, qvalue=PLANES.qvalue[0]), "as uint4 and uint1, got uint4"),
        (
            broken(PLANES, qvalue=(PLANES.qvalue[0], PLANES.qvalue[1][:, :1])),
            r"uint1 plane of q5_0 codes of shape \(64, 12\) has shape \(64, 1\), needed \(64, 2\)",
        ),
        (
            broken(Q, qvalue=Q.qvalue[0]),
            r"codes of shape \(12,\) cannot lie in blocks of \(32, 1\)",
        ),
        (broken(Q, block=(0, 1)), r"block must be a tuple of lengths, got \(0, 1\)"),
        (
            broken(Q, scale=Q.scale.T),
            r"scale has shape \(12, 2\), needed \(2, 12\) for codes of shape \(64, 12\) in "
            r"blocks of \(32, 1\)",
        ),
        (broken(Q, scale=None), "scale must be a floating-point array or a QTensor, got NoneType"),
        (broken(Q, scale=1.0), "scale must be a floating-point array or a QTensor, got float"),
        (broken(Q, scale=jnp.ones((2, 12), jnp.int8)), "scale must be a floating.* got int8"),
        (broken(AFFINE, offset=AFFINE.offset[:1]), r"offset has shape \(1, 12\), needed \(2, 12\)"),
        (
            broken(AFFINE, offset=jnp.ones((2, 12), jnp.int8)),
            "offset must be a floating.* got int8",
        ),
        (broken(Q, zero_point="z"), "zero_point must be an array, got str"),
        (broken(Q, zero_point=NESTED), "zero_point must be an array, got QTensor"),
        (
            broken(Q, zero_point=jnp.ones((2, 1))),
            r"zero_point has shape \(2, 1\), needed \(2, 12\)",
        ),
        (
            broken(NESTED, scale=broken(NESTED.scale, scale=jnp.ones(3))),
            r"^layer/scale: scale has shape \(3,\), needed",
        ),
        (
            broken(NESTED, scale=broken(NESTED.scale, qvalue=NESTED.scale.qvalue[:1])),
            r"^layer/scale: (scale|offset) has shape|^layer: scale has shape",
        ),
        (broken(Q, param_shape=(63, 12)), r"cannot take the weight's shape \(63, 12\)"),
    ],
)
def test_broken_leaves_are_named(q, message):
    with pytest.raises(ValueError, match=message) as error:
        check(q, "layer")
    assert str(error.value).startswith("layer")
    with pytest.raises(ValueError, match=message.replace("layer/", "").replace("layer: ", "")):
        qjax.dequantize(q)


def test_good_leaves_pass():
    for q in (Q, AFFINE, PLANES, NESTED):
        check(q)
        check(jax.eval_shape(lambda q: q, q))
        check(jax.tree.map(np.asarray, q))


def test_casting_a_whole_tree_is_caught_on_use():
    """The mistake people make: `tree.map(lambda x: x.astype(bf16))` over quantized parameters."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"a": Q})
    with pytest.raises(ValueError, match=r"is_leaf=qjax\.is_qtensor"):
        qjax.dequantize(params["a"])


def test_the_constructor_takes_anything():
    spec = jax.sharding.PartitionSpec(None, "x")
    for leaf in (spec, None, 7, "text", object()):
        q = jax.tree.map(lambda _, leaf=leaf: leaf, Q)
        assert q.format == "int4"
        assert repr(q) == "QTensor(int4, shape=?, block=(32, 1), dtype=float32)"


def test_repr_is_one_line_without_codes():
    assert repr(PLANES) == "QTensor(q5_0, shape=(64, 12), block=(32, 1), dtype=float32)"


@pytest.mark.parametrize(
    "use",
    [
        lambda x, q: jnp.dot(x, q),
        lambda x, q: x @ q,
        lambda x, q: x + q,
        lambda x, q: 1.0 + q,
        lambda x, q: -q,
        lambda x, q: q[0],
        lambda x, q: list(q),
        lambda x, q: x @ q.T,
        lambda x, q: q.astype(jnp.bfloat16),
        lambda x, q: q.reshape(-1),
        lambda x, q: jnp.sin(q),
        lambda x, q: jnp.asarray(q),
        lambda x, q: np.asarray(q),
        lambda x, q: jnp.einsum("ab,bc->ac", x, q),
        lambda x, q: jnp.take(q, jnp.array([0]), axis=0),
        lambda x, q: jax.jit(jnp.dot)(x, q),
    ],
)
def test_an_unwrapped_function_is_told_to_wrap(use):
    told = r"QTensor\(int4.*Wrap the function .*qjax.quantized\(fn\)"
    with pytest.raises((TypeError, AttributeError), match=told):
        use(jnp.ones((2, 64)), Q)


def test_other_missing_attributes_are_missed_plainly():
    with pytest.raises(AttributeError, match=r"^a QTensor has no attribute 'qvaleu'$"):
        getattr(Q, "qvaleu")  # noqa: B009
    assert not hasattr(Q, "__deepcopy__")
    assert copy.deepcopy(Q).block == Q.block
    assert pickle.loads(pickle.dumps(Q)).dtype == Q.dtype


def test_it_is_a_pytree_with_named_leaves():
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(NESTED)]
    assert paths == [".qvalue", ".scale.qvalue", ".scale.scale", ".scale.offset"]
    leaves, tree = jax.tree.flatten(NESTED)
    assert jax.tree.structure(jax.tree.unflatten(tree, leaves)) == tree
    assert hash(tree) == hash(jax.tree.structure(qjax.quantize(W, "nf4_g32_dq", 0)))


def test_scan_takes_a_stack_apart():
    stack = qjax.quantize(np.stack([W, 2 * W]), "q5_0", 1, batch_axis=0)
    _, out = jax.lax.scan(lambda c, q: (c, qjax.dequantize(q)), None, stack)
    np.testing.assert_array_equal(out, qjax.dequantize(stack))


def test_param_shape_is_the_weights_own():
    q = dataclasses.replace(Q, param_shape=(4, 16, 12))
    assert (q.shape, q.ndim, q.size, q.storage_shape) == ((4, 16, 12), 3, W.size, (64, 12))
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(Q).reshape(4, 16, 12))


def test_a_stack_of_weights_of_another_shape():
    """The block keeps an entry for each axis of one weight's storage, so that a stack is known."""
    w = jax.random.normal(jax.random.key(0), (24, 32))
    one = qjax.quantize(w, "int4_g8", 1)
    one = dataclasses.replace(one, block=(1, 8), param_shape=(4, 6, 32))
    stacked = qjax.stack([one, one])
    assert (one.shape, stacked.shape) == ((4, 6, 32), (2, 4, 6, 32))
    scan = lambda w: jax.lax.scan(lambda c, w: (c + w, None), jnp.zeros((4, 6, 32)), w)[0]
    got = qjax.quantized(scan)(stacked)
    np.testing.assert_array_equal(got, 2 * qjax.dequantize(one))
    with pytest.raises(ValueError, match="an entry for each axis of one weight's storage"):
        qjax.dequantize(dataclasses.replace(one, block=(8,)))


def test_zero_points_may_be_any_number_type():
    zero = jnp.full((2, 12), 3)
    wanted = qjax.dequantize(Q) - 3 * jnp.repeat(Q.scale.astype(jnp.float32), 32, 0)
    for dtype in (jnp.int4, jnp.uint8, jnp.int32, jnp.float16):
        q = dataclasses.replace(Q, zero_point=zero.astype(dtype))
        np.testing.assert_allclose(qjax.dequantize(q), wanted, atol=1e-6)


def test_is_qtensor():
    assert qjax.is_qtensor(Q)
    assert not any(map(qjax.is_qtensor, (W, None, 1, "q")))


@pytest.mark.parametrize("spec", ["int4_g8", "int3_g8", "int2_g8"])
def test_on_a_gpu_narrow_codes_stay_as_they_lie(spec):
    """XLA for a GPU copies stacks of 4-bit integers transposed, and cannot do so of 2 bits."""
    q = qjax.quantize(jnp.ones((3, 16, 8)), spec, 1)
    scan = lambda x, w: jax.lax.scan(lambda x, w: (x @ jnp.pad(w, ((0, 0), (0, 8))), None), x, w)[0]
    traced = jax.jit(qjax.quantized(scan)).trace(jnp.ones((2, 16)), q)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert text["cuda"].count("@LayoutConstraint") == 1
    assert "@LayoutConstraint" not in text["cpu"]


@pytest.mark.parametrize("spec", ["int4_g8", "int2_g8"])
def test_on_a_gpu_narrow_codes_turn_as_bytes(spec):
    """XLA for a GPU does not compile the transposition of 2-bit integers, and copies that of 4."""
    q = qjax.quantize(jnp.ones((16, 8)), spec, 1)
    traced = jax.jit(qjax.quantized(lambda x, w: x @ w.T)).trace(jnp.ones((2, 8)), q)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    turned = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert any("xi8>" in line for line in turned)
    assert not any(f"xi{n}>" in line for line in turned for n in (2, 4))


@pytest.mark.parametrize(("spec", "casts"), [("int2_g8", 1), ("int3_g8", 1), ("int4_g8", 0)])
def test_on_a_gpu_a_cast_to_2_bits_stands_alone(spec, casts):
    """XLA for a GPU writes 2-bit integers beside a sum from threads that overwrite each other."""
    traced = jax.jit(lambda w: qjax.quantize(w, spec, 1).qvalue).trace(jnp.ones((16, 24)))
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert text["cuda"].count("stablehlo.optimization_barrier") == 2 * casts
    assert "stablehlo.optimization_barrier" not in text["cpu"]
    sums = [line for line in text["cuda"].splitlines() if "stablehlo.reduce" in line]
    assert sums  # of the scales
    assert not any("ui8>" in line for line in sums)  # none packs bits


def test_many_layers_of_2_bits_are_stacked():
    """XLA:CPU aborts the process where it concatenates so many of them."""
    layers = [{"w": qjax.quantize(jnp.full((576, 192), float(i)), "int2", 0)} for i in range(30)]
    stacked = qjax.stack(layers)["w"]
    for i in (0, 17, 29):
        np.testing.assert_array_equal(stacked.qvalue[i], layers[i]["w"].qvalue)
