"""Text generation: prompt and all new tokens in one jitted call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax import _compat
from qjax.models.architecture import Config
from qjax.models.cache import init_cache

# Kernels that XLA captures into a graph do not start before the one in front of them is done.
GPU_OPTIONS = {"xla_gpu_enable_command_buffer": ""}


class Generation(NamedTuple):
    """What a generator returns.

    Attributes:
      tokens: int32 [batch, max_new_tokens]; the pad id after a stop token.
      lengths: int32 [batch], how many are generated, a stop token included.
    """

    tokens: jax.Array
    lengths: jax.Array


def generator(
    fn: Callable[..., Any],
    config: Config,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] = (),
    pad_id: int = 0,
    cache_dtype: DTypeLike | None = None,
) -> Callable[..., Generation]:
    """Makes a jitted function that continues prompts.

    The prompt is run once, then each new token in a loop on the device, until all rows have met
    a stop token. A second call with the same shapes compiles nothing.

    Args:
      fn: ``model.apply`` of a Decoder, or ``qjax.quantized(model.apply)`` for quantized params.
      config: the Decoder's.
      max_new_tokens: the loop's limit.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample from the k most likely tokens only.
      top_p: sample from the smallest set of tokens whose probabilities sum to at least p.
      stop_ids: a row ends after one of these.
      pad_id: what fills the rows after their end.
      cache_dtype: of the keys and values that are kept, as for `init_cache`.

    Returns:
      ``generate(params, tokens, key=None, length=None) -> Generation`` with int `tokens`
      [batch, s], a PRNG `key` where the temperature is not 0, and int `length` [], the number of
      tokens that are prompt: pad prompts to one of a few s, and their lengths share a compilation.

    Example::

      generate = generator(qjax.quantized(model.apply), model.config, max_new_tokens=64)
      text = tokenizer.decode(generate(params, tokens).tokens[0])
    """
    if max_new_tokens < 1:
        raise ValueError(f"generator: max_new_tokens must be at least 1, is {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generator: temperature must be finite and not negative: {temperature}")
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(f"generator: top_k must be 1 to {config.vocab_size}, is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generator: top_p must be above 0 and at most 1, is {top_p}")

    stop_ids = tuple(map(int, stop_ids))
    jax.eval_shape(lambda: init_cache(config, 1, 1, cache_dtype))  # refuses a wrong dtype now

    def pick(logits: jax.Array, key: jax.Array | None, step: jax.Array | int) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        assert key is not None
        logits = truncate(logits / temperature, top_k, top_p)
        choice = jax.random.categorical(jax.random.fold_in(key, step), logits, axis=-1)
        return choice.astype(jnp.int32)

    def stops(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))

    def run(params: Any, tokens: jax.Array, key: jax.Array | None, length: jax.Array):
        batch, s = tokens.shape
        cache = init_cache(config, batch, s + max_new_tokens - 1, cache_dtype)
        logits, cache = fn(params, tokens, cache=cache, last=length - 1)
        # What padding has left in the cache is overwritten before a later position can see it.
        cache = cache._replace(length=length)
        token = pick(logits[:, 0], key, 0)
        out = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        lengths = jnp.ones((batch,), jnp.int32)

        def unfinished(state):
            step, _, done, _, _, _ = state
            return (step < max_new_tokens) & ~jnp.all(done)

        def advance(state):
            step, token, done, out, lengths, cache = state
            logits, cache = fn(params, token[:, None], cache=cache)
            token = jnp.where(done, pad_id, pick(logits[:, 0], key, step))
            out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
            lengths = lengths + (~done).astype(jnp.int32)
            return step + 1, token, done | stops(token), out, lengths, cache

        state = (jnp.int32(1), token, stops(token), out, lengths, cache)
        if stop_ids:
            state = jax.lax.while_loop(unfinished, advance, state)
        else:  # XLA knows how many steps: the host need not ask the device after each
            state = jax.lax.fori_loop(1, max_new_tokens, lambda _, s: advance(s), state)
        _, _, _, out, lengths, _ = state
        return Generation(out, lengths)

    compiled, alone = jax.jit(run), jax.jit(run, compiler_options=GPU_OPTIONS)

    def generate(params: Any, tokens: Any, key: Any = None, length: Any = None) -> Generation:
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"generate: tokens must be [batch, s] and not empty: {tokens.shape}")
        if tokens.shape[1] + max_new_tokens > config.max_length:
            raise ValueError(
                f"generate: {tokens.shape[1]} prompt and {max_new_tokens} new tokens exceed the "
                f"model's {config.max_length} positions"
            )
        if temperature > 0 and key is None:
            raise ValueError("generate: sampling needs a key, such as jax.random.key(0)")
        length = tokens.shape[1] if length is None else length
        call = alone if jax.default_backend() == "gpu" and _compat.outermost() else compiled
        return call(params, tokens, key if temperature > 0 else None, jnp.int32(length))

    return generate


def truncate(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Sets the logits [..., vocab] of tokens that `top_k` and `top_p` exclude to -inf.

    Both look at the given logits; ties with the last token that is kept are kept.
    """
    least = jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype)
    if top_k is not None:
        least = jnp.maximum(least, jax.lax.top_k(logits, top_k)[0][..., -1:])
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < top_p, ordered, jnp.inf)
        least = jnp.maximum(least, jnp.min(kept, axis=-1, keepdims=True))
    return jnp.where(logits < least, -jnp.inf, logits)
