"""Text to token ids and back, with the `tokenizers` library.

A GGUF file describes its tokenizer in its metadata; `from_gguf` builds it from there. Two kinds are
known: ``gpt2``, byte-level BPE with merges and a named pre-tokenizer, and ``llama``, SentencePiece
BPE with scores and byte fallback. `from_file` reads a Hugging Face folder's ``tokenizer.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      bos_id, eos_id: the ids that begin and end a text, or None.
      stop_ids: the ids that end a generation: `eos_id`, and the end of a turn where there is one.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Returns the ids of `text`; special tokens written in it are recognized.

        With `add_special` the tokens that this model puts around every text (often a bos, often
        nothing) are added.
        """
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(
                f"decode: ids run from {min(ids)} to {max(ids)}, the vocabulary has "
                f"{self.vocab_size} tokens"
            )
        return self.backend.decode(ids, skip_special_tokens=skip_special)


class PreTokenizer(NamedTuple):
    """How byte-level BPE cuts a text into words before it merges.

    `patterns` are applied one after the other, each to the pieces that the one before left; what a
    pattern does not match is a piece too. With `ignore_merges` a word that is a token is that
    token. `add_bos` is the default where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


def _gpt4(digits: str) -> str:
    """The pattern that GPT-4 introduced; models differ in how many digits make a word."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PLAIN = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_QWEN2 = PreTokenizer((_gpt4(r"\p{N}"),))
_LLAMA3 = PreTokenizer((_gpt4(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)

# By the value of tokenizer.ggml.pre. Each row is tested against llama.cpp's own tokenizer.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "olmo": _PLAIN,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3._replace(ignore_merges=False, add_bos=False),
}

# Control tokens that end a turn, whether or not the file names one of them as its eos.
_STOP_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"  # SentencePiece writes a space as this block


def from_gguf(metadata: Mapping[str, Any], path: str = "GGUF") -> Tokenizer:
    """Builds the tokenizer that the metadata of a GGUF file describes.

    The ids are llama.cpp's, with one exception: llama.cpp takes ordinary tokens that look like an
    end of text (``</s>`` in Qwen's vocabulary) for control tokens. Here the file's types decide.

    Args:
      metadata: of `qjax.io.gguf.read`.
      path: for error messages.

    Raises:
      ValueError: the tokenizer or its pre-tokenizer is none of the known ones, or a key is missing
        or wrong.
    """
    vocabulary = _Vocabulary(metadata, path)
    kind = vocabulary.get("model", str)
    if kind not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        vocabulary.fail("model", f"the tokenizer {kind!r} is not known, known are {known}")
    return _BUILDERS[kind](vocabulary)


def from_file(path: str | os.PathLike[str], *, bos: str | None, eos: str | None) -> Tokenizer:
    """Reads a ``tokenizer.json``; `bos` and `eos` are the texts of these tokens, or None."""
    name = os.fspath(path)
    with open(name, encoding="utf-8") as file:
        text = file.read()
    try:
        json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except RecursionError:
        raise ValueError(f"{name}: the JSON is nested too deeply") from None
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{name}: no tokenizer.json that tokenizers can read: {error}") from error
    ids = {}
    for role, token in (("bos", bos), ("eos", eos)):
        ids[role] = None if token is None else backend.token_to_id(token)
        if token is not None and ids[role] is None:
            raise ValueError(f"{name}: the {role} token {token!r} is not in the vocabulary")
    stops = [ids["eos"], *(backend.token_to_id(token) for token in _STOP_TOKENS)]
    return Tokenizer(backend, ids["bos"], ids["eos"], _unique(stops))


def _unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


class _Vocabulary:
    """The keys ``tokenizer.ggml.*``, validated as they are read."""

    def __init__(self, metadata: Mapping[str, Any], path: str):
        self.metadata, self.path = metadata, path
        self.tokens = self.strings("tokens")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            self.fail("tokens", f"the token {twice!r} appears twice")
        self.types = self.numbers("token_type", np.integer)
        if not np.isin(self.types, range(7)).all():
            self.fail("token_type", "must be 0 to 6")

    def fail(self, key: str, message: str) -> NoReturn:
        raise ValueError(f"{self.path}: key 'tokenizer.ggml.{key}': {message}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            self.fail(key, "is missing; convert the model again")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(key, f"is of type {type(value).__name__}, must be {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.get(key, list)
        if not value:
            self.fail(key, "is empty")
        return value

    def numbers(self, key: str, kind: type) -> np.ndarray:
        value = self.get(key, np.ndarray)
        if not np.issubdtype(value.dtype, kind):
            self.fail(key, f"is an array of {value.dtype}, must be {kind.__name__}")
        if len(value) != len(self.tokens):
            self.fail(key, f"has {len(value)} entries for {len(self.tokens)} tokens")
        return value

    def token_id(self, key: str) -> int | None:
        if f"tokenizer.ggml.{key}" not in self.metadata:
            return None
        value = self.get(key, int)
        if not 0 <= value < len(self.tokens):
            self.fail(key, f"is {value}, the vocabulary has {len(self.tokens)} tokens")
        return value

    def of_type(self, *types: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self.types, types))]


def _finish(vocabulary: _Vocabulary, backend: tokenizers.Tokenizer, add_bos: bool) -> Tokenizer:
    """Adds the special tokens, and what is put around every text."""
    v = vocabulary
    backend.add_special_tokens(_added(v.of_type(_CONTROL, _UNKNOWN), special=True))
    backend.add_tokens(_added(v.of_type(_USER_DEFINED), special=False))
    bos, eos = v.token_id("bos_token_id"), v.token_id("eos_token_id")
    template, named = ["$A"], []
    if v.get("add_bos_token", bool, add_bos):
        if bos is None:
            v.fail("bos_token_id", "is missing, but every text begins with it (add_bos_token)")
        template.insert(0, "bos")
        named.append(("bos", bos))
    if v.get("add_eos_token", bool, False):
        if eos is None:
            v.fail("eos_token_id", "is missing, but every text ends with it (add_eos_token)")
        template.append("eos")
        named.append(("eos", eos))
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=named
    )
    control = set(v.of_type(_CONTROL))
    stops = [v.ids[token] for token in _STOP_TOKENS if token in control]
    turn = [v.token_id("eot_token_id"), v.token_id("eom_token_id")]
    return Tokenizer(backend, bos, eos, _unique([eos, *turn, *stops]))


