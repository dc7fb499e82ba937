"""Config: what differs between the decoders of llama, qwen2, qwen3, gemma3, mixtral, qwen3-moe."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """Rotary position embedding: frequency ``i`` of a head is
    ``theta ** (-2 i / head_dim) / (factor * factors[i])``.

    `factor` is linear position scaling; `factors` are the per-frequency divisors of Llama 3.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    factors: tuple[float, ...] | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the angle per position of each frequency, float64 [head_dim / 2]."""
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        divisors = 1.0 if self.factors is None else np.asarray(self.factors, np.float64)
        return frequencies / (self.factor * divisors)


def llama3_factors(
    theta: float,
    head_dim: int,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_length: int,
) -> tuple[float, ...]:
    """The divisors of Llama 3.1's frequencies, for `Rope.factors`.

    A frequency that turns fewer than `low_freq_factor` times over the original context is divided
    by `factor`, one that turns more than `high_freq_factor` times is kept, and in between the
    reciprocals are interpolated linearly in the number of turns.
    """
    turns = original_length * Rope(theta).frequencies(head_dim) / (2 * np.pi)
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return tuple((1.0 / ((1.0 - smooth) / factor + smooth)).tolist())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of a decoder. The defaults are llama's.

    Attributes:
      num_heads, num_kv_heads: query heads share key and value heads in groups of their ratio.
      rope, local_rope: of the global and of the sliding-window layers (None: the same).
      sliding_window: a local layer sees this many positions, its own included.
      local_layers: for each layer, whether it is local; empty where none is.
      query_scale: factor on the attention scores; None is ``head_dim ** -0.5``.
      embedding_scale: factor on the embeddings (gemma: ``hidden_size ** 0.5``).
      post_norms: a norm also after attention and MLP (gemma3).
      num_experts: experts in place of each MLP, `intermediate_size` wide each; 0 for one MLP.
      experts_per_token: how many of them a token goes to.
      normalize_experts: whether the probabilities of those that are chosen are scaled to sum to 1.
      tied: the head is the transposed embedding.
      dtype: what activations are computed in; logits are float32.
      scan: one scanned stack of layers in place of unrolled ones.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048
    norm_epsilon: float = 1e-5
    rope: Rope = dataclasses.field(default_factory=Rope)
    local_rope: Rope | None = None
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    query_scale: float | None = None
    embedding_scale: float = 1.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    tied: bool = False
    dtype: Any = jnp.float32
    scan: bool = False

    def __post_init__(self):
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"Config: {message}")

        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            need(getattr(self, name) > 0, f"{name} must be positive, is {getattr(self, name)}")
        need(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        need(
            self.head_dim > 0 and self.head_dim % 2 == 0,
            f"head_dim must be even, is {self.head_dim}",
        )
        need(
            len(self.local_layers) in (0, self.num_layers),
            f"local_layers has {len(self.local_layers)} entries for {self.num_layers} layers",
        )
        need(
            not any(self.local_layers) or (self.sliding_window or 0) > 0,
            f"local layers need a sliding_window, it is {self.sliding_window}",
        )
        need(
            self.activation in ACTIVATIONS,
            f"activation {self.activation!r} is unknown, known are {', '.join(ACTIVATIONS)}",
        )
        least = min(self.num_experts, 1)
        need(
            least <= self.experts_per_token <= self.num_experts,
            f"experts_per_token must be {least} to {self.num_experts}, the number of experts, is "
            f"{self.experts_per_token}",
        )
        for name, rope in (("rope", self.rope), ("local_rope", self.local_rope)):
            need(
                rope is None or rope.factors is None or len(rope.factors) == self.head_dim // 2,
                f"{name}.factors must have head_dim / 2 = {self.head_dim // 2} entries",
            )

    def is_local(self, layer: int) -> bool:
        return bool(self.local_layers) and self.local_layers[layer]


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
