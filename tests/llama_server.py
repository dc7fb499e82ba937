"""llama.cpp's server in this process, from the package xllamacpp: the judge of slow tests."""

import json
import os
import urllib.request

import pytest


class LlamaServer:
    """A GGUF file served by llama.cpp; skips the test where the extra `peers` is not installed."""

    def __init__(self, path, n_ctx=64):
        xllamacpp = pytest.importorskip("xllamacpp", reason="needs the extra `peers`")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = n_ctx
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = 0
        params.port = 0
        params.fit_params = False
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = os.cpu_count()
        self.server = xllamacpp.Server(params)

    def post(self, route, **body):
        request = urllib.request.Request(
            self.server.listening_address + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text):
        answer = self.post("/tokenize", content=text, add_special=True, parse_special=True)
        return answer["tokens"]

    def complete(self, ids, n_predict, n_probs):
        body = {"prompt": ids, "n_predict": n_predict, "n_probs": n_probs, "temperature": 0}
        answer = self.post("/completion", **body)
        return [
            {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
            for step in answer["completion_probabilities"]
        ]
