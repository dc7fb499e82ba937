"""int8 by int8 with outlier columns: the definition, Hopper's kernel, prepared weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOSAIC, needs_mosaic
from hopper_operands import by_lane
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lanes import Ref, on_a_cpu

import qjax
from pallas_kernels.frame import Device
from pallas_kernels.int8_matmul import mosaic_gpu, problems, reference
from pallas_kernels.int8_matmul.mosaic_gpu import Config
from pallas_kernels.int8_matmul.op import int8_matmul
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Weight
from qjax import rounded_products

H200 = Device("gpu", "NVIDIA H200")
ORDER = LAYOUTS["hopper8"]


def operands(problem: Problem, seed: int = 0) -> tuple[tuple, np.ndarray]:
    """(x, x_scale, arrays, columns, at) and the float64 product."""
    rng, m, (k, n) = np.random.default_rng(seed), problem.m, problem.weight[:2]
    x = rng.integers(-127, 128, (m, k)).astype(np.int8)
    codes = rng.integers(-128, 128, (k, n)).astype(np.int8)
    x_scale = rng.uniform(0.5, 2, m).astype(np.float32)
    scale = rng.uniform(0.5, 2, (1, n)).astype(np.float32)
    at = rng.permutation(k)[: problem.outliers].astype(np.int32)
    columns = jnp.asarray(rng.normal(size=(m, at.size)) * 20, jnp.bfloat16)
    arrays = {
        "codes": ORDER.pack_codes(jnp.asarray(codes), problem.weight),
        "scale": ORDER.pack_scale(jnp.asarray(scale), problem.weight),
    }
    wide = codes.astype(np.float64)
    truth = (
        x.astype(np.float64) @ wide * x_scale[:, None] + np.asarray(columns, np.float64) @ wide[at]
    )
    outliers = (columns, jnp.asarray(at)) if at.size else ()
    return (jnp.asarray(x), jnp.asarray(x_scale), arrays, *outliers), truth * scale


def close(got: jax.Array, truth: np.ndarray) -> None:
    """Equal but for the rounding of the result, of float32 scales and of sums of outliers."""
    unit = 2.0**-8 if got.dtype == jnp.bfloat16 else 0.0
    off = np.abs(np.asarray(got, np.float64) - truth) / np.abs(truth).max(1, keepdims=True)
    assert off.max() <= unit + 130 * 2**-24


@pytest.mark.parametrize("problem", problems.SMALL, ids=str)
def test_the_definition_is_the_product_of_float64(problem):
    args, truth = operands(problem)
    close(jax.jit(functools.partial(reference.run, problem=problem))(*args), truth)
    x, x_scale, arrays, *outliers = args
    op = functools.partial(
        int8_matmul,
        weight=problem.weight,
        layout="hopper8",
        out=problem.out,
        outliers=tuple(outliers) or None,
    )
    close(op(x, x_scale, arrays), truth)
    both = jax.vmap(lambda x: op(x, x_scale, arrays))(jnp.stack([x, -x]))
    close(both[0], truth)


def twin(codes):
    """What `hopper_kernel.operand` makes, in plain jax."""
    # tile, quarter of k, r, c, pair of words, word of the pair
    words = by_lane(codes[...].reshape(4, 4, 128)).reshape(4, 4, 8, 4, 2, 2)
    shifts = 8 * lax.broadcasted_iota(jnp.int32, (1,) * 6 + (4,), 6)
    held = ((words[..., None] >> shifts) & 255) - 128
    held = held.reshape(4, 4, 8, 4, 2, 2, 2, 2)  # ..., pair, word, e, half of the channels
    return held.transpose(0, 7, 2, 1, 4, 3, 5, 6).reshape(64, 128).astype(jnp.int8)


@needs_mosaic
@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (Problem(83, Weight(400, 264, 400, "int8"), "hopper8", 0, "bfloat16"), (32, 2, 1, 2)),
        (Problem(83, Weight(400, 264, 400, "int8"), "hopper8", 70, "float32"), (64, 3, 8, 2)),
        (Problem(17, Weight(40, 8, 40, "int8"), "hopper8", 3, "bfloat16"), (32, 6, 8, 132)),
        (Problem(300, Weight(300, 264, 300, "int8"), "hopper8", 70, "bfloat16"), (256, 3, 8, 2)),
    ],
    ids=str,
)
def test_the_interpreted_kernel_multiplies(problem, config, capfd):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.int8_matmul import hopper_kernel

    args, truth = operands(problem)
    call = mosaic_gpu.launch.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        made = functools.partial(hopper_kernel.kernel, twin=twin)
        patch.setattr(hopper_kernel, "kernel", made)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            got = jax.jit(functools.partial(call, problem, Config(*config)))(*args)
    assert "RACE" not in capfd.readouterr().out
    close(got, truth)


@needs_mosaic
def test_lanes_hold_what_wgmma_multiplies(monkeypatch):
    """The inline code of `operand`, lane by lane, at the places of PTX's s8 operand."""
    machine = on_a_cpu(monkeypatch, 2**20)
    from pallas_kernels.int8_matmul import hopper_kernel

    weight = Weight(256, 64, 256, "int8")
    codes = np.random.default_rng(0).integers(-128, 128, (256, 64)).astype(np.int8)
    words = np.asarray(ORDER.pack_codes(jnp.asarray(codes), weight))
    of_x = lambda v: np.asarray(hopper_kernel.of_x(jnp.asarray(v)[None]))[0]
    order = 2 * of_x(np.arange(256) // 2) + of_x(np.arange(256) % 2)
    (place,) = machine.windows([words[:, 0].nbytes], 1)
    machine.begin(0, 1, 1, 1)
    stage = Ref(machine, machine.shared + place + 0 * machine.thread, words[:, 0].shape, np.int32)
    warp, r, c = machine.thread // 32, machine.thread % 32 // 4, machine.thread % 4
    for deep in range(2):
        stage[...] = words[:, deep]
        registers = hopper_kernel.operand()(stage).reshape(4, 2, 2, -1)
        for quarter, chunk, half in np.ndindex(4, 2, 2):
            got = np.ascontiguousarray(registers[quarter, chunk, half])[:, None].view(np.int8)
            for i in range(4):
                k = order[128 * deep + 32 * quarter + 16 * chunk + 4 * c + i]
                np.testing.assert_array_equal(got[:, i], codes[k, 16 * warp + r + 8 * half])


def test_rows_of_codes_are_found_where_they_lie():
    weight = Weight(400, 40, 400, "int8")
    codes = np.random.default_rng(0).integers(-128, 128, (400, 40)).astype(np.int8)
    words = ORDER.pack_codes(jnp.asarray(codes), weight)
    at = jnp.array([0, 399, 1, 2, 130, 77, 256, 400])
    problem = Problem(17, weight, "hopper8", 8, "bfloat16")
    got = np.asarray(mosaic_gpu._rows_of(words, at, problem), np.float32)
    np.testing.assert_array_equal(got[:40], codes[np.minimum(at, 399)].T)


@needs_mosaic
def test_it_lowers_for_a_gpu_and_every_config_fits():
    for problem in problems.SMALL[:2]:
        args, _ = operands(problem)
        call = jax.jit(functools.partial(mosaic_gpu.run, problem=problem))
        lowered = call.trace(*args).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
    for problem in problems.LARGE:
        for outliers, out in ((0, "bfloat16"), (64, "bfloat16"), (64, "float32")):
            problem = problem._replace(outliers=outliers, out=out)
            config = mosaic_gpu.choose_config(problem)
            assert mosaic_gpu.fits(problem, config) is None
    problem = problems.LARGE[0]
    args = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands(problems.SMALL[0])[0][:2]]
    for config, message in (
        (Config(192), "tiles have 32, 64, 128 or 256 rows, not 192"),
        (Config(128, 1), "a turn takes two stages"),
        (Config(256, 6), "needs .* bytes of shared memory"),
    ):
        with pytest.raises(ValueError, match=f"Config.* cannot run Problem.*: {message}"):
            mosaic_gpu.launch(problem, config, *args, {})


