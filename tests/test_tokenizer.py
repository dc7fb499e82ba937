"""Tokenizers built from GGUF metadata, against ids that llama.cpp gave."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from llama_server import LlamaServer
from tokenizers import models, pre_tokenizers, trainers

from qjax.io import gguf
from qjax.models import tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXT = (
    "It's we'll I'D THEY'RE 1234567 12,345.67  def f(x):\n\treturn x**2  # naïve\r\n\r\n\n"
    "Привет мир 日本語 ½ ٣٤٥ ... --- $100+50% <a href='b'>c</a>   \n  end. "
)


def sentencepiece(**changes):
    """The metadata of the golden model: 256 bytes, some letters, scores."""
    metadata = dict(gguf.read(GOLDEN / "tiny_llama_q4_k_m.gguf").metadata)
    return change(metadata, changes)


def byte_level(pre="gpt-2", **changes):
    """A vocabulary trained without words, so that its merges run across what `pre` cuts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    backend.train_from_iterator([TEXT, TEXT[::-1], TEXT.lower(), TEXT[7:]] * 2, trainer)
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(tokens) - 1), np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    return change(metadata, changes)


def change(metadata, changes):
    for key, value in changes.items():
        name = f"tokenizer.ggml.{key}"
        if value is None:
            del metadata[name]
        else:
            metadata[name] = value
    return metadata


def test_sentencepiece_ids_are_those_of_llama_cpp():
    ours = tokenizer.from_gguf(sentencepiece())
    for text, ids in json.loads((GOLDEN / "tiny_llama.json").read_text())["ids"].items():
        assert ours.encode(text) == ids, repr(text)


def test_special_ids():
    ours = tokenizer.from_gguf(sentencepiece())
    assert (ours.bos_id, ours.eos_id, ours.stop_ids, ours.vocab_size) == (1, 2, (2,), 264)
    ours = tokenizer.from_gguf(byte_level(eot_token_id=5))
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (0, 0, (0, 5))


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
@pytest.mark.parametrize("text", [TEXT, "", " ", "  a  b ", "\n\n", "🎉 naïve \x00 \u200d"])
def test_texts_come_back(make, text):
    ours = tokenizer.from_gguf(make())
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_are_added_or_not():
    plain = tokenizer.from_gguf(sentencepiece())
    both = tokenizer.from_gguf(sentencepiece(add_eos_token=True))
    none = tokenizer.from_gguf(sentencepiece(add_bos_token=False))
    bare = plain.encode("ab", add_special=False)
    assert plain.encode("ab") == [1, *bare]
    assert both.encode("ab") == [1, *bare, 2]
    assert none.encode("ab") == bare
    assert plain.decode([1, *bare, 2]) == "ab"
    assert plain.decode([1, *bare, 2], skip_special=False).endswith("ab</s>")


def test_a_space_may_be_put_before_the_text():
    with_space = tokenizer.from_gguf(sentencepiece()).encode("ab", add_special=False)
    without = tokenizer.from_gguf(sentencepiece(add_space_prefix=False))
    assert without.encode("ab", add_special=False) == with_space[1:]
    assert without.encode(" ab", add_special=False) == with_space


def test_broken_utf8_decodes_to_the_replacement_character():
    ours = tokenizer.from_gguf(sentencepiece())
    ids = ours.encode("é", add_special=False)
    assert ours.decode(ids[:-1]) == "\ufffd"


def test_unused_tokens_are_ids_like_others():
    types = np.array(byte_level()["tokenizer.ggml.token_type"])
    types[-1] = 5
    ours = tokenizer.from_gguf(byte_level(token_type=types))
    assert ours.vocab_size == len(types)
    assert ours.decode([len(types) - 1]) != ""


def test_decode_refuses_ids_outside_the_vocabulary():
    ours = tokenizer.from_gguf(sentencepiece())
    for ids in ([264], [-1], [3, 1 << 40]):
        with pytest.raises(ValueError, match="the vocabulary has 264 tokens"):
            ours.decode(ids)


