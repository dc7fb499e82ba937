"""Perplexity, KL and agreement against the same quantities computed by NumPy in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import evaluate

VOCAB = 11


def bigram(params, tokens):
    return params["table"][tokens]


def tables(*seeds: int) -> list[np.ndarray]:
    return [np.random.default_rng(s).normal(0, 3, (VOCAB, VOCAB)).astype(np.float32) for s in seeds]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (5, 9)).astype(np.int32)


def test_perplexity_is_that_of_float64(text):
    (table,) = tables(1)
    result = evaluate.perplexity(bigram, {"table": jnp.asarray(table)}, evaluate.batched(text, 2))
    nll = -np.take_along_axis(log_softmax(table[text[:, :-1]]), text[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(result.window_nll, nll.mean(1), rtol=1e-6)
    assert result.value == pytest.approx(math.exp(nll.mean()), rel=1e-6)
    spread = nll.mean(1).std(ddof=1) / math.sqrt(5)
    assert result.standard_error == pytest.approx(math.exp(nll.mean()) * spread, rel=1e-5)
    assert result.tokens == 5 * 8


def test_comparison_is_that_of_float64(text):
    reference, other, third = tables(1, 2, 3)
    steps = []
    base, found = evaluate.compare(
        (bigram, {"table": jnp.asarray(reference)}),
        {
            "other": (bigram, {"table": jnp.asarray(other)}),
            "third": (bigram, {"table": jnp.asarray(third)}),
        },
        evaluate.batched(text, 3),
        advance=lambda: steps.append(1),
    )
    assert len(steps) == 2 * 3
    at = text[:, :-1]
    p = log_softmax(reference[at])
    for name, table in (("other", other), ("third", third)):
        q = log_softmax(table[at])
        kl = (np.exp(p) * (p - q)).sum(-1)
        assert found[name].kl == pytest.approx(kl.mean(), rel=1e-5)
        spread = kl.mean(1).std(ddof=1) / math.sqrt(5)
        assert found[name].kl_standard_error == pytest.approx(spread, rel=1e-4)
        assert found[name].top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
        differences = np.take_along_axis(p - q, text[:, 1:, None], -1)[..., 0].mean(1)
        assert found[name].ratio == pytest.approx(math.exp(differences.mean()), rel=1e-5)
        spread = differences.std(ddof=1) / math.sqrt(5)
        expected = math.exp(differences.mean()) * spread
        assert found[name].ratio_standard_error == pytest.approx(expected, rel=1e-4)
    own = evaluate.perplexity(bigram, {"table": jnp.asarray(other)}, [text])
    assert found["other"].perplexity.value == pytest.approx(own.value, rel=1e-6)
    alone = evaluate.perplexity(bigram, {"table": jnp.asarray(reference)}, [text])
    assert base.value == pytest.approx(alone.value, rel=1e-6)


def test_a_model_equals_itself(text):
    (table,) = tables(4)
    model = (bigram, {"table": jnp.asarray(table)})
    base, found = evaluate.compare(model, {"itself": model}, [text])
    assert found["itself"].ratio == pytest.approx(1, abs=1e-6)
    assert found["itself"].ratio_standard_error < 1e-6
    assert abs(found["itself"].kl) < 1e-6
    assert found["itself"].top1 == 1
    assert found["itself"].perplexity.value == pytest.approx(base.value, rel=1e-6)


def test_large_logits_stay_finite():
    reference = np.array([[1000.0, 990.0, -1000.0]], np.float32)
    other = np.array([[995.0, 1000.0, -900.0]], np.float32)
    p, q = log_softmax(reference), log_softmax(other)
    found = evaluate.token_kl(jnp.asarray(reference), jnp.asarray(other))
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)


def test_bfloat16_logits_are_scored_in_float32(text):
    (table,) = tables(5)
    rounded = jnp.asarray(table).astype(jnp.bfloat16)
    low = evaluate.perplexity(bigram, {"table": rounded}, [text])
    high = evaluate.perplexity(bigram, {"table": rounded.astype(jnp.float32)}, [text])
    assert low.value == high.value


def test_a_quantized_model_is_evaluated_as_its_dequantized_twin(text):
    (table,) = tables(6)
    q = qjax.quantize(jnp.asarray(table), "int8", axis=1)
    low = evaluate.perplexity(qjax.quantized(bigram), {"table": q}, [text])
    high = evaluate.perplexity(bigram, {"table": qjax.dequantize(q)}, [text])
    assert low.value == pytest.approx(high.value, rel=1e-6)


def test_each_batch_shape_is_compiled_once(text):
    traces = []

    def counting(params, tokens):
        traces.append(tokens.shape)
        return bigram(params, tokens)

    (table,) = tables(7)
    params = {"table": jnp.asarray(table)}
    evaluate.perplexity(counting, params, evaluate.batched(text, 2))
    assert traces == [(2, 9), (1, 9)]


def test_windows_are_disjoint_and_in_order():
    ids = np.arange(100)
    np.testing.assert_array_equal(evaluate.windows(ids, 30), ids[:90].reshape(3, 30))
    np.testing.assert_array_equal(evaluate.windows(ids, 30, 2), ids[:60].reshape(2, 30))
    with_bos = evaluate.windows(ids, 26, bos_id=7)
    assert (with_bos[:, 0] == 7).all()
    np.testing.assert_array_equal(with_bos[:, 1:].reshape(-1), ids)
    assert with_bos.dtype == np.int32


class FakeTokenizer:
    def __init__(self, bos_id, special):
        self.bos_id, self.special = bos_id, special

    def encode(self, text, *, add_special=True):
        return (self.special if add_special else []) + [ord(c) for c in text]


def test_a_window_begins_with_bos_only_if_every_text_does():
    adds = evaluate.text_windows(FakeTokenizer(1, [1]), "abcd", 3)
    assert adds.tolist() == [[1, 97, 98], [1, 99, 100]]
    has = evaluate.text_windows(FakeTokenizer(1, []), "abcd", 2)
    assert has.tolist() == [[97, 98], [99, 100]]
    eos = evaluate.text_windows(FakeTokenizer(None, [2]), "abcd", 4)
    assert eos.tolist() == [[97, 98, 99, 100]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate.windows(range(10), 4, 3), "10 tokens make 2 window.* needed 3"),
        (lambda: evaluate.windows(range(3), 4), "3 tokens make 0 window"),
        (lambda: evaluate.windows(range(3), 1), "at least 2 tokens"),
        (lambda: evaluate.windows(range(3), 2, 0), "count must be at least 1"),
        (lambda: evaluate.windows(np.zeros((2, 2)), 2), "one sequence"),
        (lambda: evaluate.batched(np.zeros((2, 2)), 0), "at least 1 window"),
        (lambda: evaluate.perplexity(bigram, {}, []), "no window"),
        (lambda: evaluate.perplexity(bigram, {}, [np.zeros((2, 1), np.int32)]), "length at least"),
        (lambda: evaluate.perplexity(bigram, {}, [np.zeros((2, 4), np.float32)]), "float32"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_windows_of_two_lengths_are_refused():
    (table,) = tables(8)
    batches = [np.zeros((1, 4), np.int32), np.zeros((1, 5), np.int32)]
    with pytest.raises(ValueError, match="windows of 4 and of 5 tokens"):
        evaluate.perplexity(bigram, {"table": jnp.asarray(table)}, batches)


def test_models_of_two_vocabularies_are_refused(text):
    (table,) = tables(9)
    small = lambda params, tokens: bigram(params, tokens)[..., :5]
    model = (bigram, {"table": jnp.asarray(table)})
    with pytest.raises(ValueError, match="'small' gives logits of shape"):
        evaluate.compare(model, {"small": (small, model[1])}, [text])


def test_one_window_has_no_standard_error(text):
    (table,) = tables(10)
    result = evaluate.perplexity(bigram, {"table": jnp.asarray(table)}, [text[:1]])
    assert math.isnan(result.standard_error)
    assert math.isfinite(result.value)
