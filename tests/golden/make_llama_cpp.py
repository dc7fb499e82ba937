"""Writes tests/golden/tiny_llama.json: what llama.cpp makes of tiny_llama_q4_k_m.gguf.

The same for `tiny_experts_*.gguf`, mixtures of experts that are written here: the tokenizer of
tiny_llama and random weights, quantized by gguf-py.

Log-probabilities of all tokens after each prefix of a prompt, from a float32 copy of the weights
that gguf-py dequantized; and the ids of some texts. Run once, with xllamacpp 2026.10.11549 and gguf
0.19.0::

    python tests/golden/make_llama_cpp.py
"""

import json
import pathlib
import tempfile
import urllib.request

import gguf
import numpy as np
import xllamacpp

HERE = pathlib.Path(__file__).parent
MODEL = HERE / "tiny_llama_q4_k_m.gguf"
EXPERTS = {"mixtral": "llama", "qwen3moe": "qwen3moe"}
PROMPT = np.random.default_rng(0).integers(3, 264, 16).tolist()
TEXTS = [
    "Hello, world! 42\n\tnaïve 🎉 <s>x</s>",
    "  two  spaces ",
    "",
    "abcd abcd <unk> <0x0A>",
]


def copy_keys(source, writer, only=""):
    for name, field in source.fields.items():
        if name.startswith(only) and not name.startswith(("GGUF.", "general.architecture")):
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def float_copy(model, path):
    source = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, source.fields["general.architecture"].contents())
    copy_keys(source, writer)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    finish(writer)


def write_experts(path, architecture):
    """One layer, 64 wide, four experts of which two answer; the head is tied."""
    writer = gguf.GGUFWriter(path, architecture)
    copy_keys(gguf.GGUFReader(MODEL), writer, only="tokenizer.")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(96)
    rng = np.random.default_rng(1)

    def norm(name, size):
        writer.add_tensor(name, (1 + 0.2 * rng.normal(size=size)).astype(np.float32))

    def weight(name, *shape, kind="Q8_0"):
        w = (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)

    weight("token_embd.weight", 264, 64)
    norm("output_norm.weight", 64)
    norm("blk.0.attn_norm.weight", 64)
    norm("blk.0.ffn_norm.weight", 64)
    weight("blk.0.attn_q.weight", 64, 64)
    weight("blk.0.attn_k.weight", 32, 64)
    weight("blk.0.attn_v.weight", 32, 64)
    weight("blk.0.attn_output.weight", 64, 64)
    if architecture == "qwen3moe":
        norm("blk.0.attn_q_norm.weight", 16)
        norm("blk.0.attn_k_norm.weight", 16)
    weight("blk.0.ffn_gate_inp.weight", 4, 64, kind="F32")
    weight("blk.0.ffn_gate_exps.weight", 4, 96, 64, kind="Q4_0")
    weight("blk.0.ffn_up_exps.weight", 4, 96, 64, kind="Q4_0")
    weight("blk.0.ffn_down_exps.weight", 4, 64, 96, kind="Q5_1")
    finish(writer)


def serve(path):
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.verbosity = 0
    params.port = 0
    params.fit_params = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def post(server, route, **body):
    head = {"Content-Type": "application/json"}
    url = server.listening_address + route
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def log_probabilities(server, ids):
    # The bias makes every sampled token one that is printed, else the server keeps the
    # probabilities back; they are those before the bias.
    body = {"prompt": ids, "n_predict": 1, "n_probs": 264, "temperature": 0}
    answer = post(server, "/completion", **body, logit_bias=[[260, 1000]])
    (step,) = answer["completion_probabilities"]
    found = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
    return [round(found[i], 6) for i in range(264)]


def predictions(server):
    """Log-probabilities after each prefix of PROMPT."""
    return [log_probabilities(server, PROMPT[: i + 1]) for i in range(len(PROMPT))]


def run_experts(folder, name):
    model = HERE / f"tiny_experts_{name}.gguf"
    write_experts(model, EXPERTS[name])
    float_copy(model, folder / f"{name}.gguf")
    found = np.asarray(predictions(serve(folder / f"{name}.gguf")), np.float32)
    np.savez_compressed(model.with_suffix(".npz"), prompt=PROMPT, log_probabilities=found)


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name in EXPERTS:
            run_experts(folder, name)
        float_copy(MODEL, folder / "float.gguf")
        server = serve(folder / "float.gguf")
        ids = {
            text: post(server, "/tokenize", content=text, add_special=True, parse_special=True)
            for text in TEXTS
        }
        result = {
            "prompt": PROMPT,
            "log_probabilities": predictions(server),
            "ids": {text: answer["tokens"] for text, answer in ids.items()},
        }
    (HERE / "tiny_llama.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
