"""Quantized caches: what they hold, what that does to the logits, and generation with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, relative_error, slow
from tiny_models import CONFIGS, make, run, some_tokens, stacked

import qjax
from qjax.models import Decoder, generator, init_cache
from qjax.models.cache import read

FORMATS = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3"}


@pytest.fixture(params=FORMATS)
def dtype(request):
    return request.param


def filled(model, params, dtype, tokens):
    cache = init_cache(model.config, tokens.shape[0], 16, dtype)
    return run(model, params, tokens, cache=cache)


def test_the_codes_are_those_of_quantize(dtype):
    """In the first layer keys and values do not depend on the cache."""
    model, params = make(CONFIGS["qwen2"])
    _, exact = filled(model, params, None, some_tokens())
    _, coded = filled(model, params, dtype, some_tokens())
    for held, x in ((coded.keys[0], exact.keys[0]), (coded.values[0], exact.values[0])):
        wanted = qjax.quantize(x[:, :11], FORMATS[dtype], axis=-1)
        assert held.codes.dtype == dtype
        np.testing.assert_array_equal(held.codes[:, :11], wanted.qvalue)
        np.testing.assert_array_equal(held.scale[:, :11], wanted.scale)
        np.testing.assert_array_equal(read(held, jnp.float32)[:, :11], qjax.dequantize(wanted))
        assert not np.any(held.scale[:, 11:])


def test_later_positions_read_what_is_held(dtype):
    """A float cache that holds the decoded codes gives the same next logits."""
    config = dataclasses.replace(CONFIGS["llama"], num_layers=1)
    model, params = make(config)
    tokens = some_tokens()
    _, coded = filled(model, params, dtype, tokens[:, :8])
    found, _ = run(model, params, tokens[:, 8:9], cache=coded)
    decode = lambda held: tuple(read(layer, jnp.float32) for layer in held)
    floats = coded._replace(keys=decode(coded.keys), values=decode(coded.values))
    wanted, _ = run(model, params, tokens[:, 8:9], cache=floats)
    exact, _ = run(
        model, params, tokens[:, 8:9], cache=filled(model, params, None, tokens[:, :8])[1]
    )
    # Left is the rounding of the new token's own key and value, one of nine.
    assert relative_error(found, wanted) < relative_error(found, exact)


@pytest.mark.parametrize(
    ("family", "scan", "dtype"),
    [
        ("qwen2", False, "int8"),
        ("mixtral", True, "float8_e4m3fn"),
        slow("qwen2", False, "float8_e4m3fn"),
        slow("mixtral", True, "int8"),
        *(slow("gemma3", True, dtype) for dtype in FORMATS),
    ],
)
def test_logits_stay_near_those_of_a_float_cache(family, scan, dtype):
    # All experts answer: which ones are chosen jumps where two are as probable.
    config = CONFIGS[family]
    config = dataclasses.replace(config, experts_per_token=config.num_experts)
    model, params = make(config)
    whole = run(model, params, some_tokens())
    if scan:
        model = Decoder(dataclasses.replace(config, scan=True))
        params = stacked(params, config.num_layers)
    cache, parts = init_cache(model.config, 2, 16, dtype), []
    for begin, end in ((0, 5), (5, 6), (6, 11)):
        logits, cache = run(model, params, some_tokens()[:, begin:end], cache=cache)
        parts.append(logits)
    error = relative_error(jnp.concatenate(parts, axis=1), whole)
    assert 1e-5 < error < {"int8": 0.03, "float8_e4m3fn": 0.1}[dtype]


def test_a_quantized_cache_is_a_quarter_of_a_float32_one():
    config = dataclasses.replace(CONFIGS["qwen2"], head_dim=64)
    nbytes = lambda dtype: sum(x.nbytes for x in jax.tree.leaves(init_cache(config, 2, 16, dtype)))
    assert nbytes("int8") == 3 * 2 * (2 * 16 * 2 * (64 + 4)) + 4
    assert nbytes(None) == 3 * 2 * (2 * 16 * 2 * 64 * 4) + 4


@pytest.mark.parametrize("dtype", few([*FORMATS], ["float8_e4m3fn"]))
def test_computation_in_bfloat16(dtype):
    config = CONFIGS["qwen3"]
    model, params = make(config)
    half = Decoder(dataclasses.replace(config, dtype=jnp.bfloat16))
    found, cache = filled(half, params, dtype, some_tokens())
    assert cache.keys[0].scale.dtype == jnp.float32
    assert relative_error(found, run(model, params, some_tokens())) < 0.15


@pytest.mark.parametrize(
    ("scan", "dtype"),
    [(True, "int8"), *(slow(*v) for v in ((True, "float8_e4m3fn"), (False, "int8")))],
)
def test_generation(scan, dtype):
    config = dataclasses.replace(CONFIGS["qwen2"], scan=scan)
    model, params = make(CONFIGS["qwen2"])
    if scan:
        model, params = Decoder(config), stacked(params, config.num_layers)
    found = generator(model.apply, config, max_new_tokens=5, cache_dtype=dtype)(
        params, some_tokens()
    )
    step = jax.jit(functools.partial(model.apply, params))
    logits, cache = step(some_tokens(), cache=init_cache(config, 2, 15, dtype))
    for i in range(5):
        token = jnp.argmax(logits[:, -1:], axis=-1)
        np.testing.assert_array_equal(found.tokens[:, i : i + 1], token)
        logits, cache = step(token, cache=cache)


@pytest.mark.parametrize("dtype", ["int4", jnp.bfloat16])
def test_other_dtypes_are_refused(dtype):
    message = "dtype must be one of float32, int8, float8_e4m3fn, is "
    with pytest.raises(ValueError, match=message):
        init_cache(CONFIGS["llama"], 1, 8, dtype)
    with pytest.raises(ValueError, match=message):
        generator(lambda: None, CONFIGS["llama"], max_new_tokens=1, cache_dtype=dtype)