def _added(tokens: list[str], special: bool) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(token, special=special, normalized=False) for token in tokens]


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    v = vocabulary
    name = v.get("pre", str)
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        v.fail("pre", f"the pre-tokenizer {name!r} is not known, known are {known}")
    pre = PRE_TOKENIZERS[name]
    merges = [_split_merge(v, i, merge) for i, merge in enumerate(v.strings("merges"))]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=v.ids, merges=merges, ignore_merges=pre.ignore_merges)
    )
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in pre.patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return _finish(v, backend, pre.add_bos)


def _split_merge(vocabulary: _Vocabulary, i: int, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not {left, right, left + right} <= vocabulary.ids.keys():
        vocabulary.fail("merges", f"entry {i}, {merge!r}, does not join two tokens to a third")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    v = vocabulary
    scores = v.numbers("scores", np.floating)
    if not np.isfinite(scores).all():
        v.fail("scores", "must be finite")
    unknown = v.token_id("unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=v.ids,
            merges=_merges_of_scores(v, scores),
            unk_token=None if unknown is None else v.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = v.get("add_space_prefix", bool, True)
    escape = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefix else escape
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return _finish(v, backend, add_bos=True)


def _merges_of_scores(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for.

    SentencePiece joins the neighbors whose union is the token of the highest score. As a list of
    merges that is: the pairs of tokens that make a token, in the order of its score. Of the
    pairs that make the same token, the ones with a longer left part come first.
    """
    ids = {token: vocabulary.ids[token] for token in vocabulary.of_type(_NORMAL, _UNUSED)}
    merges = []
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    return merges


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