def test_what_it_cannot_run_is_said():
    problem = problems.SMALL[0]
    args, _ = operands(problem)
    x, x_scale, arrays = args
    other = Device("gpu", "NVIDIA A100")
    assert "H100 and H200" in str(mosaic_gpu.supports(problem, other))
    with pytest.raises(
        ValueError, match=r"int8 \[m, k\] and x_scale float32 \[m\]; given are int8"
    ):
        int8_matmul(x, x_scale[1:], arrays, problem.weight, "hopper8")
    at = jnp.arange(3)
    with pytest.raises(ValueError, match=r"floats \[40, c\] and int32 \[c\]; given are float32"):
        int8_matmul(x, x_scale, arrays, problem.weight, "hopper8", outliers=(jnp.ones((2, 3)), at))
    grouped = Weight(256, 256, 128, "int8")
    held = {
        "codes": arrays["codes"],
        "scale": ORDER.pack_scale(jnp.ones((2, 256)), grouped),
    }
    with pytest.raises(ValueError, match="quantized_matmul takes others"):
        int8_matmul(x, x_scale, held, grouped, "hopper8")
    with pytest.raises(ValueError, match="mosaic_gpu cannot run"):
        int8_matmul(
            x, x_scale, arrays, problem.weight, "hopper8", implementation="mosaic_gpu", device=other
        )


