"""Every recipe's three GEMMs against casts and sums that numpy makes in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import without_round_trips

from qjax import training
from qjax.formats import FORMATS
from qjax.training import casting

DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
KEEP_NOTHING = {"keep_head": False, "keep_first": 0, "keep_last": 0}


def nearest(x, name):
    """x rounded to the format's values by ml_dtypes, saturated."""
    if name == "int8":
        return np.clip(np.rint(x), -127, 127)
    top = float(ml_dtypes.finfo(DTYPES[name]).max)
    return np.clip(x, -top, top).astype(DTYPES[name]).astype(np.float64)


def top_code(name):
    return 127.0 if name == "int8" else float(ml_dtypes.finfo(DTYPES[name]).max)


def rounded(x, how, contracted):
    """A matrix as `how` rounds it (to nearest), float64; one loop over its blocks."""
    if how is None:
        return x
    if contracted == 0:
        return rounded(x.T, how, 1).T
    rows, columns = x.shape
    block = {(): x.shape, None: (1, columns)}.get(how.block)
    if block is None:
        block = (1, how.block) if isinstance(how.block, int) else how.block[::-1]
    result, code = np.zeros_like(x), top_code(how.format)
    outer = np.abs(x).max() / (6 * 448)
    for i in range(0, rows, block[0]):
        for j in range(0, columns, block[1]):
            part = x[i : i + block[0], j : j + block[1]]
            scale = np.abs(part).max() / code
            if how.scale == "power_of_two":
                scale = 2.0 ** np.ceil(np.log2(scale))
            elif how.scale == "nvfp4":
                scale = nearest(scale / outer, "fp8_e4m3") * outer
            result[i : i + block[0], j : j + block[1]] = nearest(part / scale, how.format) * scale
    return result


def plain(how):
    """A cast without what is random."""
    return None if how is None else how._replace(stochastic=False, hadamard=False)


def deterministic(name):
    recipe = training.RECIPES[name]
    pairs = {
        n: tuple(map(plain, getattr(recipe, n))) for n in ("output", "input_grad", "weight_grad")
    }
    return dataclasses.replace(recipe, **pairs, **KEEP_NOTHING)


