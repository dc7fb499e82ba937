"""Generation against a loop in Python over the uncached model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, make, run, some_tokens, stacked

import qjax
from qjax.models import Decoder, generator
from qjax.models.generate import GPU_OPTIONS, truncate

NEW = 9


def greedy(model, params, tokens, count=NEW):
    """The definition: run the whole text again for every token; what is padding is not seen."""
    length = tokens.shape[1]
    text = np.pad(np.asarray(tokens), ((0, 0), (0, count)))
    for i in range(length, length + count):
        text[:, i] = np.argmax(run(model, params, text)[:, i - 1], axis=-1)
    return text[:, length:]


@pytest.fixture(params=["llama", "gemma3"])
def setting(request):
    config = CONFIGS[request.param]
    return (config, *make(config))


def test_greedy_equals_the_loop_over_the_whole_text(setting):
    config, model, params = setting
    found = generator(model.apply, config, max_new_tokens=NEW)(params, some_tokens())
    np.testing.assert_array_equal(found.tokens, greedy(model, params, some_tokens()))
    assert found.lengths.tolist() == [NEW, NEW]


def test_scanned_layers_generate_the_same(setting):
    config, model, params = setting
    expected = greedy(model, params, some_tokens())
    config = dataclasses.replace(config, scan=True)
    generate = generator(Decoder(config).apply, config, max_new_tokens=NEW)
    found = generate(stacked(params, config.num_layers), some_tokens())
    np.testing.assert_array_equal(found.tokens, expected)


def test_quantized_params_generate_what_their_dequantized_ones_do(setting):
    config, model, params = setting
    sites = qjax.find_sites(model.apply, params, some_tokens())
    qparams = qjax.quantize_params(params, "int8", sites)
    dense = jax.tree.map(
        lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, qparams, is_leaf=qjax.is_qtensor
    )
    generate = generator(qjax.quantized(model.apply), config, max_new_tokens=NEW)
    found = generate(qparams, some_tokens())
    np.testing.assert_array_equal(found.tokens, greedy(model, dense, some_tokens()))


def test_padded_prompts_generate_what_plain_ones_do(setting):
    config, model, params = setting
    generate = generator(model.apply, config, max_new_tokens=NEW)
    padded = jnp.pad(some_tokens(), ((0, 0), (0, 5)), constant_values=3)
    found = generate(params, padded, length=some_tokens().shape[1])
    np.testing.assert_array_equal(found.tokens, greedy(model, params, some_tokens()))


def test_rows_stop_on_their_own():
    config = CONFIGS["llama"]
    model, params = make(config)
    plain = greedy(model, params, some_tokens())
    stop = int(plain[0, 3])
    generate = generator(model.apply, config, max_new_tokens=NEW, stop_ids=(stop,), pad_id=1)
    found = generate(params, some_tokens())
    for row, expected in enumerate(plain.tolist()):
        end = expected.index(stop) + 1 if stop in expected else NEW
        assert found.tokens[row].tolist() == expected[:end] + [1] * (NEW - end)
        assert found.lengths[row] == end
    assert found.lengths[0] <= 4


def test_the_loop_ends_when_all_rows_have_stopped():
    """One new token is known from the prompt alone: the model must not run again."""
    config = CONFIGS["llama"]
    model, params = make(config)
    first = greedy(model, params, some_tokens(), 1)
    stops = tuple(set(first[:, 0].tolist()))
    calls = []

    def fn(params, tokens, **kwargs):
        jax.debug.callback(lambda: calls.append(tokens.shape))
        return model.apply(params, tokens, **kwargs)

    for given in (stops, np.array(stops)):
        calls.clear()
        found = generator(fn, config, max_new_tokens=NEW, stop_ids=given)(params, some_tokens())
        jax.effects_barrier()
        assert found.lengths.tolist() == [1, 1]
        assert calls == [(2, 11)]


@pytest.mark.parametrize(("stops", "counted"), [((), True), ((0,), False), (np.array([0]), False)])
def test_xla_knows_how_many_steps_there_are_without_stop_ids(stops, counted):
    config = CONFIGS["llama"]
    model, params = make(config)
    generate = generator(model.apply, config, max_new_tokens=NEW, stop_ids=stops)
    program = str(jax.make_jaxpr(generate)(params, some_tokens()))
    assert ("scan[" in program) == counted
    assert ("while[" in program) != counted


def test_a_second_call_traces_nothing():
    config = CONFIGS["llama"]
    model, params = make(config)
    traces = []

    def fn(params, tokens, **kwargs):
        traces.append(tokens.shape)
        return model.apply(params, tokens, **kwargs)

    generate = generator(fn, config, max_new_tokens=4, temperature=0.7, top_k=5)
    generate(params, some_tokens(), jax.random.key(0))
    before = len(traces)
    assert before >= 2
    generate(params, (some_tokens() + 1) % config.vocab_size, jax.random.key(1), length=7)
    assert len(traces) == before


def test_options_of_the_compiler_are_given_where_it_takes_them(monkeypatch):
    """For a GPU, and not under another jit, which would refuse them."""
    config = CONFIGS["llama"]
    model, params = make(config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    generate = generator(model.apply, config, max_new_tokens=2)
    alone = generate(params, some_tokens()).tokens
    np.testing.assert_array_equal(jax.jit(generate)(params, some_tokens()).tokens, alone)
    with pytest.raises(ValueError, match="top-level"):
        jax.jit(jax.jit(jnp.sin, compiler_options=GPU_OPTIONS))(1.0)


def test_sampling_follows_the_distribution():
    """2,000 rows of the same prompt: frequencies of the first token against softmax."""
    config = CONFIGS["llama"]
    model, params = make(config)
    prompt = jnp.tile(some_tokens(1, 5), (2000, 1))
    temperature = 0.8
    logits = run(model, params, prompt[:1])[0, -1] / temperature
    expected = np.asarray(jax.nn.softmax(logits))
    generate = generator(model.apply, config, max_new_tokens=1, temperature=temperature)
    found = generate(params, prompt, jax.random.key(3)).tokens[:, 0]
    counts = np.bincount(np.asarray(found), minlength=config.vocab_size)
    sigma = np.sqrt(2000 * expected * (1 - expected)) + 1
    assert np.all(np.abs(counts - 2000 * expected) < 5 * sigma)
    again = generate(params, prompt, jax.random.key(3)).tokens[:, 0]
    np.testing.assert_array_equal(found, again)
    other = generate(params, prompt, jax.random.key(4)).tokens[:, 0]
    assert np.any(np.asarray(found) != np.asarray(other))


def test_top_k_of_one_is_greedy():
    config = CONFIGS["gemma3"]
    model, params = make(config)
    generate = generator(model.apply, config, max_new_tokens=NEW, temperature=2.0, top_k=1)
    found = generate(params, some_tokens(), jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, greedy(model, params, some_tokens()))


def test_truncate():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))

    def kept(top_k, top_p):
        return jnp.isfinite(truncate(logits, top_k, top_p)).tolist()

    every, ties = [True] * 4, [True] * 4
    assert kept(None, None) == [every, ties]
    assert kept(2, None) == [[False, True, True, False], ties]
    assert kept(None, 0.39) == [[False, True, False, False], ties]
    assert kept(None, 0.41) == [[False, True, True, False], ties]
    assert kept(None, 0.69) == [[False, True, True, False], ties]
    assert kept(None, 0.71) == [[False, True, True, True], ties]
    assert kept(None, 1.0) == [every, ties]
    assert kept(1, 0.9) == [[False, True, False, False], ties]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be finite"),
        ({"max_new_tokens": 1, "top_k": 0}, "top_k must be 1 to 50"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generator(lambda: None, CONFIGS["llama"], **options)


def test_impossible_calls_are_refused():
    config = dataclasses.replace(CONFIGS["llama"], max_length=16)
    model, params = make(config)
    generate = generator(model.apply, config, max_new_tokens=6, temperature=1.0)
    with pytest.raises(ValueError, match="11 prompt and 6 new tokens exceed the model's 16"):
        generate(params, some_tokens(), jax.random.key(0))
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate(params, some_tokens()[:, :4])
    with pytest.raises(ValueError, match=r"must be \[batch, s\]"):
        generate(params, some_tokens()[0])
