"""FP8 casts and block-scaled products: definitions, choice, lowering for Hopper, use in recipes.

The arithmetic on the device is checked there (experiments/fp8_kernels.py).
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import MOSAIC, needs_mosaic
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import hopper
from pallas_kernels.amax import problems as maxima
from pallas_kernels.amax.op import amax
from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_plan
from pallas_kernels.block_scaled_matmul import problems as products
from pallas_kernels.block_scaled_matmul.op import block_scaled_matmul
from pallas_kernels.cast_fp8 import problems as casts
from pallas_kernels.cast_fp8.op import cast_fp8
from pallas_kernels.dispatch import choose
from pallas_kernels.frame import Device
from pallas_kernels.row_scaled_matmul import mosaic_gpu as row_plan
from pallas_kernels.row_scaled_matmul import problems as row_products
from pallas_kernels.row_scaled_matmul.op import row_scaled_matmul
from qjax import training
from qjax.qtensor import dequantize
from qjax.training import casting, kernels

H100 = Device("gpu", "NVIDIA H100 80GB HBM3")
ROW = training.RECIPES["block"].output[0]
TILE = training.RECIPES["block"].output[1]


def _operands(problem, seed=0):
    """Random E4M3 codes, and scales over eight powers of two."""
    rng = np.random.default_rng(seed)
    code = lambda *shape: jnp.asarray(
        np.clip(100 * rng.normal(size=shape), -448, 448), jnp.float8_e4m3fn
    )
    scale = lambda *shape: jnp.asarray(2.0 ** rng.uniform(-4, 4, shape), jnp.float32)
    blocks = problem.k // 128
    of_b = (blocks, problem.n) if problem.b_rows else (-(-problem.n // 128), blocks)
    a, b = code(problem.m, problem.k), code(problem.n, problem.k)
    return a, scale(blocks, problem.m), b, scale(*of_b)


def _truth(problem, a, a_scale, b, b_scale):
    """The float64 product, one block of k after the other."""
    a, a_scale, b, b_scale = (np.asarray(v, np.float64) for v in (a, a_scale, b, b_scale))
    y = np.zeros((problem.m, problem.n))
    for q in range(problem.k // 128):
        at = slice(128 * q, 128 * q + 128)
        of_b = b_scale[q] if problem.b_rows else np.repeat(b_scale[:, q], 128)[: problem.n]
        y += a_scale[q][:, None] * of_b[None, :] * (a[:, at] @ b[:, at].T)
    return y


def _row_operands(problem):
    """Random E4M3 codes, scales of rows over eight powers of two, and the float64 product."""
    one = products.SMALL["rows"]._replace(m=problem.m, n=problem.n, k=problem.k)
    a, a_scale, b, b_scale = _operands(one)
    a, a_scale, b, b_scale = operands = a, a_scale[0], b, b_scale[0]
    wide = [np.asarray(v, np.float64) for v in operands]
    return operands, wide[1][:, None] * wide[3] * (wide[0] @ wide[2].T)


def test_the_product_of_rows_is_that_of_float64():
    (problem,) = row_products.SMALL
    operands, truth = _row_operands(problem)
    got = np.asarray(row_scaled_matmul(*operands, out=problem.out), np.float64)
    assert np.abs(got - truth).max() <= 2**-22 * problem.k * np.abs(truth).max()


@pytest.mark.parametrize("name", products.SMALL)
def test_the_product_is_that_of_float64(name):
    problem = products.SMALL[name]
    operands = _operands(problem)
    got = np.asarray(block_scaled_matmul(*operands, out=problem.out), np.float64)
    truth = _truth(problem, *operands)
    # a float32 sum of k products, then the result's own rounding: 2^-9 in bfloat16
    bound = 2**-22 * problem.k + (2**-8 if problem.out == "bfloat16" else 0)
    assert np.abs(got - truth).max() <= bound * np.abs(truth).max()


def _numpy_cast(x, top):
    """Codes of x whose blocks have the largest magnitudes `top`, in ml_dtypes."""
    inverse = np.float32(448) / np.maximum(top, np.float32(2.0**-110))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.clip(x * inverse, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _numpy_scale(top):
    """XLA may multiply with 1 / 448 instead: one unit in the last place."""
    return np.maximum(top, np.float32(2.0**-110)) / np.float32(448)


def _x(rows=256, columns=384):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, columns)) * 2.0 ** rng.integers(-20, 20, (rows, columns))
    x[:128, 128:256] = 0
    x[128:256, :128] = 2.0**-115 * rng.uniform(1, 2, (128, 128))  # below the least amax
    return jnp.asarray(x, jnp.bfloat16)


def test_casts_are_numpys():
    x = _x()
    wide = np.asarray(x, np.float32)
    codes, turned, scale, turned_scale = cast_fp8(x, "block")
    top = np.abs(wide).reshape(256, 3, 128).max(2)
    np.testing.assert_array_equal(
        np.asarray(codes, np.float32), _numpy_cast(wide, np.repeat(top, 128, 1))
    )
    np.testing.assert_allclose(np.asarray(scale).T, _numpy_scale(top), rtol=2**-23)
    top = np.abs(wide).reshape(2, 128, 384).max(1)
    np.testing.assert_array_equal(
        np.asarray(turned, np.float32).T, _numpy_cast(wide, np.repeat(top, 128, 0))
    )
    np.testing.assert_allclose(np.asarray(turned_scale), _numpy_scale(top), rtol=2**-23)


def test_casts_in_one_orientation_are_numpys():
    x = _x().at[5, 7].set(jnp.nan)
    wide = np.asarray(x, np.float32)
    top = np.where(np.isnan(wide), np.inf, np.abs(wide)).max(1)
    codes, scale = cast_fp8(x, "row", turned=False)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            np.asarray(codes, np.float32), _numpy_cast(wide, top[:, None])
        )
    np.testing.assert_allclose(np.asarray(scale), _numpy_scale(top), rtol=2**-23)
    for kind, inverses in (("block", ()), ("given", (448 / jnp.asarray(top).at[5].set(1),))):
        both = cast_fp8(x, kind, *inverses, *(jnp.ones(384),) * len(inverses))
        alone = cast_fp8(x, kind, *inverses, turned=False)
        _same(alone, both[::2])
    with pytest.raises(ValueError, match="without transposed codes are 'block', 'row', 'given'"):
        cast_fp8(x, "tile", turned=False)


@pytest.mark.parametrize(("how", "kind"), [(ROW, "block"), (TILE, "tile")])
def test_casts_are_those_of_the_recipes_bit_for_bit(how, kind):
    x = _x().at[5, 7].set(jnp.nan).at[200, 300].set(jnp.inf)
    codes, turned, *scales = cast_fp8(x, kind)
    bits = lambda v: np.asarray(v).view(np.uint8 if v.dtype.itemsize == 1 else np.uint32)
    for contract, got, scale in (((1,), codes, scales[0]), ((0,), turned.T, scales[-1])):
        wanted = casting.cast(x, how, contract, (0, 1))
        held = scale.T if kind == "block" and contract == (1,) else scale
        np.testing.assert_array_equal(bits(got), bits(wanted.qvalue))
        np.testing.assert_array_equal(bits(held), bits(wanted.scale))


def test_the_largest_of_rows_and_columns_are_numpys():
    x = _x().at[5, 7].set(jnp.nan).at[200, 300].set(jnp.inf)
    wide = np.abs(np.asarray(x, np.float32))
    wide[5, 7] = np.inf
    for got, axis in zip(amax(x), (1, 0), strict=True):
        np.testing.assert_array_equal(np.asarray(got), wide.max(axis))
    with pytest.raises(ValueError, match=r"must be floats \[r, c\], is int32\[4\]"):
        amax(jnp.arange(4))


def test_vmap_loops_over_what_is_mapped():
    problem = products.SMALL["rows"]._replace(n=128, k=128)
    a, a_scale, b, b_scale = _operands(problem)
    two = jnp.stack([a, a[::-1]])
    got = jax.vmap(lambda v: block_scaled_matmul(v, a_scale, b, b_scale, out=jnp.float32))(two)
    for i in range(2):
        one = block_scaled_matmul(two[i], a_scale, b, b_scale, out=jnp.float32)
        np.testing.assert_array_equal(np.asarray(got[i]), np.asarray(one))


def test_dispatch_takes_them_on_hopper_and_says_why_not():
    work = {"block_scaled_matmul": products.LARGE[0], "cast_fp8": casts.LARGE[0]}
    work |= {"amax": maxima.LARGE[0]}
    for op, problem in work.items():
        assert choose(op, problem, Device("cpu", "cpu")) == "reference"
        with pytest.raises(ValueError, match="compiled for H100 and H200, not for cpu"):
            choose(op, problem, Device("cpu", "cpu"), "mosaic_gpu")
        if MOSAIC:
            assert choose(op, problem, H100) == "mosaic_gpu"
        else:
            with pytest.raises(ValueError, match=r"jax 0\.11 or newer"):
                choose(op, problem, H100, "mosaic_gpu")
    if MOSAIC:
        with pytest.raises(ValueError, match="must be multiples of 128"):
            choose("block_scaled_matmul", products.LARGE[0]._replace(n=100), H100, "mosaic_gpu")
        with pytest.raises(ValueError, match="it takes bfloat16"):
            choose("cast_fp8", casts.LARGE[0]._replace(x="float32"), H100, "mosaic_gpu")


def test_bad_operands_are_refused():
    a, a_scale, b, b_scale = _operands(products.SMALL["tiles"])
    with pytest.raises(ValueError, match="must share a k that is a multiple of 128"):
        block_scaled_matmul(a[:, :100], a_scale, b[:, :100], b_scale)
    with pytest.raises(ValueError, match=r"a_scale must be \[2, 256\]"):
        block_scaled_matmul(a, a_scale.T, b, b_scale)
    with pytest.raises(ValueError, match="codes must be float8_e4m3fn"):
        block_scaled_matmul(a.astype(jnp.bfloat16), a_scale, b, b_scale)
    with pytest.raises(ValueError, match=r"scales are \[m\] and \[n\]"):
        row_scaled_matmul(a, a_scale, b, b_scale)
    with pytest.raises(ValueError, match="codes must be float8_e4m3fn"):
        row_scaled_matmul(a.astype(jnp.bfloat16), a_scale[0], b, jnp.ones(b.shape[0]))
    with pytest.raises(ValueError, match="need multiples of 128"):
        cast_fp8(jnp.ones((100, 128)), "block")
    with pytest.raises(ValueError, match="'given' with reciprocals of shapes"):
        cast_fp8(jnp.ones((128, 128)), "given")


@pytest.mark.parametrize(
    ("m", "n", "phases"),
    [
        (8192, 8192, [(128, 0, 64)]),  # 43 x 64 tiles, 132 at once: 20.8 turns
        (4096, 7168, [(128, 0, 54), (64, 6912, 4)]),  # 9 turns and 88 narrow tiles, not 9.3
        (128, 128, [(64, 0, 2)]),
    ],
)
def test_narrow_tiles_fill_the_last_turn(m, n, phases):
    problem = products.LARGE[0]._replace(m=m, n=n)
    assert block_plan.phases(problem, block_plan.Config()) == phases


@needs_mosaic
@pytest.mark.parametrize("name", products.SMALL)
def test_products_lower_for_a_gpu(name):
    problem = products.SMALL[name]
    call = jax.jit(lambda *v: block_plan.run(*v, problem))
    lowered = call.trace(*_operands(problem)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_mosaic
def test_products_of_rows_lower_for_a_gpu():
    problem = row_products.LARGE[0]
    shapes = [((problem.m, problem.k), jnp.float8_e4m3fn), ((problem.m,), jnp.float32)]
    shapes += [((problem.n, problem.k), jnp.float8_e4m3fn), ((problem.n,), jnp.float32)]
    call = jax.jit(lambda *v: row_plan.run(*v, problem))
    traced = call.trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
def test_the_interpreted_product_of_rows_is_that_of_float64():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.row_scaled_matmul import hopper_kernel

    (problem,) = row_products.SMALL
    operands, truth = _row_operands(problem)
    call = jax.jit(hopper_kernel.kernel(problem, row_plan.Config(blocks=3, steps=2, outs=1)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = np.asarray(call(*operands), np.float64)
    assert np.abs(got - truth).max() <= 2**-22 * problem.k * np.abs(truth).max()


@needs_mosaic
@pytest.mark.parametrize("problem", casts.SMALL, ids=str)
def test_casts_lower_for_a_gpu(problem):
    from pallas_kernels.cast_fp8 import mosaic_gpu

    sizes = (256, 512)[: 1 + problem.turned] if problem.scales == "given" else ()
    inverses = [jnp.ones(n) for n in sizes]
    call = jax.jit(lambda *v: mosaic_gpu.run(*v, problem=problem))
    lowered = call.trace(_x(256, 512), *inverses).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@needs_mosaic
def test_the_interpreted_amax_is_numpys(capfd):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.amax import hopper_kernel, mosaic_gpu

    x = _x(768, 256).at[200, 30].set(-jnp.inf).at[500, 200].set(jnp.nan)
    call = jax.jit(hopper_kernel.kernel(maxima.Problem(768, 256), mosaic_gpu.Config(3, 2)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = call(x)
    wide = np.nan_to_num(np.abs(np.asarray(x, np.float32)), nan=np.inf, posinf=np.inf)
    for value, axis in zip(got, (1, 0), strict=True):
        np.testing.assert_array_equal(np.asarray(value), wide.max(axis))
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("rows", "tiles"), [(128, 1), (2048, 1), (16384, 8), (28672, 14), (3072, 2), (128 * 131, 4)]
)
def test_an_amax_leaves_few_maxima_where_blocks_divide(rows, tiles):
    from pallas_kernels.amax import mosaic_gpu

    assert mosaic_gpu.config(maxima.Problem(rows, 128)).tiles == tiles


@needs_mosaic
@pytest.mark.parametrize("rows", [False, True, "far apart"])
def test_the_interpreted_product_is_that_of_float64(rows):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.block_scaled_matmul import hopper_kernel

    problem = products.SMALL["tiles"]._replace(n=384, b_rows=bool(rows), out="float32", k=384)
    config = block_plan.Config(blocks=4, steps=2, outs=1)
    assert len(block_plan.phases(problem, config)) == 2 - problem.b_rows
    operands = list(_operands(problem))
    if rows == "far apart":  # the scale of zeros, whose total would leave float32 in its units
        operands[2] = operands[2].at[130, 128:256].set(0)
        operands[3] = operands[3].at[1, 130].set(2.0**-118).at[2, 130].set(2.0**60)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = np.asarray(jax.jit(hopper_kernel.kernel(problem, config))(*operands), np.float64)
    truth = _truth(problem, *operands)
    largest = np.abs(truth).max(0)  # of a column, as those of some are 2^60
    assert (np.abs(got - truth).max(0) <= 2**-22 * problem.k * largest).all()


INTERPRETED = [p._replace(rows=512, columns=256) for p in casts.SMALL]
INTERPRETED += [p._replace(rows=384) for p in INTERPRETED if p.turned]  # one tile a block


@needs_mosaic
@pytest.mark.parametrize("problem", INTERPRETED, ids=str)
def test_the_interpreted_cast_is_its_definition(problem, capfd):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.cast_fp8 import hopper_kernel, mosaic_gpu, rows_kernel

    kind, turned = problem.scales, problem.turned
    x = _x(problem.rows, problem.columns)
    inverses = [jnp.full((n,), 2.0**-20) for n in x.shape[: 1 + turned] if kind == "given"]
    if kind == "row":
        kernel, x = rows_kernel.kernel(problem._replace(rows=4)), x[126:130]
    else:
        kernel = hopper_kernel.kernel(problem, mosaic_gpu.config(problem))
    if kind in ("block", "tile"):
        x = x.at[5, 7].set(jnp.nan).at[200, 30].set(jnp.inf).at[300, 200].set(-jnp.inf)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(kernel)(x, *inverses)
    for a, b in zip(got, cast_fp8(x, kind, *inverses, turned=turned), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    assert "RACE" not in capfd.readouterr().out


@pytest.fixture
def forced(monkeypatch):
    """The path of the kernels, with their definitions in place of them; counts the calls."""
    calls = []
    monkeypatch.setattr(kernels, "runs", lambda op, problem: calls.append(op) or True)
    return calls


def test_products_of_blocks_are_those_of_what_they_stand_for(forced):
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    x, w, g = draw(2, 128, 256), draw(256, 384), draw(2, 128, 384)
    both = lambda v, how, first, second: casting.cast_both(
        v, (how, how), (first, second), tuple(range(v.ndim))
    )
    of_x, of_w, of_g = (
        both(x, ROW, (2,), (0, 1)),
        both(w, TILE, (0,), (1,)),
        both(g, ROW, (2,), (0, 1)),
    )
    assert forced == ["cast_fp8"] * 3
    cases = [  # operands and what they contract: output, both orders; gradients of x and of w
        (of_x[0], of_w[0], ((2,), (0,))),
        (of_w[0], of_x[0], ((0,), (2,))),
        (of_g[0], of_w[1], ((2,), (1,))),
        (of_g[1], of_x[1], ((0, 1), (0, 1))),
    ]
    for a, b, contract in cases:
        got = kernels.product(a, b, (contract, ((), ())), jnp.float32)
        truth = np.tensordot(*(np.asarray(dequantize(v), np.float64) for v in (a, b)), contract)
        assert got.shape == truth.shape
        # dequantized values are bfloat16: off by 2^-9 each
        assert np.abs(got - truth).max() <= 2**-7 * np.abs(truth).max()


@pytest.mark.parametrize("name", ["current", "rowwise", "rowwise_high_precision_wgrad"])
def test_recipes_are_the_same_through_the_casts(name, forced, monkeypatch):
    def loss(p, x):
        y = jnp.einsum("bsk,khd->bshd", x, p["up"])
        return jnp.sum(jnp.einsum("bshd,hdn->bsn", y, p["down"]) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (128, 2, 64), "down": (2, 64, 128)}
    p = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    x = jax.random.normal(keys[2], (2, 64, 128))
    recipe = dataclasses.replace(training.RECIPES[name], keep_head=False)
    low = training.fp8(loss, recipe, argnums=(0, 1))
    state = low.init(p, x)
    got = jax.jit(lambda p, x: low.grads(p, state, x)[:2])(p, x)
    # two weights, two x, two gradients; x and gradients are cast alone where their product is dense
    maxima = {"current": 0, "rowwise": 6, "rowwise_high_precision_wgrad": 2}[name]
    stored = 2 * (name == "rowwise")  # gradients of weights
    counts = collections.Counter(cast_fp8=6, amax=maxima, row_scaled_matmul=stored)
    assert collections.Counter(forced) == +counts
    monkeypatch.undo()
    wanted = jax.jit(lambda p, x: low.grads(p, state, x)[:2])(p, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _placed(x, *spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("spec", [("a", "b"), (None, ("a", "b"))])
@pytest.mark.parametrize("op", ["block", "tile", "given", "row", "amax"])
def test_on_a_mesh_each_device_casts_its_part(op, spec):
    x = jax.random.normal(jax.random.key(0), (1024, 1024), jnp.bfloat16)
    inverses = [2.0 ** jnp.arange(1024.0) % 7 for _ in range(2)] if op == "given" else []
    cast = functools.partial(cast_fp8, turned=op != "row")
    call = jax.jit(amax if op == "amax" else lambda x, *v: cast(x, op, *v))
    program = call.lower(_placed(x, *spec), *inverses).compile()
    assert "all-gather" not in program.as_text()
    _same(program(_placed(x, *spec), *inverses), call(x, *inverses))


@pytest.mark.parametrize(("of_a", "of_b"), [(("a", None), ("b", None)), (("a", "b"), (None, "b"))])
def test_on_a_mesh_each_device_multiplies_its_part(of_a, of_b):
    problem = products.SMALL["tiles"]._replace(m=1024, n=1024, k=1024, out="float32")
    a, a_scale, b, b_scale = _operands(problem)
    call = jax.jit(lambda *v: block_scaled_matmul(*v, out=problem.out))
    placed = _placed(a, *of_a), a_scale, _placed(b, *of_b), b_scale
    program = call.lower(*placed).compile()
    assert "all-gather" not in program.as_text()
    truth = _truth(problem, a, a_scale, b, b_scale)
    assert np.abs(np.asarray(program(*placed)) - truth).max() <= 2**-12 * np.abs(truth).max()
    (a, a_scale, b, b_scale), truth = _row_operands(problem)
    call = jax.jit(lambda *v: row_scaled_matmul(*v, out=jnp.float32))
    placed = _placed(a, *of_a), a_scale, _placed(b, *of_b), b_scale
    program = call.lower(*placed).compile()
    assert "all-gather" not in program.as_text()
    assert np.abs(np.asarray(program(*placed)) - truth).max() <= 2**-12 * np.abs(truth).max()


@pytest.mark.parametrize("check", [False, True])
def test_a_shard_is_cast_by_kernels_where_nothing_keeps_account_of_axes(check, forced):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    how = training.RECIPES["block"].output[0]

    def cast(x):
        return [q.qvalue for q in casting.cast_both(x, (how, how), ((1,), (0,)), (0, 1))]

    spec = PartitionSpec("a")
    over = jax.shard_map(cast, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check)
    x = jax.random.normal(jax.random.key(0), (1024, 128), jnp.bfloat16)
    got = jax.jit(over)(x)
    assert forced == ([] if check else ["cast_fp8"])
    _same(got, [jnp.concatenate(v) for v in zip(*map(cast, jnp.split(x, 8)), strict=True)])


def test_listings_say_who_casts(monkeypatch):
    monkeypatch.setattr(hopper, "missing", lambda device: None)
    shapes = {"a": (1024, 1024), "b": (1024, 1088), "c": (1088, 128)}
    p = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}
    low = training.fp8(lambda p, x: jnp.sum(x @ p["a"] @ p["b"] @ p["c"]), "rowwise")
    monkeypatch.setattr(kernels, "runs", lambda op, problem: False)
    reasons = {4096: "8 devices may cut x [4096, 1024] inside 128"}
    reasons[1024] = "x [1024, 1024] has less than 4194304 elements"
    for rows, reason in reasons.items():
        x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16)
        lines = str(low.explain(p, x)).splitlines()
        assert lines[1].endswith(f"rowwise, casts by XLA: {reason}")


@needs_mosaic
def test_small_casts_to_given_scales_run_xlas_code(monkeypatch):
    monkeypatch.setattr(Device, "default", lambda: H100)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    runs = lambda n, kind: kernels.runs("cast_fp8", casts.LARGE[0]._replace(rows=n, scales=kind))
    assert not runs(128, "given")
    assert runs(16384, "given")
    assert runs(128, "block")


def test_a_mesh_that_may_cut_blocks_runs_xlas_code():
    assert jax.device_count() > 1
    whole = casts.LARGE[0]
    assert kernels.runs("cast_fp8", whole) == (choose("cast_fp8", whole) != "reference")
    assert not kernels.runs("cast_fp8", whole._replace(columns=8192 + 128))


@pytest.mark.parametrize("name", ["rowwise", pytest.param("block", marks=pytest.mark.slow)])
def test_recipes_on_a_mesh_are_those_of_one_device(name, monkeypatch):
    monkeypatch.setattr(kernels, "runs", lambda op, problem: True)

    def loss(p, x):
        return jnp.sum((jax.nn.silu(x @ p["up"]) @ p["down"]).astype(jnp.float32) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda k: jax.random.normal(k, (1024, 1024), jnp.bfloat16) / 32
    p, x = {"up": draw(keys[0]), "down": draw(keys[1])}, draw(keys[2])
    low = training.fp8(loss, dataclasses.replace(training.RECIPES[name], keep_head=False))
    state = low.init(p, x)
    call = jax.jit(lambda p, x: low.grads(p, state, x)[:2])
    wanted = call(p, x)
    placed = {"up": _placed(p["up"], "a", "b"), "down": _placed(p["down"], "b", "a")}
    got = call(placed, _placed(x, "a"))
    exact = jax.jit(jax.value_and_grad(loss))(p, x)
    for leaves in zip(*map(jax.tree.leaves, (got, wanted, exact)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in leaves)
        # sums over shards round elsewhere, and move codes with them: less than FP8 itself does
        assert np.linalg.norm(a - b) <= 0.5 * np.linalg.norm(b - c) + 2**-8 * np.linalg.norm(c)
