"""Real checkpoints: tokens, log-probabilities and greedy text against llama.cpp.

`QJAX_TEST_MODELS` names a folder with the GGUF files of `MODELS`; llama.cpp comes with the package
`xllamacpp`. llama.cpp runs a float32 copy of the weights that gguf-py dequantized, with a float32
KV cache and without flash attention, so both sides compute the same function. What was measured is
logged: add ``-o log_cli=true --log-cli-level=INFO``.
"""

# ruff: noqa: RUF001

import logging
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_server import LlamaServer

import qjax
import qjax.models
from qjax.io import gguf
from qjax.models import tokenizer

MODELS = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
)
PROMPT = (
    "The lighthouse keeper wrote in his journal every evening. In 1887 he noted that the storm had "
    "lasted for three days, and that the lamp"
)
LONG = 700  # tokens, past Gemma 3's window of 512; the text is this project's own source
TOLERANCE = 0.01  # nat, on every log-probability that is compared
COMPARED = 200  # the most likely tokens after each prefix
GREEDY = 24
ROUNDED = 0.5  # nat: llama.cpp rounds activations to Q8_0 where it multiplies blocks

LOG = logging.getLogger(__name__)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request):
    folder = os.environ.get("QJAX_TEST_MODELS")
    if folder is None:
        pytest.skip("QJAX_TEST_MODELS is not set to a folder with GGUF files")
    path = pathlib.Path(folder) / request.param
    if not path.exists():
        pytest.skip(f"QJAX_TEST_MODELS has no {request.param}")
    return path


