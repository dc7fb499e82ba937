"""Writes tests/golden/tiny_llama.json: what llama.cpp makes of tiny_llama_q4_k_m.gguf.

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
PROMPT = np.random.default_rng(0).integers(3, 264, 16).tolist()
TEXTS = [
    "Hello, world! 42\n\tnaïve 🎉 <s>x</s>",
    "  two  spaces ",
    "",
    "abcd abcd <unk> <0x0A>",
]


def float_copy(path):
    source = gguf.GGUFReader(MODEL)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def main():
    with tempfile.TemporaryDirectory() as folder:
        float_copy(pathlib.Path(folder) / "float.gguf")
        server = serve(pathlib.Path(folder) / "float.gguf")
        ids = {
            text: post(server, "/tokenize", content=text, add_special=True, parse_special=True)
            for text in TEXTS
        }
        result = {
            "prompt": PROMPT,
            "log_probabilities": [
                log_probabilities(server, PROMPT[: i + 1]) for i in range(len(PROMPT))
            ],
            "ids": {text: answer["tokens"] for text, answer in ids.items()},
        }
    (HERE / "tiny_llama.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