# --- prepared weights with quantized activations


K, N = 512, 64


def prepared(
    spec: str, threshold: float | None = None, budget: int | None = None, lead: tuple = ()
):
    w = jax.random.normal(jax.random.key(0), (*lead, K, N))
    q = qjax.quantize(w, spec, len(lead))
    if threshold is not None:
        act = dataclasses.replace(q.activation, threshold=threshold, budget=budget)
        q = dataclasses.replace(q, activation=act)
    return {"w": q}, qjax.prepare({"w": q}, device=H200, unsupported="raise")


def rows_of_x(m: int = 24, outliers: int = 5) -> jax.Array:
    x = jax.random.normal(jax.random.key(1), (m, K), jnp.bfloat16)
    return x.at[:, 7 : 7 + outliers].multiply(30)


MATMUL = qjax.quantized(lambda p, x: x @ p["w"].astype(x.dtype))


@pytest.fixture
def in_floats(monkeypatch):
    """Prepared products take the way of devices whose kernels multiply bfloat16 only."""
    found = {"int8_matmul": "reference", "quantized_matmul": "mosaic_wgmma"}
    monkeypatch.setattr(rounded_products, "choose", lambda op, problem: found[op])


def near(a: jax.Array, b: jax.Array) -> None:
    """Equal but for one unit in the last place of bfloat16."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= 2**-7 * np.abs(b).max()


@pytest.mark.parametrize("way", ["in floats", "kernel"])
@pytest.mark.parametrize(
    ("threshold", "budget", "outliers"), [(None, None, 5), (6.0, 16, 5), (6.0, 2, 5), (6.0, 16, 0)]
)
def test_prepared_products_are_those_of_qtensors(way, threshold, budget, outliers, request):
    if way == "in floats":
        request.getfixturevalue("in_floats")
    q, p = prepared("int8/int8_token", threshold, budget)
    x = rows_of_x(outliers=outliers)
    near(jax.jit(MATMUL)(p, x), MATMUL(q, x))
    gradient = lambda p: jax.grad(lambda x: jnp.sum(MATMUL(p, x).astype(jnp.float32) ** 2))(x)
    near(gradient(p), gradient(q))
    back = qjax.unprepare(p)["w"]
    assert jax.tree.structure(back) == jax.tree.structure(q["w"])
    np.testing.assert_array_equal(back.qvalue, q["w"].qvalue)


def test_layers_and_other_orders():
    q, p = prepared("int8/int8_token", 6.0, 16, lead=(3,))
    x = rows_of_x()
    step = qjax.quantized(
        lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w.astype(x.dtype)), 0, p["w"])[1]
    )
    near(jax.jit(step)(p, x), step(q, x))
    batched = qjax.quantized(lambda p, x: jnp.einsum("bmk,lkn->lbnm", x, p["w"].astype(x.dtype)))
    xs = jnp.stack([x, -x])
    near(jax.jit(batched)(p, xs), batched(q, xs))
    q, p = prepared("int8/int8_token")
    near(jax.vmap(MATMUL, (None, 0))(p, xs), jax.vmap(MATMUL, (None, 0))(q, xs))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_cuts_rows_and_channels(kind):
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)
    put = lambda v, spec: jax.device_put(v, NamedSharding(mesh, spec))
    x, cut = rows_of_x(), {"w": PartitionSpec(None, "t")}
    for tree in prepared("int8/int8_token", 6.0, 16):
        wanted = MATMUL(tree, x)
        with jax.set_mesh(mesh):
            sharded = jax.tree.map(put, tree, qjax.partition_specs(tree, cut, mesh))
            y = jax.jit(MATMUL)(sharded, put(x, PartitionSpec("d", None)))
        assert y.sharding.spec == PartitionSpec("d", "t")
        near(y, wanted)


def test_float32_is_not_rounded():
    for threshold in (None, 6.0):
        q, p = prepared("int8/int8_token", threshold, 16)
        x = rows_of_x().astype(jnp.float32) * 1.001
        got, wanted = MATMUL(p, x), MATMUL(q, x)
        assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_only_calls_with_more_outliers_multiply_them_all():
    _, p = prepared("int8/int8_token", 6.0, 16, lead=(3,))
    layers = qjax.quantized(lambda p, x: jnp.einsum("mk,lkn->lmn", x, p["w"].astype(x.dtype)))
    assert " cond[" in str(jax.make_jaxpr(layers)(p, rows_of_x()))


@pytest.mark.parametrize("k", [32, 64, 128])
def test_a_scale_that_lies_as_a_groups_is_refused(k, monkeypatch):
    problem = Problem(130, Weight(k, 128, k, "int8", "bfloat16"), "hopper8", 0, "bfloat16")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert MOSAIC is ("no group's size" in str(mosaic_gpu.supports(problem, H200)))
    q = {"w": qjax.quantize(jnp.ones((k, 64)), "int8/int8_token", 0)}
    with pytest.raises(ValueError, match="no group's size"):
        qjax.prepare(q, device=H200, unsupported="raise")


def test_a_nan_stays_one():
    _, p = prepared("int8/int8_token", 6.0, 16)
    got = MATMUL(p, rows_of_x().at[3, 50].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(got).all(1), np.arange(24) == 3)


def test_explain_says_how_and_report_why_not():
    _, p = prepared("int8/int8_token", 6.0, 16)
    (use,) = qjax.explain(MATMUL, p, rows_of_x()).uses
    assert use.how == "int8_token, reference on int8 in hopper8, outliers from 6 apart, 16 at once"
    with pytest.raises(ValueError, match="int8 by int8 with one scale per channel"):
        prepared("int8_g32/int8_token")
    with pytest.raises(ValueError, match="its kernels take no quantized activations"):
        prepared("int4_g32/int8_token")


@needs_mosaic
def test_explain_names_the_kernel(monkeypatch):
    monkeypatch.setattr(Device, "default", classmethod(lambda cls: H200))
    assert "it runs on one device" in str(mosaic_gpu.supports(problems.SMALL[0], H200))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    _, p = prepared("int8/int8_token", 6.0, 16)
    how = lambda x: qjax.explain(MATMUL, p, x).uses[0].how
    assert how(rows_of_x(160)) == (
        "int8_token, mosaic_gpu on int8 in hopper8, outliers from 6 apart, 16 at once"
    )
    assert (
        how(rows_of_x(4)) == "int8_token, mosaic_gpu on hopper8, outliers from 6 apart, 16 at once"
    )
    _, layers = prepared("int8/int8_token", 6.0, 16, lead=(3,))
    each = qjax.quantized(lambda p, x: jnp.einsum("mk,lkn->lmn", x, p["w"].astype(x.dtype)))
    assert "mosaic_gpu on int8" in qjax.explain(each, layers, rows_of_x(160)).uses[0].how
    assert how(rows_of_x(160).astype(jnp.float32)).startswith("int8_token, reference on int8")
