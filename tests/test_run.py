"""quantized(fn) and explain: the unmodified function on quantized weights, in every transform."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, dequantized_uses, few, relative_error, slow

import qjax

SPECS = [
    "int8",
    "int8_tensor",
    "int4_g32",
    "int4_g24",  # ragged
    "uint4_g32",
    "nf4_g64",
    "nf4_g32_dq",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e4m3_128x128",
]
DYNAMIC = ["int8/int8_token", "int4_g24/int8_token", "fp8_e4m3/fp8_e4m3_token"]


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# name -> (function of (weight, x), weight shape, contracted axes, batch axes, x shape)
MATMULS = {
    "x @ w": (lambda w, x: x @ w, (64, 48), 0, (), (5, 64)),
    "w @ x": (lambda w, x: w @ x, (48, 64), 1, (), (64, 5)),
    "x @ w.T": (lambda w, x: x @ w.T, (48, 64), 1, (), (5, 64)),
    "vector": (lambda w, x: x @ w, (64, 48), 0, (), (64,)),
    "heads in": (lambda w, x: jnp.einsum("bsd,dhk->bhsk", x, w), (64, 4, 12), 0, (), (2, 3, 64)),
    "heads out": (
        lambda w, x: jnp.einsum("bshk,hkd->bsd", x, w),
        (4, 32, 24),
        (0, 1),
        (),
        (2, 3, 4, 32),
    ),
    "experts": (lambda w, x: jnp.einsum("ebd,edf->ebf", x, w), (3, 64, 24), 1, 0, (3, 2, 64)),
    "experts, weight first": (
        lambda w, x: jnp.einsum("efd,ebd->ebf", w, x),
        (3, 24, 64),
        2,
        0,
        (3, 2, 64),
    ),
    "tensordot": (
        lambda w, x: jnp.tensordot(x, w, axes=((1, 2), (0, 1))),
        (4, 32, 24),
        (0, 1),
        (),
        (5, 4, 32),
    ),
    "three operands": (
        lambda w, x: jnp.einsum("bd,df,f->bf", x, w, jnp.arange(48.0)),
        (64, 48),
        0,
        (),
        (5, 64),
    ),
    "fused, then split": (
        lambda w, x: jnp.concatenate([x @ p for p in jnp.split(w, 3, axis=1)][::-1], -1),
        (64, 48),
        0,
        (),
        (5, 64),
    ),
    "reshaped": (lambda w, x: x @ w.reshape(64, 48), (64, 4, 12), 0, (), (5, 64)),
    "stacked, one layer": (lambda w, x: x @ w[1], (3, 64, 48), 1, 0, (5, 64)),
    "stacked, dynamic layer": (
        lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, x.argmax() % 3, keepdims=False),
        (3, 64, 48),
        1,
        0,
        (5, 64),
    ),
    "concatenated": (
        lambda w, x: x @ jnp.concatenate([w, w], axis=1),
        (64, 48),
        0,
        (),
        (5, 64),
    ),
}


# Scales of channels, of ragged groups, with scales of their own, of blocks along two axes.
EVERYWHERE = ["int8", "int4_g24", "nf4_g32_dq", "fp8_e4m3_128x128"]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        (name, spec) if spec in EVERYWHERE or name in ("x @ w", "heads out") else slow(name, spec)
        for name in MATMULS
        for spec in SPECS
    ],
)
def test_matmul_equals_the_dequantized_weights(name, spec):
    fn, shape, axis, batch, x_shape = MATMULS[name]
    q = qjax.quantize(normal(0, *shape), spec, axis, batch_axis=batch)
    x = normal(1, *x_shape)
    got = jax.jit(qjax.quantized(fn))(q, x)
    wanted = fn(qjax.dequantize(q), x)
    assert got.dtype == wanted.dtype
    assert relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize("name", [n for n in MATMULS if n != "three operands"])
@pytest.mark.parametrize("spec", ["int8", "int4_g32", *DYNAMIC])
def test_matmul_is_never_dequantized_first(name, spec):
    fn, shape, axis, batch, x_shape = MATMULS[name]
    q = qjax.quantize(normal(0, *shape), spec, axis, batch_axis=batch)
    uses = qjax.explain(fn, q, normal(1, *x_shape)).uses
    assert uses
    assert not dequantized_uses(fn, q, normal(1, *x_shape))


# name -> (function of (weight, x), weight shape, contracted axes, batch axes, x shape)
SIZES = jnp.array([2, 0, 4], jnp.int32)  # one row belongs to no expert
OTHER_PRODUCTS = {
    "experts": (lambda w, x: jax.lax.ragged_dot(x, w, SIZES), (3, 64, 32), 1, 0, (7, 64)),
    "convolution": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (3, 3, 16, 8),
        (0, 1, 2),
        (),
        (2, 10, 9, 16),
    ),
    "grouped convolution": (
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1,), "VALID", feature_group_count=4),
        (8, 4, 3),
        (1, 2),
        (),
        (2, 16, 9),
    ),
}


@pytest.mark.parametrize("spec", few([*SPECS, *DYNAMIC], [*EVERYWHERE, *DYNAMIC]))
@pytest.mark.parametrize("name", OTHER_PRODUCTS)
def test_experts_and_convolutions(name, spec):
    fn, shape, axis, batch, x_shape = OTHER_PRODUCTS[name]
    w, x = normal(0, *shape), normal(1, *x_shape)
    (found,) = qjax.find_sites(lambda p, x: fn(p["w"], x), {"w": w}, x)["w"]
    assert found.contract_axes == tuple(np.atleast_1d(axis))
    assert found.batch_axes == tuple(np.atleast_1d(batch))
    q = qjax.quantize(w, spec, axis, batch_axis=batch)
    assert not dequantized_uses(fn, q, x)
    got, wanted = jax.jit(qjax.quantized(fn))(q, x), fn(qjax.dequantize(q), x)
    assert got.dtype == wanted.dtype
    limit = {"": 2e-6, "int8": 0.02, "fp8_e4m3": 0.08}[
        spec.partition("/")[2].removesuffix("_token")
    ]
    assert relative_error(got, wanted) < limit
    slope = jax.jit(jax.grad(lambda x: qjax.quantized(fn)(q, x).sum()))(x)
    straight = jax.jit(jax.grad(lambda x: fn(qjax.dequantize(q), x).sum()))(x)
    assert relative_error(slope, straight) < 2e-6


def numpy_dynamic(x: np.ndarray, q: qjax.QTensor, size: int) -> np.ndarray:
    """Per-token int8 rounding and exact integer accumulation, per group of the contraction."""
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    codes = np.clip(np.round(x / scale), -128, 127).astype(np.int64)
    w = np.asarray(q.qvalue).astype(np.int64)
    w_scale = np.asarray(q.scale, np.float64)
    y = 0.0
    for g, start in enumerate(range(0, x.shape[1], size)):
        part = slice(start, start + size)
        y = y + (codes[:, part] @ w[part]) * w_scale[g]
    return y * scale


@pytest.mark.parametrize(("spec", "size"), [("int8/int8_token", 64), ("int4_g24/int8_token", 24)])
def test_dynamic_int8_is_exact_in_the_integers(spec, size):
    x, q = normal(1, 5, 64), qjax.quantize(normal(0, 64, 48), spec, 0)
    got = qjax.quantized(jnp.matmul)(x, q)
    assert relative_error(got, numpy_dynamic(np.asarray(x), q, size)) < 1e-6


def test_dynamic_int8_accumulates_in_int32():
    x, q = normal(1, 5, 64), qjax.quantize(normal(0, 64, 48), "int8/int8_token", 0)
    text = jax.jit(qjax.quantized(jnp.matmul)).lower(x, q).as_text()
    assert re.search(r"dot_general.*tensor<5x64xi8>, tensor<64x48xi8>\) -> tensor<5x48xi32>", text)


def test_dynamic_fp8_multiplies_fp8():
    x, q = normal(1, 5, 64), qjax.quantize(normal(0, 64, 48), "fp8_e4m3/fp8_e4m3_token", 0)
    text = jax.jit(qjax.quantized(jnp.matmul)).lower(x, q).as_text()
    assert re.search(r"dot_general.*tensor<5x64xf8E4M3FN>, tensor<64x48xf8E4M3FN>\) ->", text)
    got, wanted = qjax.quantized(jnp.matmul)(x, q), x @ qjax.dequantize(q)
    assert relative_error(got, wanted) < 0.06  # three mantissa bits: 2^-4 of each term


@pytest.mark.parametrize("name", ["x @ w", "w @ x", "heads out", "experts"])
@pytest.mark.parametrize("spec", DYNAMIC)
def test_dynamic_gradients_are_straight_through(name, spec):
    fn, shape, axis, batch, x_shape = MATMULS[name]
    q = qjax.quantize(normal(0, *shape), spec, axis, batch_axis=batch)
    x, t = normal(1, *x_shape), normal(2, *x_shape)
    run = qjax.quantized(fn)
    w = qjax.dequantize(q)
    got = jax.jit(lambda x, t: jax.jvp(lambda x: run(q, x), (x,), (t,))[1])(x, t)
    assert relative_error(got, fn(w, t)) < 2e-6
    loss = lambda x: jnp.sum(jnp.sin(jax.lax.stop_gradient(run(q, x))) * run(q, x))
    got = jax.jit(jax.grad(loss))(x)
    wanted = jax.jit(lambda x: jax.vjp(lambda x: fn(w, x), x)[1](jnp.sin(run(q, x)))[0])(x)
    assert relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [
        *((jnp.bfloat16, "int8"), (jnp.bfloat16, "nf4_g32_dq")),
        *((jnp.float16, "int4_g32"), (jnp.float16, "fp8_e4m3")),
        *(slow(jnp.bfloat16, spec) for spec in ("int4_g32", "fp8_e4m3")),
        *(slow(jnp.float16, spec) for spec in ("int8", "nf4_g32_dq")),
    ],
)
def test_half_precision_is_at_most_twice_as_wrong_as_xla(spec, dtype):
    x, w = normal(1, 16, 256, dtype=dtype), normal(0, 256, 64, dtype=dtype)
    q = qjax.quantize(w, spec, 0)
    got = qjax.quantized(jnp.matmul)(x, q)
    assert got.dtype == dtype
    exact = np.asarray(x, np.float64) @ np.asarray(
        qjax.dequantize(qjax.quantize(w.astype(jnp.float32), spec, 0)), np.float64
    )
    xla = relative_error(x @ qjax.dequantize(q), exact)
    assert relative_error(got, exact) <= 2 * xla


# --- lookups and elementwise use


@pytest.mark.parametrize("spec", SPECS)
def test_lookup_takes_rows_of_codes(spec):
    q = qjax.quantize(normal(0, 50, 64), spec, 1)
    ids = jnp.array([[3, 0, 49], [7, 7, 1]])
    for fn in (lambda w, i: jnp.take(w, i, axis=0), lambda w, i: w[i]):
        got = jax.jit(qjax.quantized(fn))(q, ids)
        np.testing.assert_array_equal(got, fn(qjax.dequantize(q), ids))
    table_wide = spec in ("int8_tensor", "fp8_e4m3_128x128")  # blocks run over the rows
    assert bool(dequantized_uses(lambda w, i: w[i], q, ids)) == table_wide


def test_out_of_range_lookups_are_nan_as_in_jax():
    q = qjax.quantize(normal(0, 50, 64), "int4_g32", 1)
    fn = lambda w, i: jnp.take(w, i, axis=0)
    got = qjax.quantized(fn)(q, jnp.array([0, 99]))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[0]).all()


def test_tied_embedding_is_looked_up_and_contracted():
    def fn(p, ids):
        return jnp.take(p["table"], ids, axis=0) @ p["table"].T

    q = {"table": qjax.quantize(normal(0, 50, 64), "int4_g32", 1)}
    ids = jnp.arange(6)
    assert relative_error(qjax.quantized(fn)(q, ids), fn(dense(q), ids)) < 2e-6
    assert [u.how for u in qjax.explain(fn, q, ids).uses] == [
        "look up codes, dequantize rows",
        "dequantize in the graph, dot",
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_elementwise_use_opens_the_weight_and_says_so(spec):
    q = qjax.quantize(normal(0, 64, 48), spec, 0)
    fn = lambda w: w / jnp.linalg.norm(w)
    assert relative_error(qjax.quantized(fn)(q), fn(qjax.dequantize(q))) < 2e-6
    assert dequantized_uses(fn, q)


def test_explain_prints_a_table():
    q = {"a": qjax.quantize(normal(0, 64, 48), "int8", 0), "b": jnp.ones(48)}
    text = str(
        qjax.explain(
            lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) * p["a"].sum(), q, jnp.ones((1, 64))
        )
    )
    assert text.splitlines() == [
        "path  primitive    weight  format  how",
        "a     dot_general  64x48   int8    dot on codes, scale after",
        "a     reduce_sum   64x48   int8    dequantized: reduce_sum has no rule for it",
    ]


# --- transforms


def stack_model(p, x):
    """Stacked layers in a scan with remat, an inner jit, a custom_jvp activation, a tied table."""

    @jax.checkpoint
    def layer(x, p):
        return jax.nn.relu(x @ p["w"] + p["b"][None]), x.sum()

    @jax.jit
    def head(table, x):
        return x @ table.T

    x, sums = jax.lax.scan(layer, jnp.take(p["table"], x, axis=0), p["layers"])
    return head(p["table"], x), sums


def stack_params():
    return {
        "table": normal(0, 50, 64),
        "layers": {"w": normal(1, 3, 64, 64) / 8, "b": normal(2, 3, 64)},
    }


@pytest.mark.parametrize("spec", [*SPECS, *DYNAMIC])
def test_scan_remat_and_jit_are_entered(spec):
    params, ids = stack_params(), jnp.arange(5)
    recipe = qjax.Recipe(qjax.Rule(".*", spec))
    q = qjax.quantize_params(params, recipe, qjax.find_sites(stack_model, params, ids))
    assert q["layers"]["w"].scale.shape[0] == 3
    assert not dequantized_uses(stack_model, q, ids) or "tensor" in spec or "x128" in spec
    if "/" not in spec:
        got = jax.jit(qjax.quantized(stack_model))(q, ids)
        assert relative_error(got, stack_model(dense(q), ids)) < 1e-5


@pytest.mark.parametrize("spec", ["int8", "int4_g32", "nf4_g32_dq", "int8/int8_token"])
def test_gradients_reach_what_is_not_quantized(spec):
    params, ids = stack_params(), jnp.arange(5)
    recipe = qjax.Recipe(qjax.Rule(".*", spec))
    q = qjax.quantize_params(params, recipe, qjax.find_sites(stack_model, params, ids))
    bias = params["layers"]["b"]

    def loss(bias, fn, p):
        p = {**p, "layers": {**p["layers"], "b": bias}}
        return jnp.mean(jnp.square(fn(p, ids)[0]))

    got = jax.jit(jax.grad(lambda b: loss(b, qjax.quantized(stack_model), q)))(bias)
    wanted = jax.jit(jax.grad(lambda b: loss(b, stack_model, dense(q))))(bias)
    assert relative_error(got, wanted) < (0.2 if "/" in spec else 1e-4)
    assert np.abs(got).max() > 0


def test_quantized_weights_get_no_gradient():
    q = qjax.quantize(normal(0, 64, 48), "fp8_e4m3", 0)
    x = normal(1, 5, 64)
    gradient = jax.grad(lambda q: qjax.quantized(jnp.matmul)(x, q).sum())(q)
    assert all(not np.asarray(g, np.float32).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("spec", ["int8", "int4_g32", "nf4_g32_dq", "int8/int8_token"])
def test_vmap_over_inputs_and_over_stacked_weights(spec):
    weights, x = normal(0, 4, 64, 48), normal(1, 4, 5, 64)
    run = qjax.quantized(jnp.matmul)
    q = qjax.quantize(weights, spec, 1, batch_axis=0)
    each = [jax.tree.map(lambda v, i=i: v[i], q) for i in range(4)]
    one = [qjax.quantize(w, spec, 0) for w in weights]
    single = jax.jit(run)
    wanted = jnp.stack([single(xi, qi) for xi, qi in zip(x, one, strict=True)])
    assert relative_error(jax.jit(jax.vmap(run))(x, q), wanted) < 2e-6
    shared = jnp.stack([single(xi, one[0]) for xi in x])
    assert relative_error(jax.jit(jax.vmap(run, (0, None)))(x, one[0]), shared) < 2e-6
    assert [jax.tree.map(jnp.shape, e) for e in each]  # leaves slice along the leading axis


def test_pmap():
    n = jax.local_device_count()
    assert n > 1
    q = qjax.quantize(normal(0, n, 64, 48), "int4_g32", 1, batch_axis=0)
    x = normal(1, n, 5, 64)
    got = jax.pmap(qjax.quantized(jnp.matmul))(x, q)
    assert relative_error(got, x @ qjax.dequantize(q)) < 2e-6


def test_jvp_of_weight_only_matmuls():
    q, x = qjax.quantize(normal(0, 64, 48), "nf4_g32_dq", 0), normal(1, 5, 64)
    _, tangent = jax.jvp(lambda x: qjax.quantized(jnp.matmul)(x, q), (x,), (x,))
    assert relative_error(tangent, x @ qjax.dequantize(q)) < 2e-6


def test_custom_gradients_of_the_model_are_kept():
    @jax.custom_vjp
    def scaled(x, w):
        return x @ w

    scaled.defvjp(lambda x, w: (x @ w, w), lambda w, g: (2 * g @ w.T, jnp.zeros_like(w)))
    q, x = qjax.quantize(normal(0, 64, 48), "int8", 0), normal(1, 5, 64)
    got = jax.grad(lambda x: qjax.quantized(scaled)(x, q).sum())(x)
    assert relative_error(got, 2 * jnp.ones((5, 48)) @ qjax.dequantize(q).T) < 2e-6
    assert dequantized_uses(scaled, x, q) == [": dequantized: custom_vjp_call has no rule for it"]


def test_a_carried_weight_stays_quantized_only_if_it_is_handed_on():
    def same(w, x):
        return jax.lax.scan(lambda c, _: ((c[0], c[1] @ c[0]), None), (w, x), None, length=2)[0][1]

    def changed(w, x):
        return jax.lax.scan(lambda c, _: ((c[0] * 2, c[1] @ c[0]), None), (w, x), None, length=2)[
            0
        ][1]

    q, x = qjax.quantize(normal(0, 64, 64) / 8, "int8", 0), normal(1, 5, 64)
    for fn, opened in ((same, False), (changed, True)):
        assert relative_error(qjax.quantized(fn)(q, x), fn(qjax.dequantize(q), x)) < 1e-5
        assert bool(dequantized_uses(fn, q, x)) == opened


@pytest.mark.parametrize("spec", ["int8", "int4_g32", "nf4_g32_dq"])
def test_loops_and_branches_are_entered(spec):
    def fn(w, x):
        x = jax.lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: x, w, x)
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)
        step = lambda c: (jnp.tanh(c[0] @ c[2]), c[1] + 1, c[2])
        x = jax.lax.while_loop(lambda c: c[1] < 3, step, (x, 0, w))[0]
        kept = jax.lax.switch(jnp.int32(x[0, 0] > 0), [lambda w: w, lambda w: w.T.T], w)
        return x @ kept

    q = qjax.quantize(normal(0, 64, 64) / 8, spec, 0)
    for x in (normal(1, 5, 64), -jnp.abs(normal(2, 5, 64))):
        got = jax.jit(qjax.quantized(fn))(q, x)
        assert relative_error(got, fn(qjax.dequantize(q), x)) < 1e-5
    assert len(qjax.explain(fn, q, x).uses) == 4
    assert not dequantized_uses(fn, q, x)


def test_branches_that_disagree_open_the_weight():
    fn = lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w * 2, w)
    q, x = qjax.quantize(normal(0, 64, 48), "int8", 0), normal(1, 5, 64)
    for y in (x, -x):
        assert relative_error(qjax.quantized(fn)(q, y), fn(qjax.dequantize(q), y)) < 2e-6
    assert ": dequantized: the branches hold it differently" in dequantized_uses(fn, q, x)


# --- the contract with jit


@pytest.mark.parametrize("spec", ["int8", "int4_g32", "nf4_g32_dq", "int8/int8_token"])
def test_the_second_call_compiles_nothing(spec):
    traces = []

    def fn(p, x, scale=1.0):
        traces.append(None)
        return x @ p["w"] * scale

    run = jax.jit(qjax.quantized(fn), static_argnames="scale")
    for seed in range(3):
        run({"w": qjax.quantize(normal(seed, 64, 48), spec, 0)}, normal(9, 5, 64), scale=2.0)
    assert len(traces) == 1
    assert run._cache_size() == 1


def test_inner_jit_called_twice_is_lowered_once():
    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        return layer(p[1], layer(p[0], x))

    q = [qjax.quantize(normal(s, 64, 64), "int8", 0) for s in (0, 1)]
    text = jax.jit(qjax.quantized(fn)).lower(q, normal(9, 5, 64)).as_text()
    assert text.count("func.func private @layer") == 1


def test_optimized_hlo_has_the_dots_of_a_hand_written_function():
    q, x = qjax.quantize(normal(0, 64, 48), "int8", 0), normal(1, 16, 64)

    def by_hand(x, codes, scale):
        return x @ codes.astype(jnp.float32) * scale

    dots = lambda text: sorted(re.findall(r"= \S+ (dot|custom-call)\(", text))
    ours = jax.jit(qjax.quantized(jnp.matmul)).lower(x, q).compile().as_text()
    theirs = jax.jit(by_hand).lower(x, q.qvalue, q.scale).compile().as_text()
    assert dots(ours) == dots(theirs)


def test_no_tracer_leaks(no_tracer_leaks):
    params, ids = stack_params(), jnp.arange(5)
    q = qjax.quantize_params(params, "int8", qjax.find_sites(stack_model, params, ids))
    jax.jit(qjax.quantized(stack_model))(q, ids)
    qjax.explain(stack_model, q, ids)


def test_python_values_and_outputs_stay_what_they_are():
    def fn(p, flag, name, *, n, x):
        assert flag is True
        assert name == "relu"
        return {"y": x @ p["w"], "name": name, "n": n, "none": None}

    q = {"w": qjax.quantize(normal(0, 64, 48), "int8", 0)}
    out = qjax.quantized(fn)(q, True, "relu", n=3, x=normal(1, 5, 64))
    assert out["name"] == "relu"
    assert out["n"] == 3
    assert out["none"] is None
    assert out["y"].shape == (5, 48)


def test_qtensors_anywhere_among_the_arguments_and_any_outputs():
    """In tuples and dictionaries, by keyword, one of them twice; a NamedTuple comes back."""
    point = collections.namedtuple("point", "x y")

    def fn(first, rest, *more, scale, options):
        a, (b, act) = first, rest["b"]
        y = act(options["x"] @ a) @ b
        return point(y * scale, [{"again": more[0][0].T @ a, "act": act}])

    a, b = (qjax.quantize(normal(i, 64, 64), "int4_g16", 0) for i in range(2))
    x = normal(2, 64, 64)
    args, kwargs = (a, {"b": (b, jnp.tanh)}, [a, 7]), {"scale": b, "options": {"x": x, "n": "no"}}
    got = qjax.quantized(fn)(*args, **kwargs)
    wanted = fn(*dense(args), **dense(kwargs))
    assert type(got) is point
    assert got.y[0]["act"] is jnp.tanh
    assert relative_error((got.x, got.y[0]["again"]), (wanted.x, wanted.y[0]["again"])) < 1e-5


def test_without_qtensors_it_is_the_function_itself():
    fn = qjax.quantized(lambda p, x: x @ p)
    w, x = normal(0, 64, 48), normal(1, 5, 64)
    np.testing.assert_array_equal(fn(w, x), x @ w)


def test_a_weight_handed_out_is_dequantized():
    q = qjax.quantize(normal(0, 64, 48), "int4_g32", 0)
    np.testing.assert_array_equal(qjax.quantized(lambda w: w)(q), qjax.dequantize(q))


def test_broken_leaves_name_the_parameter():
    q = {"layer": {"kernel": qjax.quantize(normal(0, 64, 48), "int8", 0)}}
    cast = jax.tree.map(lambda v: v.astype(jnp.bfloat16), q)
    with pytest.raises(
        ValueError, match=r"layer/kernel: int8 holds its codes as int8, got bfloat16.*is_leaf"
    ):
        qjax.quantized(lambda p, x: x @ p["layer"]["kernel"])(cast, normal(1, 5, 64))