def operands(rows=48, inner=160, columns=40):
    """Normal, with channels of different size, so that granularity matters."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(rows, inner)) * np.exp(rng.normal(size=(rows, 1)))
    w = rng.normal(size=(inner, columns)) * np.exp(rng.normal(size=(1, columns))) / 13
    g = rng.normal(size=(rows, columns)) * 1e-3
    return tuple(np.float32(v).astype(np.float64) for v in (x, w, g))


def relative(got, wanted):
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


def pull(fn, recipe, w, x, g, dtype=jnp.float32):
    """(y, dw, dx) of `fn(params, x)` under a recipe, with cotangent g of y."""
    cast = lambda v: jnp.asarray(v, dtype)
    loss = lambda p, x: jnp.sum(fn(p, x) * cast(g))
    low = training.fp8(lambda p, x: (loss(p, x), fn(p, x)), recipe, has_aux=True, argnums=(0, 1))
    params = {"w": cast(w)}
    state = low.init(params, cast(x))
    if low.recipe.delayed:
        state = low.update(state, jax.jit(low.grads)(params, state, cast(x))[2])
    (_, y), (dp, dx), _ = jax.jit(low.grads)(params, state, cast(x))
    return y, dp["w"], dx


@pytest.mark.parametrize("name", training.RECIPES)
def test_three_gemms_against_float64(name):
    x, w, g = operands()
    recipe = deterministic(name)
    y, dw, dx = pull(lambda p, x: x @ p["w"], recipe, w, x, g)
    o, i, v = recipe.output, recipe.input_grad, recipe.weight_grad
    wanted = (
        (y, rounded(x, o[0], 1) @ rounded(w, o[1], 0), x @ w),
        (dx, rounded(g, i[0], 1) @ rounded(w, i[1], 1).T, g @ w.T),
        (dw, rounded(x, v[0], 0).T @ rounded(g, v[1], 0), x.T @ g),
    )
    for got, same_rounding, exact in wanted:
        assert relative(got, same_rounding) < 2e-3  # a code in a thousand on a tie
        assert relative(got, exact) <= 1.05 * relative(same_rounding, exact) + 1e-6


@pytest.mark.parametrize("name", ["current", "rowwise"])
def test_bfloat16_results_against_float64(name):
    short = lambda v: np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64)
    x, w, g = map(short, operands())
    recipe = deterministic(name)
    y, dw, dx = pull(lambda p, x: x @ p["w"], recipe, w, x, g, jnp.bfloat16)
    o, i, v = recipe.output, recipe.input_grad, recipe.weight_grad
    wanted = (
        (y, rounded(x, o[0], 1) @ rounded(w, o[1], 0)),
        (dx, rounded(g, i[0], 1) @ rounded(w, i[1], 1).T),
        (dw, rounded(x, v[0], 0).T @ rounded(g, v[1], 0)),
    )
    for got, same_rounding in wanted:
        assert got.dtype == jnp.bfloat16
        # three roundings of 2^-9 (scale, operand or product, result), and a code in a thousand
        assert relative(got, same_rounding) < 3 * 2**-9 + 2e-3


FORMS = {
    "x @ w": (lambda p, x: x @ p["w"], (48, 160), lambda x, w: x @ w),
    "w on the left": (lambda p, x: p["w"].T @ x.T, (48, 160), lambda x, w: w.T @ x.T),
    "transposed": (lambda p, x: x @ p["w"].T.T, (48, 160), lambda x, w: x @ w),
    "tokens in two axes": (
        lambda p, x: (x.reshape(4, 12, 160) @ p["w"]).reshape(48, 40),
        (48, 160),
        lambda x, w: x @ w,
    ),
    "heads": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(48, 10, 16), p["w"].reshape(10, 16, 40)),
        (48, 160),
        lambda x, w: x @ w,
    ),
    "experts": (
        lambda p, x: jnp.einsum(
            "ebk,ekd->ebd", x.reshape(2, 24, 160), p["w"].reshape(2, 80, 40).repeat(2, 1)
        ),
        (48, 160),
        None,
    ),
    "one vector each": (
        lambda p, x: jax.vmap(lambda v: v @ p["w"])(x),
        (48, 160),
        lambda x, w: x @ w,
    ),
}


@pytest.mark.parametrize("name", ["rowwise", pytest.param("block", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_any_dimension_numbers(form, name):
    fn, _, truth = FORMS[form]
    x, w, g = operands()
    recipe = deterministic(name)
    if truth is None:
        p = {"w": jnp.asarray(w, jnp.float32)}
        f32 = jnp.asarray(x, jnp.float32)
        shape = fn(p, f32).shape
        g = np.random.default_rng(0).normal(size=shape)
        truth = lambda x, w: np.einsum(
            "ebk,ekd->ebd", x.reshape(2, 24, 160), w.reshape(2, 80, 40).repeat(2, 1)
        )
        _, (dw, dx) = jax.value_and_grad(
            lambda w, x: jnp.sum(fn({"w": w}, x) * jnp.asarray(g, jnp.float32)), (0, 1)
        )(p["w"], f32)
    else:
        g = g.T if form == "w on the left" else g
        flat = g.T if form == "w on the left" else g
        dw, dx = x.T @ flat, flat @ w.T
    got = pull(fn, recipe, w, x, g)
    for mine, exact in zip(got, (truth(x, w), np.asarray(dw), np.asarray(dx)), strict=True):
        assert mine.shape == exact.shape
        assert relative(mine, np.asarray(exact, np.float64)) < 0.06


@pytest.mark.parametrize("name", ["delayed", "rowwise", "block", "nvfp4", "int8"])
def test_ragged_dot(name):
    rng = np.random.default_rng(1)
    sizes = np.array([5, 0, 20, 7])
    x, w = rng.normal(size=(32, 48)), rng.normal(size=(4, 48, 24)) / 7
    g = rng.normal(size=(32, 24))
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.asarray(sizes, jnp.int32))
    y, dw, dx = pull(fn, deterministic(name), w, x, g)
    expert = np.repeat(np.arange(4), sizes)
    exact = np.einsum("mk,mkn->mn", x, w[expert])
    exact_dx = np.einsum("mn,mkn->mk", g, w[expert])
    exact_dw = np.stack([x[expert == e].T @ g[expert == e] for e in range(4)])
    bound = 0.25 if name == "nvfp4" else 0.09
    assert relative(y, exact) < bound
    assert relative(dx, exact_dx) < bound
    assert relative(dw, exact_dw) < bound
    assert not np.asarray(dw)[1].any()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "nvfp4", "int8"])
def test_stochastic_rounding_is_unbiased(name):
    fmt = FORMATS[name]
    rng = np.random.default_rng(0)
    top = top_code(name)
    x = np.float32(
        np.concatenate([rng.uniform(-top, top, 60), top * 2.0 ** rng.uniform(-9, 0, 60)])
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    one = lambda key: casting.stochastic(jnp.asarray(x), fmt, key)
    draws = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    low, high = draws.min(0), draws.max(0)
    assert (low <= x).all()
    assert (x <= high).all()
    values = draws if name == "int8" else nearest(draws, name)
    np.testing.assert_array_equal(values, draws)  # every draw is a value of the format
    error = np.abs(draws.mean(0) - x)
    assert (error <= 5 * (high - low) / 2 / np.sqrt(4000) + 1e-6).all()
    assert len(np.unique(np.where(high > low, (high - low), 1))) >= 1


def test_gradients_of_nvfp4_are_unbiased_over_steps():
    x, w, g = operands(32, 32, 32)
    recipe = dataclasses.replace(training.RECIPES["nvfp4"], **KEEP_NOTHING)
    f32 = lambda v: jnp.asarray(v, jnp.float32)
    low = training.fp8(lambda p, x: jnp.sum((x @ p["w"]) * f32(g)), recipe, argnums=1)
    params = {"w": f32(w)}
    state = low.init(params, f32(x))

    def one(step):
        return low.grads(params, dataclasses.replace(state, step=step), f32(x))[1]

    draws = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(2000, dtype=jnp.uint32)), np.float64)
    wanted = g @ rounded(w, recipe.input_grad[1], 1).T
    assert relative(draws.mean(0), wanted) < 0.01 < relative(draws[0], wanted)


def test_rotation_cancels_and_spreads_an_outlier():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(40, 8)), rng.normal(size=(40, 6))
    turn = jax.jit(lambda v: casting.rotated(v, 0))
    a, b = (np.asarray(turn(jnp.asarray(v, jnp.float32))) for v in (x, g))
    assert a.shape == (48, 8)
    np.testing.assert_allclose(a.T @ b, x.T @ g, atol=1e-5)
    spike = np.asarray(turn(jnp.zeros((16, 1)).at[3].set(4.0)))
    np.testing.assert_allclose(np.abs(spike), 1.0, atol=1e-6)


def test_blocks_that_are_not_finite_or_zero():
    x = jnp.ones((4, 8)).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf).at[2].set(0.0)
    for name in ("fp8_e4m3", "int8"):
        q = casting.cast(x, training.Cast(name, None), (1,), (0, 1))
        back = np.asarray(q.dequantized())
        assert np.isnan(back[:2]).all()
        assert not back[2].any()
        np.testing.assert_allclose(back[3], 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["block", "mxfp8", "nvfp4"])
def test_no_rounding_is_a_cast_there_and_back(name):
    """XLA for a GPU leaves such casts out: operands that a dense dot reads would not be rounded."""
    how = training.Recipe.of(name).output[0]
    x = jax.random.normal(jax.random.key(0), (8, 256))
    both = lambda x: casting.cast(x, how, (1,), (0, 1)).dequantized()
    got = jax.jit(without_round_trips(both))(x)
    np.testing.assert_array_equal(got, jax.jit(both)(x))
