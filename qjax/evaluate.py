"""How good a language model is on a text: perplexity, and distance to a reference model.

A model is any function ``fn(params, tokens) -> logits`` of int tokens [b, s] and logits
[b, s, vocab], such as ``qjax.quantized(model.apply)``. A text is cut into windows that share no
token; the logits at position t of a window are held against its token t + 1, so that a window of
512 tokens scores its tokens 2 to 512, each from what precedes it in the window alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Model: TypeAlias = "tuple[Callable[..., Any], Any]"  # (fn, params)


class Perplexity(NamedTuple):
    """Perplexity over windows of equal length.

    Attributes:
      value: exp(nll).
      standard_error: value * std(window_nll) / sqrt(windows), by the delta method; NaN where there
        is one window only.
      nll: mean negative log-likelihood per scored token, in nats.
      window_nll: float64 [windows], the same for each window.
      tokens: how many tokens were scored.
    """

    value: float
    standard_error: float
    nll: float
    window_nll: np.ndarray
    tokens: int


class Comparison(NamedTuple):
    """A model beside a reference, on the same windows.

    Attributes:
      perplexity: the model's own.
      ratio: its perplexity divided by the reference's, exp(nll - nll_reference).
      ratio_standard_error: from the paired differences of the windows, whose spread is far smaller
        than that of the perplexities.
      kl: mean over tokens of sum_v p_v (log p_v - log q_v), p the reference's probabilities and q
        the model's, in nats.
      kl_standard_error: over windows.
      top1: fraction of positions where what the reference finds most likely the model finds most
        likely too (a tie counts).
    """

    perplexity: Perplexity
    ratio: float
    ratio_standard_error: float
    kl: float
    kl_standard_error: float
    top1: float


class Encoder(Protocol):
    """What `text_windows` needs of a tokenizer; `qjax.models.Tokenizer` has it."""

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...


def windows(
    ids: Sequence[int] | np.ndarray,
    length: int,
    count: int | None = None,
    bos_id: int | None = None,
) -> np.ndarray:
    """Cuts token ids into windows that share no token.

    Without `bos_id` window i is ``ids[i * length : (i + 1) * length]``. With it each window is
    `bos_id` and the next ``length - 1`` ids. A rest that fills no window is left out.

    Args:
      ids: of a whole text, without special tokens.
      length: tokens per window, the bos included; at least 2.
      count: how many windows, from the beginning of the text; None takes all.
      bos_id: what the model expects before every text, or None.

    Returns:
      int32 [count, length].

    Raises:
      ValueError: if the text is too short for `count` windows, or for one.

    Example:
      >>> windows([5, 6, 7, 8, 9], 3, bos_id=1).tolist()
      [[1, 5, 6], [1, 7, 8]]
    """
    ids = np.asarray(ids, np.int32)
    if ids.ndim != 1:
        raise ValueError(f"windows: ids must be one sequence, got an array of shape {ids.shape}")
    if length < 2:
        raise ValueError(f"windows: a window needs at least 2 tokens to score one, got {length}")
    if count is not None and count < 1:
        raise ValueError(f"windows: count must be at least 1, got {count}")
    body = length - (bos_id is not None)
    available = len(ids) // body
    if available < (count or 1):
        raise ValueError(
            f"windows: {len(ids)} tokens make {available} window(s) of {length}, needed "
            f"{count or 1}; give a longer text, fewer or shorter windows"
        )
    count = count or available
    cut = ids[: count * body].reshape(count, body)
    return cut if bos_id is None else np.insert(cut, 0, bos_id, axis=1)


def text_windows(
    tokenizer: Encoder, text: str, length: int, count: int | None = None
) -> np.ndarray:
    """`windows` of a text; each begins with the bos if the tokenizer puts one around every text."""
    special = tokenizer.encode("")
    bos_id = tokenizer.bos_id if special and special[0] == tokenizer.bos_id else None
    return windows(tokenizer.encode(text, add_special=False), length, count, bos_id)


def batched(windows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts [n, length] into batches of `size` windows; the last may be smaller.

    Example:
      >>> [b.shape for b in batched(np.zeros((5, 8), np.int32), 2)]
      [(2, 8), (2, 8), (1, 8)]
    """
    if size < 1:
        raise ValueError(f"batched: a batch has at least 1 window, got {size}")
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def token_nll(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihood of each token but the first: log sum_v exp(l_v) - l_token, float32.

    Args:
      logits: [b, s, vocab], those at position t for token t + 1.
      tokens: int [b, s].

    Returns:
      float32 [b, s - 1], in nats.
    """
    logits = logits.astype(jnp.float32)
    # Slices of the logits would be copies; what is computed at the last position is dropped.
    following = jnp.roll(tokens, -1, axis=1)[..., None]
    scored = jnp.take_along_axis(logits, following, axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - scored)[:, :-1]


def token_kl(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) with p of the reference and q of `logits`.

    Computed as sum_v p_v (r_v - l_v) - logsumexp(r) + logsumexp(l), which keeps no array of
    log-probabilities.

    Args:
      reference, logits: [..., vocab].

    Returns:
      float32 [...], in nats.
    """
    reference, logits = reference.astype(jnp.float32), logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(reference, axis=-1)
    p = jnp.exp(reference - normalizer[..., None])
    weighted = jnp.sum(p * (reference - logits), axis=-1)
    return weighted - normalizer + jax.nn.logsumexp(logits, axis=-1)


def perplexity(fn: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Perplexity:
    """Perplexity of a model over windows, exp(mean of `token_nll`).

    The model is compiled once per batch shape and holds the logits of one batch.

    Args:
      fn: ``fn(params, tokens) -> logits``.
      params: its parameters.
      batches: int tokens [b, s] each, all of one s, such as ``batched(windows, 2)``; wrap the
        iterable to show progress.

    Raises:
      ValueError: if there is no batch, or the batches are no windows of one length.

    Example:
      >>> fn = lambda params, tokens: params["table"][tokens]
      >>> result = perplexity(fn, {"table": jnp.zeros((5, 5))}, [jnp.array([[0, 3, 1]])])
      >>> round(result.value, 4), result.tokens
      (5.0, 2)
    """

    @jax.jit
    def step(params: Any, tokens: jax.Array) -> jax.Array:
        return token_nll(fn(params, tokens), tokens).mean(axis=-1)

    found, length = [], None
    for tokens in batches:
        tokens, length = _checked(tokens, length)
        found.append(np.asarray(step(params, tokens), np.float64))
    return _perplexity(found, length)


def compare(
    reference: Model,
    candidates: Mapping[str, Model],
    batches: Iterable[Any],
    *,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Perplexity, dict[str, Comparison]]:
    """Holds models against a reference: perplexity ratio, mean KL divergence, top-1 agreement.

    Every batch runs through the reference once and then through each candidate, so that the logits
    of one batch are all that is held, and a reference is not run again for each candidate.

    Args:
      reference: ``(fn, params)`` of the reference, often the float model.
      candidates: name to ``(fn, params)``; all models share vocabulary and tokenizer.
      batches: as in `perplexity`.
      advance: called after each run of a model on a batch, for a progress bar of
        ``len(batches) * (1 + len(candidates))`` steps.

    Returns:
      The reference's Perplexity, and name to Comparison.

    Raises:
      ValueError: as in `perplexity`, or if a candidate's logits have another shape than the
        reference's.

    Example:
      >>> fn = lambda params, tokens: params["table"][tokens]
      >>> float_model = (fn, {"table": jnp.eye(4)})
      >>> _, result = compare(float_model, {"same": float_model}, [jnp.array([[0, 3, 1]])])
      >>> result["same"].ratio, result["same"].top1
      (1.0, 1.0)
    """
    fn, params = reference

    @jax.jit
    def reference_step(params: Any, tokens: jax.Array) -> tuple[jax.Array, ...]:
        logits = fn(params, tokens)
        best = jnp.argmax(logits, axis=-1)
        return logits, best, token_nll(logits, tokens).mean(axis=-1)

    steps = {name: _candidate_step(name, model[0]) for name, model in candidates.items()}
    reference_nll: list[np.ndarray] = []
    found: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in candidates}
    length = None
    for tokens in batches:
        tokens, length = _checked(tokens, length)
        logits, best, nll = reference_step(params, tokens)
        reference_nll.append(np.asarray(nll, np.float64))
        advance()
        for name, step in steps.items():
            values = step(candidates[name][1], tokens, logits, best)
            found[name].append(tuple(np.asarray(v, np.float64) for v in values))
            advance()
    base = _perplexity(reference_nll, length)
    return base, {name: _comparison(base, rows, length) for name, rows in found.items()}


def _candidate_step(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    def step(
        params: Any, tokens: jax.Array, reference: jax.Array, best: jax.Array
    ) -> tuple[jax.Array, ...]:
        logits = fn(params, tokens)
        if logits.shape != reference.shape:
            raise ValueError(
                f"compare: {name!r} gives logits of shape {logits.shape}, the reference "
                f"{reference.shape}; models are compared over one vocabulary"
            )
        kl = token_kl(reference, logits)[:, :-1]
        at_best = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
        same = (at_best >= jnp.max(logits, axis=-1))[:, :-1].astype(jnp.float32)
        return tuple(row.mean(axis=-1) for row in (token_nll(logits, tokens), kl, same))

    return step


def _checked(tokens: Any, length: int | None) -> tuple[jax.Array, int]:
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            "a batch holds int tokens [windows, length] with length at least 2, got "
            f"{tokens.dtype} {tokens.shape}"
        )
    if length is not None and tokens.shape[1] != length:
        raise ValueError(
            f"windows of {length} and of {tokens.shape[1]} tokens cannot be averaged; cut the text "
            "into windows of one length"
        )
    return tokens, tokens.shape[1]


def _perplexity(found: Sequence[np.ndarray], length: int | None) -> Perplexity:
    if not found or length is None:
        raise ValueError("there is no window to evaluate on; give at least one batch")
    per_window = np.concatenate(found)
    nll = float(per_window.mean())
    value = math.exp(nll)
    tokens = len(per_window) * (length - 1)
    return Perplexity(value, value * _standard_error(per_window), nll, per_window, tokens)


def _comparison(
    base: Perplexity, rows: Sequence[tuple[np.ndarray, ...]], length: int | None
) -> Comparison:
    nll, kl, same = (list(column) for column in zip(*rows, strict=True))
    own = _perplexity(nll, length)
    ratio = math.exp(own.nll - base.nll)
    spread = _standard_error(own.window_nll - base.window_nll)
    kl, same = np.concatenate(kl), np.concatenate(same)
    return Comparison(
        own, ratio, ratio * spread, float(kl.mean()), _standard_error(kl), float(same.mean())
    )


def _standard_error(values: np.ndarray) -> float:
    """Of the mean; NaN for a single value, whose spread is unknown."""
    return math.nan if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