TYPES = np.array(byte_level()["tokenizer.ggml.token_type"])
BROKEN = [
    (byte_level, {"model": "bert"}, "'tokenizer.ggml.model': the tokenizer 'bert' is not known"),
    (byte_level, {"model": None}, "'tokenizer.ggml.model': is missing"),
    (byte_level, {"pre": "cl100k"}, "the pre-tokenizer 'cl100k' is not known, known are default"),
    (byte_level, {"pre": None}, "'tokenizer.ggml.pre': is missing"),
    (byte_level, {"tokens": None}, "'tokenizer.ggml.tokens': is missing"),
    (byte_level, {"tokens": []}, "'tokenizer.ggml.tokens': is empty"),
    (byte_level, {"tokens": "abc"}, "'tokenizer.ggml.tokens': is of type str, must be list"),
    (byte_level, {"tokens": ["a", "b", "a"]}, "'tokenizer.ggml.tokens': the token 'a' appears"),
    (byte_level, {"token_type": TYPES[:-1]}, r"'tokenizer.ggml.token_type': has \d+ entries"),
    (byte_level, {"token_type": TYPES + 9}, "'tokenizer.ggml.token_type': must be 0 to 6"),
    (byte_level, {"token_type": TYPES * 1.0}, "'tokenizer.ggml.token_type': is an array of"),
    (byte_level, {"merges": ["ab"]}, "'tokenizer.ggml.merges': entry 0, 'ab', does not join"),
    (byte_level, {"merges": ["a nope"]}, "entry 0, 'a nope', does not join two tokens"),
    (byte_level, {"bos_token_id": 600}, "'tokenizer.ggml.bos_token_id': is 600, the vocabulary"),
    (byte_level, {"eos_token_id": "2"}, "'tokenizer.ggml.eos_token_id': is of type str"),
    (byte_level, {"add_bos_token": 1}, "'tokenizer.ggml.add_bos_token': is of type int"),
    (byte_level, {"add_bos_token": True, "bos_token_id": None}, "bos_token_id': is missing, but"),
    (sentencepiece, {"scores": None}, "'tokenizer.ggml.scores': is missing"),
    (sentencepiece, {"scores": np.full(264, np.nan, np.float32)}, "scores': must be finite"),
    (sentencepiece, {"scores": np.zeros(3, np.float32)}, "scores': has 3 entries for 264"),
]


@pytest.mark.parametrize(("make", "changes", "message"), BROKEN)
def test_broken_metadata_is_refused(make, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.from_gguf(make(**changes), "some.gguf")
    assert str(caught.value).startswith("some.gguf: key 'tokenizer.ggml.")


def write_model(path, metadata):
    """A llama of one tiny layer around a vocabulary, so that llama.cpp loads it."""
    import gguf as peer

    writer = peer.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
    vocab = len(metadata["tokenizer.ggml.tokens"])
    shapes = {"token_embd": (vocab, 32), "output_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    shapes |= {"blk.0.attn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("pre", tokenizer.PRE_TOKENIZERS)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(pre, tmp_path):
    path = tmp_path / "vocabulary.gguf"
    metadata = byte_level(pre)
    write_model(path, metadata)
    theirs = LlamaServer(path)
    ours = tokenizer.from_gguf(metadata)
    rng = np.random.default_rng(0)
    random = ["".join(rng.choice(list(TEXT), rng.integers(1, 50))) for _ in range(200)]
    for text in (TEXT, "", " ", "\n \n", "<|end|>a<|end|>", *random):
        assert ours.encode(text) == theirs.tokenize(text), repr(text)


def test_a_tokenizer_json_is_read():
    ours = tokenizer.from_file(GOLDEN / "hf/llama/tokenizer.json", bos="<bos>", eos="<eos>")
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (0, 1, (1,))
    assert ours.decode(ours.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Nope"}}', "[" * 99_999])
def test_a_broken_tokenizer_json_is_refused(text, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tokenizer.from_file(path, bos=None, eos=None)


def test_a_special_token_outside_the_vocabulary_is_refused():
    path = GOLDEN / "hf/llama/tokenizer.json"
    with pytest.raises(ValueError, match="the eos token '</s>' is not in the vocabulary"):
        tokenizer.from_file(path, bos=None, eos="</s>")
