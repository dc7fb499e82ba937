"""Tiny random decoders, one per family, for the tests of decoder and generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models import Config, Decoder, Rope
from qjax.models.architecture import llama3_factors

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "llama": Config(**SIZES, rope=Rope(1e4, 1.0, llama3_factors(1e4, 8, 8.0, 1.0, 4.0, 64))),
    "qwen2": Config(**SIZES, qkv_bias=True, tied=True),
    "qwen3": Config(**SIZES, qk_norm=True),
    "mixtral": Config(**SIZES, num_experts=5, experts_per_token=2),
    "qwen3_moe": Config(
        **SIZES, num_experts=6, experts_per_token=3, normalize_experts=False, qk_norm=True
    ),
    "gemma3": Config(
        **SIZES,
        sliding_window=3,
        local_layers=(True, False, True),
        rope=Rope(1e6, 8.0),
        local_rope=Rope(1e4),
        query_scale=0.2,
        embedding_scale=32**0.5,
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        tied=True,
    ),
}


@functools.cache
def make(config):
    """A decoder whose parameters are random everywhere, norms and biases included."""
    model = Decoder(config)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        elif path[-1].key == "scale":
            noise = 1 + 0.1 * noise
        return jnp.asarray(noise, jnp.float32)

    return model, jax.tree_util.tree_map_with_path(fill, shapes)


def some_tokens(b=2, s=11):
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.integers(0, SIZES["vocab_size"], (b, s)), jnp.int32)


def stacked(params, layers):
    """The parameters of an unrolled decoder as those of a scanned one."""
    inner = dict(params["params"])
    blocks = [inner.pop(f"layers_{i}") for i in range(layers)]
    block = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {"params": inner | {"layers": {"block": block}}}


@functools.cache
def jitted(model):
    return jax.jit(model.apply)


def run(model, params, tokens, **kwargs):
    """`model.apply`, compiled once per model and shape."""
    return jitted(model)(params, tokens, **kwargs)