def write_floats(checkpoint, path):
    """The checkpoint with every tensor in float32, dequantized and written by gguf-py."""
    import gguf as peer

    source = peer.GGUFReader(checkpoint)
    writer = peer.GGUFWriter(path, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, element = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
    for tensor in source.tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape[::-1].tolist(), np.dtype(np.float32), 4 * tensor.n_elements
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in source.tensors:
        writer.write_tensor_data(peer.dequantize(tensor.data, tensor.tensor_type))
    writer.close()


@pytest.fixture
def float_copy(checkpoint, tmp_path):
    path = tmp_path / "float.gguf"
    write_floats(checkpoint, path)
    yield path
    path.unlink()


def dense(leaf):
    return qjax.dequantize(leaf) if qjax.is_qtensor(leaf) else leaf


def test_logits_and_greedy_tokens(checkpoint, float_copy):
    model, qparams, tokens = qjax.models.load(checkpoint)
    params = jax.tree.map(dense, qparams, is_leaf=qjax.is_qtensor)
    ids = tokens.encode(PROMPT)
    judge = LlamaServer(float_copy, n_ctx=1024)
    assert ids == judge.tokenize(PROMPT)

    def difference(prefix, logits):
        ours = np.asarray(jax.nn.log_softmax(logits))
        (theirs,) = judge.complete(prefix, n_predict=1, n_probs=COMPARED)
        assert len(theirs) == COMPARED
        return float(np.abs(ours[list(theirs)] - np.array(list(theirs.values()))).max())

    logits = jax.jit(model.apply)(params, jnp.asarray([ids]))[0]
    short = max(difference(ids[: i + 1], logits[i]) for i in range(len(ids)))
    text = tokens.encode(pathlib.Path(gguf.__file__).read_text())[:LONG]
    assert len(text) == LONG
    logits = jax.jit(model.apply)(params, jnp.asarray([text]), last=jnp.int32(LONG - 1))
    long = difference(text, logits[0, 0])
    LOG.info("%s: %.2e nat over %d prefixes", checkpoint.name, short, len(ids))
    LOG.info("%s: %.2e nat after %d tokens", checkpoint.name, long, LONG)
    assert max(short, long) < TOLERANCE

    steps = judge.complete(ids, n_predict=GREEDY, n_probs=1)
    theirs = [next(iter(step)) for step in steps]
    generate = qjax.models.generator(model.apply, model.config, max_new_tokens=GREEDY)
    assert generate(params, [ids]).tokens[0, : len(theirs)].tolist() == theirs


def test_native_codes_give_the_logits_of_the_dequantized_model(checkpoint):
    model, qparams, tokens = qjax.models.load(checkpoint)
    ids = jnp.asarray([tokens.encode(PROMPT)])
    native = jax.jit(qjax.quantized(model.apply))(qparams, ids)
    params = jax.tree.map(dense, qparams, is_leaf=qjax.is_qtensor)
    expected = jax.jit(model.apply)(params, ids)
    error = jnp.max(jnp.abs(native - expected)) / jnp.max(jnp.abs(expected))
    LOG.info("%s: relative error %.1e", checkpoint.name, error)
    assert error < 1e-5


def test_a_checkpoint_is_written_byte_for_byte(checkpoint, tmp_path):
    _, params, _ = qjax.models.load(checkpoint)
    qjax.models.save_gguf(tmp_path / "again.gguf", params, checkpoint)
    assert (tmp_path / "again.gguf").read_bytes() == checkpoint.read_bytes()
    (tmp_path / "again.gguf").unlink()


@pytest.mark.parametrize("spec", ["q8_0", "q4_0"])
def test_llama_cpp_runs_what_was_quantized_and_written(checkpoint, spec, tmp_path):
    model, params, tokens = qjax.models.load(checkpoint)
    params = jax.tree.map(dense, params, is_leaf=qjax.is_qtensor)
    sites = qjax.find_sites(model.apply, params, jnp.zeros((1, 2), jnp.int32))
    qparams = qjax.quantize_params(params, spec, sites)
    path = tmp_path / "written.gguf"
    qjax.models.save_gguf(path, qparams, checkpoint)
    write_floats(path, tmp_path / "float.gguf")
    ids = tokens.encode(PROMPT)
    logits = jax.jit(qjax.quantized(model.apply))(qparams, jnp.asarray([ids]))[0]

    def difference(judge, count):
        (theirs,) = judge.complete(ids, n_predict=1, n_probs=count)
        ours = np.asarray(jax.nn.log_softmax(logits[-1]))
        return float(np.abs(ours[list(theirs)] - np.array(list(theirs.values()))).max())

    exact = difference(LlamaServer(tmp_path / "float.gguf", n_ctx=1024), COMPARED)
    judge = LlamaServer(path, n_ctx=1024)
    assert judge.tokenize(PROMPT) == ids
    rounded = difference(judge, 20)
    LOG.info("%s in %s: %.1e nat, %.2f in blocks", checkpoint.name, spec, exact, rounded)
    for used in tmp_path.glob("*.gguf"):
        used.unlink()
    assert exact < TOLERANCE
    assert rounded < ROUNDED


TEXTS = (
    "Hello world!  123 4567\n\n\t def f(x):   return x**2  # naïve 🎉 日本語\n abcd",
    "<|im_start|>user\nHi<|im_end|> <end_of_turn>\n<bos><eos> <unk> <0x0A>",
    "",
    "  ",
    " a",
    "a ",
    "\n",
    "\n\n\n a\r\n\r\n  b\t\tc",
    "It's we'll I'D THEY'RE can't 'tis 'S",
    "1234567890 1,234,567.89 ٣٤٥ ½ Ⅷ 四十二 0x7f 1e-5",
    "ﬁ ｆｕｌｌ Ａ é e\u0301 ñ n\u0303 Å A\u030a",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ☃️ \U0001f600\U000e0041 ᄀ\u1161\u11a8",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا नमस्ते สวัสดี 안녕하세요 こんにちは",
    '<div class="x">\n\t<p>a&nbsp;b</p>\n</div>',
    "aaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbb hahahahahahahaha ooooooooo AaAaAaA",
    'x = [i for i in range(10)] # why\nif (a&&b||!c) { return "s\\n"; }',
    "\x00\x01\x7f\u200b\u200d\ufeff\u2028 \u00a0 \u3000 x",
    "$100 + 50% = #1 @home ~/path/to_file.txt C:\\x ^_^ `code` |a|b| ......... ------",
)


def random_texts(count):
    rng = np.random.default_rng(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x180), (0x370, 0x460), (0x5D0, 0x5EA), (0x900, 0x970)]
    ranges += [(0x2000, 0x2070), (0x3040, 0x30FF), (0x4E00, 0x4E80), (0x1F300, 0x1F650)]
    pool = [chr(c) for r in ranges for c in range(*r)] + list(" " * 99 + "\n\t\r" * 9)
    pool += list("0123456789'sStTdDlLrRvVeEmM" * 5)
    return ["".join(rng.choice(pool, rng.integers(1, 60))) for _ in range(count)]


def test_token_ids(checkpoint):
    ours = tokenizer.from_gguf(gguf.read(checkpoint).metadata, str(checkpoint))
    judge = LlamaServer(checkpoint, n_ctx=1024)
    source = pathlib.Path(gguf.__file__).read_text()
    for text in (*TEXTS, source, *random_texts(200)):
        assert ours.encode(text) == judge.tokenize(text), repr(text)
