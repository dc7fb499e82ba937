"""Cases 7 and 21 to 24 of docs/peers.md: calibration where the nearest JAX peer was seen to fail."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from jax import lax

import qjax

pytestmark = pytest.mark.usefixtures("standard_promotion")

GPTQ = qjax.Recipe(qjax.Rule(".*", "int4_g16", qjax.gptq()))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def better_than_nearest(fn, params, *batches, recipe=GPTQ):
    """Both ways of calibrating quantize every site, and beat rounding to nearest on the output."""
    x = batches[0]
    sites = qjax.find_sites(fn, params, x)
    stats = qjax.calibrate(fn, params, batches, recipe)
    seen = []
    trees = {
        "nearest": qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", "int4_g16")), sites),
        "calibrated": qjax.quantize_params(params, recipe, sites, stats),
        "sequential": qjax.quantize_sequential(fn, params, batches, recipe, log=seen.append),
    }
    assert set(stats) == set(sites)
    assert all(entry.error_after < entry.error_before for entry in seen)
    run, wanted = jax.jit(qjax.quantized(fn)), fn(params, x)
    error = {n: float(jnp.mean(jnp.square(run(q, x) - wanted))) for n, q in trees.items()}
    assert error["calibrated"] < error["nearest"]
    assert error["sequential"] < error["nearest"]


class Layer(nn.Module):
    """A dense layer as a scan sees it."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(32)(x)), None


class Scanned(nn.Module):
    """Rematerialized layers in a scan."""

    @nn.compact
    def __call__(self, x):
        split = {"params": True}
        layer = nn.remat(Layer, prevent_cse=False)
        return nn.scan(layer, variable_axes={"params": 0}, split_rngs=split, length=3)()(x, None)[0]


def test_07_statistics_inside_a_scan():
    model, x = Scanned(), normal(0, 200, 32)
    better_than_nearest(model.apply, model.init(jax.random.key(0), x), x)


@pytest.mark.parametrize("spec", ["uint4_g16", "nf4_g16", "int3_g16"])
def test_22_formats_beside_symmetric_int4(spec):
    fn, p, x = (lambda p, x: x @ p["w"]), {"w": normal(0, 32, 16)}, normal(1, 100, 32)
    seen = []
    recipe = qjax.Recipe(qjax.Rule(".*", spec, qjax.gptq()))
    qjax.quantize_sequential(fn, p, [x @ normal(2, 32, 32)], recipe, log=seen.append)
    assert seen[0].error_after < seen[0].error_before


def test_21_a_matrix_of_256_takes_seconds_at_most():
    fn, p, x = (lambda p, x: x @ p["w"]), {"w": normal(0, 256, 256)}, normal(1, 512, 256)
    start = time.perf_counter()
    qjax.quantize_sequential(fn, p, [x], GPTQ)
    assert time.perf_counter() - start < 60  # 96 s were seen elsewhere, compilation included


def test_23_attention():
    model, x = nn.MultiHeadDotProductAttention(num_heads=2), normal(0, 8, 25, 32)
    fn = lambda p, x: model.apply(p, x, x)
    params = model.init(jax.random.key(0), x, x)
    recipe = qjax.Recipe(qjax.Rule(".*bias", None, optional=True), *GPTQ.rules)
    better_than_nearest(fn, params, x, recipe=recipe)


def test_23_a_convolution_and_experts():
    sizes = jnp.array([100, 60, 40], jnp.int32)

    def fn(p, x):
        h = lax.conv_general_dilated(
            x[None], p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return lax.ragged_dot(jnp.tanh(h[0]), p["experts"], sizes)

    p = {"conv": normal(0, 3, 16, 16) / 7, "experts": normal(1, 3, 16, 8)}
    better_than_nearest(fn, p, normal(2, 200, 16))


def test_24_two_contracted_axes_and_batch_axes():
    def fn(p, x):
        h = jnp.einsum("bshk,hkd->bsd", x, p["o"])
        return jnp.einsum("ebd,edf->ebf", h, p["experts"])

    p = {"o": normal(0, 2, 20, 16) / 6, "experts": normal(1, 3, 16, 8)}
    better_than_nearest(fn, p, normal(2, 3, 80, 2, 20))


def test_nnx_and_plain_functions():
    graph, state = nnx.split(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    fn = lambda s, x: nnx.merge(graph, s)(x)
    x = normal(0, 100, 32)
    q = qjax.quantize_sequential(fn, state, [x], GPTQ)
    assert qjax.is_qtensor(q["kernel"].get_value())
    assert relative_error(qjax.quantized(fn)(q, x), fn(state, x)) < 0.2
