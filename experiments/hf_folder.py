"""A llama-shaped model as a folder that transformers reads: what the peers are given."""

import json
import pathlib
from typing import Any

import numpy as np

from qjax import models
from qjax.io import safetensors

NAMES = {  # of transformers, by ours
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def write(folder: pathlib.Path, config: models.Config, floats: Any, tokens: np.ndarray) -> None:
    """config.json, model.safetensors in float32, and tokens.npy."""
    rope = config.rope
    assert rope is not None
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": rope.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    params = floats["params"]
    tensors = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    for i in range(config.num_layers):
        layer, prefix = params[f"layers_{i}"], f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
        for name, other in NAMES.items():
            part, leaf = name.split("/")
            tensors[f"{prefix}.{other}.weight"] = layer[part][leaf]["kernel"].T
    (folder / "config.json").write_text(json.dumps(described))
    arrays = {n: np.ascontiguousarray(v, np.float32) for n, v in tensors.items()}
    safetensors.write(folder / "model.safetensors", arrays, {"format": "pt"})
    np.save(folder / "tokens.npy", tokens)
