"""The decoder against itself in another form; against transformers see test_loading.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few, slow
from tiny_models import CONFIGS, SIZES, make, run, some_tokens, stacked

from qjax.models import Config, Decoder, Rope, init_cache
from qjax.models.architecture import llama3_factors


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


# Local layers, norms of queries and keys, experts, biases: what the other two have too.
UNLIKE = ["qwen2", "gemma3", "mixtral", "qwen3_moe"]


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.max(jnp.abs(b))), rtol=0)


@pytest.mark.parametrize("family", few([*CONFIGS], UNLIKE))
def test_scanned_layers_equal_unrolled_ones(family):
    config = CONFIGS[family]
    model, params = make(config)
    scanned = Decoder(dataclasses.replace(config, scan=True))
    both = stacked(params, config.num_layers)
    expected = jax.eval_shape(scanned.init, jax.random.key(0), some_tokens())
    assert jax.tree.map(np.shape, both) == jax.tree.map(np.shape, expected)
    close(run(scanned, both, some_tokens()), run(model, params, some_tokens()))


@pytest.mark.parametrize(
    ("family", "scan"),
    [
        *((family, False) for family in CONFIGS),
        *((f, True) if f in ("gemma3", "mixtral") else slow(f, True) for f in CONFIGS),
    ],
)
def test_cached_positions_equal_uncached_ones(family, scan):
    config = CONFIGS[family]
    model, params = make(config)
    whole = run(model, params, some_tokens())
    if scan:
        config = dataclasses.replace(config, scan=True)
        model, params = Decoder(config), stacked(params, config.num_layers)
    cache, parts = init_cache(config, 2, 16), []
    for begin, end in ((0, 5), (5, 6), (6, 11)):
        logits, cache = run(model, params, some_tokens()[:, begin:end], cache=cache)
        parts.append(logits)
        assert int(cache.length) == end
    close(jnp.concatenate(parts, axis=1), whole)


def test_last_selects_one_position(config):
    model, params = make(config)
    whole = run(model, params, some_tokens())
    for position in (0, 4, 10):
        one = run(model, params, some_tokens(), last=jnp.int32(position))
        close(one, whole[:, position : position + 1])


def test_a_token_changes_later_positions_only(config):
    model, params = make(config)
    tokens = some_tokens()
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % config.vocab_size)
    a, b = run(model, params, tokens), run(model, params, changed)
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert jnp.all(jnp.any(a[:, 6:] != b[:, 6:], axis=-1))


def test_a_local_layer_sees_its_window_only():
    config = dataclasses.replace(
        CONFIGS["gemma3"], num_layers=1, local_layers=(True,), sliding_window=3
    )
    model, params = make(config)
    tokens = some_tokens()
    changed = tokens.at[:, 2].set((tokens[:, 2] + 1) % config.vocab_size)
    a, b = run(model, params, tokens), run(model, params, changed)
    seen = jnp.any(a != b, axis=(0, 2))
    assert seen.tolist() == [False, False, True, True, True] + [False] * 6


def test_grouped_heads_are_repeated_ones():
    """Two kv heads for four query heads equal four kv heads of which pairs are the same."""
    config = CONFIGS["qwen2"]
    model, params = make(config)
    full = Decoder(dataclasses.replace(config, num_kv_heads=4))

    def repeat(path, leaf):
        names = [entry.key for entry in path]
        if not {"k", "v"} & set(names):
            return leaf
        heads = leaf.reshape(*leaf.shape[:-1], 2, config.head_dim)
        return jnp.repeat(heads, 2, axis=-2).reshape(*leaf.shape[:-1], -1)

    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    close(run(full, repeated, some_tokens()), run(model, params, some_tokens()))


def test_rotary_scores_depend_on_distance_alone():
    """A model without absolute positions gives a repeated prompt the same logits when shifted."""
    config = dataclasses.replace(CONFIGS["llama"], num_layers=1)
    model, params = make(config)
    cache = init_cache(config, 1, 32)
    tokens = some_tokens(1, 4)
    near, _ = run(model, params, tokens, cache=cache)
    # Ten positions further on, with the earlier ones out of reach of a window of four.
    windowed = dataclasses.replace(config, sliding_window=4, local_layers=(True,))
    far, _ = run(Decoder(windowed), params, tokens, cache=cache._replace(length=jnp.int32(10)))
    close(far[:, -1], near[:, -1], 1e-5)


def test_rope_frequencies():
    np.testing.assert_allclose(Rope(100.0).frequencies(4), [1.0, 0.1])
    np.testing.assert_allclose(Rope(100.0, 2.0).frequencies(4), [0.5, 0.05])
    np.testing.assert_allclose(Rope(100.0, 1.0, (1.0, 4.0)).frequencies(4), [1.0, 0.025])


def test_llama3_factors_agree_with_the_published_rule():
    """Llama 3.1's rule, written per frequency as in Meta's reference code."""
    theta, dim, factor, low, high, length = 500_000.0, 128, 8.0, 1.0, 4.0, 8192
    found = llama3_factors(theta, dim, factor, low, high, length)
    for frequency, divisor in zip(Rope(theta).frequencies(dim), found, strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            expected = 1.0
        elif wavelength > length / low:
            expected = factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            expected = 1 / ((1 - smooth) / factor + smooth)
        assert divisor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", few([*CONFIGS], ["qwen2", "gemma3", "mixtral"]))
def test_bfloat16_stays_near_float32(family):
    # All experts answer: which ones are chosen jumps where two are as probable.
    config = CONFIGS[family]
    config = dataclasses.replace(config, experts_per_token=config.num_experts)
    model, params = make(config)
    exact = run(model, params, some_tokens())
    half = Decoder(dataclasses.replace(config, dtype=jnp.bfloat16))
    found = run(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), some_tokens())
    assert found.dtype == jnp.float32
    close(found, exact, 0.1)


def test_gradients_pass_through_scan_and_remat():
    config = dataclasses.replace(CONFIGS["gemma3"], scan=True)
    model, params = make(config)

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(model.apply(params, some_tokens()), axis=-1))

    grads = jax.jit(jax.grad(jax.checkpoint(loss)))(params)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim must be even, is 7"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"local_layers": (True,)}, "local_layers has 1 entries for 3 layers"),
        ({"local_layers": (True,) * 3}, "local layers need a sliding_window"),
        ({"activation": "relu"}, "activation 'relu' is unknown, known are silu, gelu_tanh"),
        ({"num_experts": 4}, "experts_per_token must be 1 to 4, the number of experts, is 0"),
        ({"experts_per_token": 1}, "experts_per_token must be 0 to 0, the number of experts, is 1"),
        ({"rope": Rope(1e4, 1.0, (1.0,))}, "rope.factors must have head_dim / 2 = 4 entries"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**SIZES | change)


def test_more_tokens_than_the_cache_holds_are_refused():
    config = CONFIGS["llama"]
    model, params = make(config)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of 8 positions"):
        run(model, params, some_tokens(), cache=init_cache(config, 2, 8))
