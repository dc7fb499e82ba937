"""What files call the parameters of the decoder, and how their rows lie there."""

from __future__ import annotations

import re

import numpy as np

from qjax.models.architecture import Config

_TOP = {
    "embed/embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "norm/scale": ("output_norm.weight", "model.norm.weight"),
    "head/kernel": ("output.weight", "lm_head.weight"),
}

_LAYER = {
    "attention_norm/scale": ("attn_norm.weight", "input_layernorm.weight"),
    "attention/q/kernel": ("attn_q.weight", "self_attn.q_proj.weight"),
    "attention/k/kernel": ("attn_k.weight", "self_attn.k_proj.weight"),
    "attention/v/kernel": ("attn_v.weight", "self_attn.v_proj.weight"),
    "attention/o/kernel": ("attn_output.weight", "self_attn.o_proj.weight"),
    "attention/q/bias": ("attn_q.bias", "self_attn.q_proj.bias"),
    "attention/k/bias": ("attn_k.bias", "self_attn.k_proj.bias"),
    "attention/v/bias": ("attn_v.bias", "self_attn.v_proj.bias"),
    "attention/q_norm/scale": ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    "attention/k_norm/scale": ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    "attention_post_norm/scale": ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    "mlp_norm/scale": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "mlp/gate/kernel": ("ffn_gate.weight", "mlp.gate_proj.weight"),
    "mlp/up/kernel": ("ffn_up.weight", "mlp.up_proj.weight"),
    "mlp/down/kernel": ("ffn_down.weight", "mlp.down_proj.weight"),
    "mlp/router/kernel": ("ffn_gate_inp.weight", "mlp.gate.weight"),
    "mlp/experts/gate/kernel": ("ffn_gate_exps.weight", "mlp.experts.{}.gate_proj.weight"),
    "mlp/experts/up/kernel": ("ffn_up_exps.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp/experts/down/kernel": ("ffn_down_exps.weight", "mlp.experts.{}.down_proj.weight"),
    "mlp_post_norm/scale": ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
}

# Where Hugging Face has names of its own for a family. In gemma3 there is a norm after attention,
# so the one before the MLP cannot be called after it.
_HF: dict[str, dict[str, str]] = {
    "gemma3_text": {"mlp_norm/scale": "pre_feedforward_layernorm.weight"},
    "mixtral": {
        "mlp/router/kernel": "block_sparse_moe.gate.weight",
        "mlp/experts/gate/kernel": "block_sparse_moe.experts.{}.w1.weight",
        "mlp/experts/up/kernel": "block_sparse_moe.experts.{}.w3.weight",
        "mlp/experts/down/kernel": "block_sparse_moe.experts.{}.w2.weight",
    },
}


def gguf_name(path: str) -> str:
    """Returns the GGUF name of a parameter of the unrolled decoder.

    >>> gguf_name("layers_3/attention/q/kernel")
    'blk.3.attn_q.weight'
    """
    layer, rest = _split(path)
    return _TOP[path][0] if layer is None else f"blk.{layer}.{_LAYER[rest][0]}"


def hf_name(path: str, family: str) -> str:
    """Returns the Hugging Face name of a parameter of the unrolled decoder.

    The `family` is the ``model_type`` of ``config.json``. Experts are a tensor each: their name has
    a place ``{}`` for the expert's number.

    >>> hf_name("layers_3/mlp_norm/scale", "llama")
    'model.layers.3.post_attention_layernorm.weight'
    >>> hf_name("layers_3/mlp/experts/up/kernel", "mixtral").format(7)
    'model.layers.3.block_sparse_moe.experts.7.w3.weight'
    """
    layer, rest = _split(path)
    if layer is None:
        return _TOP[path][1]
    name = _HF.get(family, {}).get(rest, _LAYER[rest][1])
    return f"model.layers.{layer}.{name}"


def rope_factors(architecture: str | None) -> str | None:
    """The tensor of a GGUF file that is a constant of its rotary embeddings, no parameter."""
    return "rope_freqs.weight" if architecture == "llama" else None


def permuted_rows(path: str, config: Config) -> np.ndarray | None:
    """Where the rows of q and k lie in a llama GGUF file.

    Its heads interleave the two halves that rotary embeddings pair: row 2 i of a head is our row i,
    row 2 i + 1 is our row i + head_dim / 2. Whole rows move, so quantized blocks stay intact.
    """
    match = re.fullmatch(r"layers_\d+/attention/([qk])/(kernel|bias)", path)
    if match is None:
        return None
    heads = config.num_heads if match[1] == "q" else config.num_kv_heads
    rows = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _split(path: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"layers_(\d+)/(.+)", path)
    return (match[1], match[2]) if match else (None, path)
