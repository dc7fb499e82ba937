"""What a checkpoint says of its architecture, validated and turned into a `Config`.

Each reader takes the keys of one kind of file, GGUF metadata or ``config.json``. A value of the
wrong type or out of range, and a feature that the decoder does not have, is a ``ValueError`` that
names the file and the key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from qjax.models.architecture import Config, Rope, llama3_factors

_MAX_LAYERS = 1 << 12
_MAX_HEAD_DIM = 1 << 12
_MAX_EXPERTS = 1 << 12
_MAX_SIZE = 1 << 24


class _Keys:
    """The keys of a file; every value is checked as it is read."""

    def __init__(self, values: Mapping[str, Any], path: str, prefix: str = ""):
        self.values, self.path, self.prefix = values, path, prefix

    def fail(self, key: str, message: str) -> NoReturn:
        raise ValueError(f"{self.path}: key {self.prefix + key!r}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, with a missing one and JSON's null both as `default`."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(
        self, key: str, default: int | None = None, high: int = _MAX_SIZE, low: int = 1
    ) -> int:
        value = self.get(key, default)
        if value is None:
            self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"is {_short(value)}, must be an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"is {_short(value)}, must be a number")
        if not 0 < value < math.inf:
            self.fail(key, f"is {_short(value)}, must be positive and finite")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"is {_short(value)}, must be true or false")
        return value

    def one_of(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        value = self.get(key, default)
        if value is None:
            self.fail(key, f"is missing, must be one of {', '.join(choices)}")
        if not isinstance(value, str) or value not in choices:
            self.fail(key, f"is {_short(value)}; only {', '.join(choices)} can be run")
        return value

    def table(self, key: str) -> _Keys | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"is {_short(value)}, must be an object")
        prefix = f"{self.prefix}{key}."
        return _Keys({prefix + name: inner for name, inner in value.items()}, self.path, prefix)

    def refuse(self, key: str, *allowed: Any) -> None:
        """The key asks for something that the decoder does not have, unless it is `allowed`."""
        value = self.get(key)
        if value is None or (not isinstance(value, np.ndarray) and value in allowed):
            return
        self.fail(key, f"is {_short(value)}, which the decoder does not have")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sizes(keys: _Keys, names: Mapping[str, str], head_dim: int | None = None) -> dict[str, Any]:
    """The sizes of a model, under the `names` that a file gives them."""
    hidden = keys.integer(names["hidden_size"])
    heads = keys.integer(names["num_heads"])
    if head_dim is None and hidden % heads == 0:
        head_dim = hidden // heads
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.integer(names["intermediate_size"]),
        "num_layers": keys.integer(names["num_layers"], high=_MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": keys.integer(names["num_kv_heads"], default=heads),
        "head_dim": keys.integer(names["head_dim"], default=head_dim, high=_MAX_HEAD_DIM),
        "max_length": keys.integer(names["max_length"]),
    }


def _build(path: str, **fields: Any) -> Config:
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


_GGUF_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_length": "context_length",
}

# Gemma 3 27B, known by its number of layers, scales attention by the width per head, not head_dim.
_GEMMA3_27B_LAYERS = 62


def from_gguf(
    metadata: Mapping[str, Any],
    path: str,
    *,
    vocab_size: int,
    tensors: Collection[str],
    rope_factors: np.ndarray | None = None,
) -> Config:
    """Reads the architecture from GGUF metadata.

    Args:
      metadata: of `qjax.io.gguf.read`.
      path: for error messages.
      vocab_size: rows of the embedding.
      tensors: names of the file's tensors: a head of its own and biases show there alone.
      rope_factors: the tensor ``rope_freqs.weight``, where there is one.
    """
    top = _Keys(metadata, path)
    architecture = top.one_of("general.architecture", _GGUF)
    if top.integer("split.count", 1) != 1:
        top.fail("split.count", "the model is split over several files; merge them into one first")
    keys = _Keys(metadata, path, f"{architecture}.")
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "expert_shared_count"):
        keys.refuse(key, 0)
    keys.refuse("expert_gating_func", 0, 1)  # 1: softmax; 0: the architecture's own, the same
    keys.refuse("expert_weights_scale", 0, 1)
    if architecture not in ("llama", "qwen3moe"):
        keys.refuse("expert_count", 0)
    sizes = _GGUF_SIZES
    if architecture == "qwen3moe":
        sizes = sizes | {"intermediate_size": "expert_feed_forward_length"}
    fields = _sizes(keys, sizes)
    head_dim = fields["head_dim"]
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.refuse(key, head_dim)
    factors = None
    if rope_factors is not None:
        if rope_factors.shape != (head_dim // 2,) or not np.all(np.isfinite(1 / rope_factors)):
            raise ValueError(
                f"{path}: tensor 'rope_freqs.weight' must hold head_dim / 2 = {head_dim // 2} "
                f"finite divisors, has shape {rope_factors.shape}"
            )
        factors = tuple(map(float, rope_factors))
    fields |= {
        "vocab_size": vocab_size,
        "norm_epsilon": keys.number("attention.layer_norm_rms_epsilon"),
        "rope": Rope(keys.number("rope.freq_base", 10_000.0), _gguf_rope_factor(keys), factors),
        "tied": "output.weight" not in tensors,
    }
    return _build(path, **fields | _GGUF[architecture](keys, fields, tensors))


def _gguf_rope_factor(keys: _Keys) -> float:
    if keys.one_of("rope.scaling.type", ("none", "linear"), default="linear") == "none":
        return 1.0
    return keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))


def _gguf_llama(keys: _Keys, fields: Mapping, tensors: Collection[str]) -> dict[str, Any]:
    mixtral = keys.integer("expert_count", 0, low=0) > 0
    experts = _experts(keys, "expert_count", "expert_used_count") if mixtral else {}
    return {"qkv_bias": "blk.0.attn_q.bias" in tensors} | experts


def _gguf_qwen2(keys: _Keys, fields: Mapping, tensors: Collection[str]) -> dict[str, Any]:
    return {"qkv_bias": True}


def _gguf_qwen3(keys: _Keys, fields: Mapping, tensors: Collection[str]) -> dict[str, Any]:
    return {"qk_norm": True}


def _gguf_qwen3moe(keys: _Keys, fields: Mapping, tensors: Collection[str]) -> dict[str, Any]:
    return {"qk_norm": True} | _experts(keys, "expert_count", "expert_used_count")


def _experts(
    keys: _Keys,
    number: str,
    chosen: str,
    default_number: int | None = None,
    default_chosen: int | None = None,
) -> dict[str, Any]:
    """How many experts there are and how many a token goes to, under the keys of a file."""
    return {
        "num_experts": keys.integer(number, default_number, high=_MAX_EXPERTS),
        "experts_per_token": keys.integer(chosen, default_chosen, high=_MAX_EXPERTS),
    }


def _gguf_gemma3(keys: _Keys, fields: Mapping, tensors: Collection[str]) -> dict[str, Any]:
    layers, hidden, heads = fields["num_layers"], fields["hidden_size"], fields["num_heads"]
    width = hidden / heads if layers == _GEMMA3_27B_LAYERS else fields["head_dim"]
    pattern = keys.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray) and pattern.dtype == np.bool_ and len(pattern) == layers:
        local = tuple(pattern.tolist())
    else:
        local = _every(keys.integer("attention.sliding_window_pattern", 6), layers)
    return _gemma3(fields, local) | {
        "sliding_window": keys.integer("attention.sliding_window"),
        "local_rope": Rope(keys.number("rope.freq_base_swa", 10_000.0)),
        "query_scale": width**-0.5,
    }


def _gemma3(fields: Mapping[str, Any], local: tuple[bool, ...]) -> dict[str, Any]:
    return {
        "local_layers": local,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "activation": "gelu_tanh",
        "qk_norm": True,
        "post_norms": True,
    }


def _every(period: int, layers: int) -> tuple[bool, ...]:
    """Every `period`-th layer is global, the others are local."""
    return tuple((i + 1) % period != 0 for i in range(layers))


_GGUF: dict[str, Callable[..., dict[str, Any]]] = {
    "llama": _gguf_llama,
    "qwen2": _gguf_qwen2,
    "qwen3": _gguf_qwen3,
    "qwen3moe": _gguf_qwen3moe,
    "gemma3": _gguf_gemma3,
}


_HF_SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """What `transformers` takes where a ``config.json`` is silent, and what sets a family apart."""

    activation_key: str = "hidden_act"
    activation: str = "silu"
    head_dim: int | None = None
    tied: bool = False
    theta: float = 10_000.0
    epsilon: float = 1e-6
    fields: tuple[tuple[str, Any], ...] = ()


_HF: dict[str, _Family] = {
    "llama": _Family(),
    "qwen2": _Family(fields=(("qkv_bias", True),)),
    "qwen3": _Family(head_dim=128, fields=(("qk_norm", True),)),
    "mixtral": _Family(theta=1_000_000.0, epsilon=1e-5),
    "qwen3_moe": _Family(fields=(("qk_norm", True),)),
    "gemma3_text": _Family(
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        head_dim=256,
        tied=True,
        theta=1_000_000.0,
    ),
}


def from_hf(config: Mapping[str, Any], path: str) -> Config:
    """Reads the architecture from the ``config.json`` of `transformers`, old spelling or new."""
    keys = _Keys(config, path)
    name = keys.one_of("model_type", _HF)
    family = _HF[name]
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"):
        keys.refuse(key, False)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        keys.refuse(key)
    keys.one_of(family.activation_key, (family.activation,), default=family.activation)
    sizes = _HF_SIZES
    if name == "qwen3_moe":
        sizes = sizes | {"intermediate_size": "moe_intermediate_size"}
    fields = _sizes(keys, sizes, family.head_dim)
    fields |= {
        "vocab_size": keys.integer("vocab_size"),
        "norm_epsilon": keys.number("rms_norm_eps", family.epsilon),
        "tied": keys.boolean("tie_word_embeddings", family.tied),
        **dict(family.fields),
    }
    if name == "gemma3_text":
        return _build(path, **fields | _hf_gemma3(keys, fields, family))
    if name in _HF_EXPERTS:
        fields |= _HF_EXPERTS[name](keys, fields)
    _hf_layer_types(keys, fields["num_layers"], ("full_attention",))
    rope = keys.table("rope_parameters") or keys.table("rope_scaling")
    fields["rope"] = _hf_rope(keys, rope, family.theta, fields["head_dim"])
    return _build(path, **fields)


def _hf_mixtral(keys: _Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    experts = _experts(keys, "num_local_experts", "num_experts_per_tok", 8, 2)
    if keys.get("sliding_window") is None:
        return experts
    local = (True,) * fields["num_layers"]
    return experts | {"sliding_window": keys.integer("sliding_window"), "local_layers": local}


def _hf_qwen3_moe(keys: _Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    keys.refuse("decoder_sparse_step", 1)
    keys.refuse("mlp_only_layers", [])
    normalize = keys.boolean("norm_topk_prob", False)
    # The older spelling first; transformers 5 writes the other one.
    number = "num_experts" if keys.get("num_experts") is not None else "num_local_experts"
    experts = _experts(keys, number, "num_experts_per_tok", 128, 8)
    return experts | {"normalize_experts": normalize}


_HF_EXPERTS: dict[str, Callable[..., dict[str, Any]]] = {
    "mixtral": _hf_mixtral,
    "qwen3_moe": _hf_qwen3_moe,
}


def _hf_gemma3(keys: _Keys, fields: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    layers, head_dim = fields["num_layers"], fields["head_dim"]
    types = _hf_layer_types(keys, layers, ("full_attention", "sliding_attention"))
    if types is None:
        key = "sliding_window_pattern"
        key = key if keys.get(key) is not None else f"_{key}"
        local = _every(keys.integer(key, 6), layers)
    else:
        local = tuple(kind == "sliding_attention" for kind in types)
    both = keys.table("rope_parameters")
    if both is not None:
        rope = _hf_rope(keys, both.table("full_attention"), family.theta, head_dim)
        local_rope = _hf_rope(keys, both.table("sliding_attention"), 10_000.0, head_dim)
    else:
        rope = _hf_rope(keys, keys.table("rope_scaling"), family.theta, head_dim)
        local_rope = Rope(keys.number("rope_local_base_freq", 10_000.0))
    return _gemma3(fields, local) | {
        "sliding_window": keys.integer("sliding_window", 4096),
        "rope": rope,
        "local_rope": local_rope,
        "query_scale": keys.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def _hf_layer_types(keys: _Keys, layers: int, known: tuple[str, ...]) -> list[str] | None:
    types = keys.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or not all(t in known for t in types):
        keys.fail(
            "layer_types",
            f"is {_short(types)}, must name one of {', '.join(known)} for each of {layers} layers",
        )
    return types


def _hf_rope(keys: _Keys, table: _Keys | None, theta: float, head_dim: int) -> Rope:
    """The rotary embedding: its base stands at the top level, or in newer files in the table."""
    theta = keys.number("rope_theta", theta)
    if table is None:
        return Rope(theta)
    theta = table.number("rope_theta", theta)
    table.refuse("partial_rotary_factor", 1, 1.0)
    key = "rope_type" if table.get("rope_type") is not None else "type"
    kind = table.one_of(key, ("default", "linear", "llama3"), default="default")
    if kind == "default":
        return Rope(theta)
    factor = table.number("factor")
    if kind == "linear":
        return Rope(theta, factor)
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if low >= high:
        table.fail("low_freq_factor", f"is {low}, must be below high_freq_factor, {high}")
    length = table.integer("original_max_position_embeddings")
    return Rope(theta, 1.0, llama3_factors(theta, head_dim, factor, low, high, length))
