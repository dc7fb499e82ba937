"""A decoder as a Hugging Face folder: what transformers, and so the peers, are given."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from qjax.io import safetensors
from qjax.models import Config, names


def write(folder: pathlib.Path, config: Config, params: Any, dtype: DTypeLike) -> None:
    """config.json and model.safetensors of a llama or mixtral, in this dtype."""
    assert config.rope is not None
    family = "mixtral" if config.num_experts else "llama"
    tensors: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params["params"]):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        value = np.asarray(leaf, dtype)
        value = np.swapaxes(value, -1, -2) if path.endswith("/kernel") else value
        name = names.hf_name(path, family)
        parts = {name.format(i): v for i, v in enumerate(value)} if "{}" in name else {name: value}
        tensors |= parts
    settings = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": np.dtype(dtype).name,
    }
    if config.num_experts:
        settings |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "sliding_window": None,
        }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / safetensors.SINGLE, tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
