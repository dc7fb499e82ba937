"""Mixture of experts: a router sends each token to a few of many MLPs (mixtral, qwen3-moe)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.models.architecture import ACTIVATIONS, Config


class Experts(nn.Module):
    """``y = sum over the chosen experts e of p_e * MLP_e(x)``, with ``p = softmax(x @ router)``.

    The `experts_per_token` most probable experts are chosen; with `normalize_experts` their
    probabilities are scaled to sum to 1, which is a softmax over their logits alone. No token is
    dropped. Mixtral: arXiv:2401.04088, section 2.1.
    """

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        rows = x.reshape(-1, x.shape[-1])
        router = nn.Dense(c.num_experts, use_bias=False, dtype=c.dtype, name="router")
        probabilities = jax.nn.softmax(router(rows).astype(jnp.float32), axis=-1)
        share, expert = jax.lax.top_k(probabilities, c.experts_per_token)  # [rows, chosen]
        if c.normalize_experts:
            share = share / jnp.sum(share, axis=-1, keepdims=True)

        order = jnp.argsort(expert.reshape(-1))  # of (row, choice) pairs, expert by expert
        sizes = jnp.bincount(expert.reshape(-1), length=c.num_experts).astype(jnp.int32)
        sent = jnp.take(rows, order // c.experts_per_token, axis=0)
        answers = _MLPs(c, name="experts")(sent, sizes)
        answers = jnp.take(answers, jnp.argsort(order), axis=0).reshape(*expert.shape, -1)
        y = jnp.einsum("nk,nkd->nd", share.astype(c.dtype), answers)
        return y.reshape(x.shape)


class _MLPs(nn.Module):
    """``down(activation(gate(x)) * up(x))``, each row through the MLP of its expert.

    The rows `[n, hidden]` are sorted by expert, `sizes` of them for each one.
    """

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        c = self.config
        dense = lambda name, features: _Dense(c.num_experts, features, c.dtype, name=name)
        gate = ACTIVATIONS[c.activation](dense("gate", c.intermediate_size)(x, sizes))
        up = dense("up", c.intermediate_size)(x, sizes)
        return dense("down", c.hidden_size)(gate * up, sizes)


class _Dense(nn.Module):
    """A kernel ``[experts, in, out]`` applied to rows that are sorted by expert."""

    experts: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        kernel = self.param("kernel", init, (self.experts, x.shape[-1], self.features))
        return jax.lax.ragged_dot(x.astype(self.dtype), kernel.astype(self.dtype), sizes)
