"""What files call the parameters of the decoder."""

from __future__ import annotations

import re

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
    "mlp_post_norm/scale": ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
}

# Where there is a norm after attention, Hugging Face needs another name for the one before the MLP.
_BEFORE_MLP = "pre_feedforward_layernorm.weight"


def gguf_name(path: str) -> str:
    """Returns the GGUF name of a parameter of the unrolled decoder.

    >>> gguf_name("layers_3/attention/q/kernel")
    'blk.3.attn_q.weight'
    """
    layer, rest = _split(path)
    return _TOP[path][0] if layer is None else f"blk.{layer}.{_LAYER[rest][0]}"


def hf_name(path: str, post_norms: bool) -> str:
    """Returns the Hugging Face name of a parameter of the unrolled decoder.

    >>> hf_name("layers_3/mlp_norm/scale", post_norms=False)
    'model.layers.3.post_attention_layernorm.weight'
    """
    layer, rest = _split(path)
    if layer is None:
        return _TOP[path][1]
    name = _BEFORE_MLP if post_norms and rest == "mlp_norm/scale" else _LAYER[rest][1]
    return f"model.layers.{layer}.{name}"


def _split(path: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"layers_(\d+)/(.+)", path)
    return (match[1], match[2]) if match else (None, path)
