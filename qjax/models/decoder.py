"""One Flax decoder for llama, qwen2, qwen3, gemma3, mixtral and qwen3-moe.

A block is ``x += post(attention(norm(x)))`` and ``x += post(mlp(norm(x)))``, with `post` a norm in
gemma3 and nothing elsewhere. `Config` holds what differs between the families. The model uses
plain arrays and plain operations; it knows nothing of quantized weights.

Parameters, projections as 2-D ``[in, out]``::

    embed/embedding                                  [vocab, hidden]
    layers_0/attention_norm/scale                    [hidden]
    layers_0/attention/{q,k,v,o}/kernel              (bias of q, k, v in qwen2)
    layers_0/attention/{q_norm,k_norm}/scale         [head_dim], qwen3, qwen3-moe and gemma3
    layers_0/attention_post_norm/scale               gemma3
    layers_0/mlp_norm/scale
    layers_0/mlp/{gate,up,down}/kernel               or, in mixtral and qwen3-moe:
    layers_0/mlp/router/kernel                       [hidden, experts]
    layers_0/mlp/experts/{gate,up,down}/kernel       [experts, in, out]
    layers_0/mlp_post_norm/scale                     gemma3
    norm/scale
    head/kernel                                      [hidden, vocab], absent where tied

With ``scan=True`` the layers are one ``layers/block/...`` whose arrays carry a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qjax.models import fused
from qjax.models.architecture import Config
from qjax.models.cache import Cache, read, write
from qjax.models.experts import Experts


class _Positions(NamedTuple):
    """What a layer needs to know of the positions: rotation of the queries, and what they see."""

    cos: jax.Array  # [s, 1, head_dim / 2]
    sin: jax.Array
    mask: jax.Array  # bool [s, t]: query position s sees key position t
    first: jax.Array  # int32 []: the first position that the first query sees


def _positions(config: Config, start: jax.Array | int, s: int, t: int, local: bool) -> _Positions:
    rope = config.local_rope if local and config.local_rope is not None else config.rope
    queries = start + jnp.arange(s, dtype=jnp.int32)
    frequencies = jnp.asarray(rope.frequencies(config.head_dim), jnp.float32)
    angles = queries.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]
    distance = queries[:, None] - jnp.arange(t, dtype=jnp.int32)[None, :]
    mask, first = distance >= 0, jnp.zeros((), jnp.int32)
    if local and config.sliding_window is not None:
        mask &= distance < config.sliding_window
        first = jnp.maximum(queries[0] - config.sliding_window + 1, 0)
    return _Positions(jnp.cos(angles), jnp.sin(angles), mask, first)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + head_dim / 2) of x [b, s, heads, head_dim], in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None], sin[None]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """``x / sqrt(mean(x ** 2) + epsilon) * scale`` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + scale.shape
    return (wide * scale.astype(jnp.float32).reshape(shape)).astype(x.dtype)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + epsilon) * scale`` over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        return _rms_norm(x, scale, self.epsilon)


class StreamNorm(nn.Module):
    """The residual stream ``x + y`` (y None: x) and its RMSNorm; where `defer` is set and there are
    kernels for it, both are left to what multiplies them.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array | None, defer: bool = False) -> Any:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        if defer:
            later = fused.deferred(x, y, scale, self.epsilon)
            if later is not None:
                return later
        if y is not None:
            both = fused.add_norm(x, y, scale, self.epsilon)
            if both is not None:
                return both
            x = x + y
        return x, _rms_norm(x, scale, self.epsilon)


class _Kernel(nn.Module):
    """The kernel of a `Dense` of that name."""

    features: int

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        return self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))


def _project(
    stream: Any, features: Mapping[str, int], dtype: Any, bias: bool = False, gate: Any = None
) -> tuple[jax.Array, list[jax.Array]]:
    """The residual stream, and what Dense layers of these names and features make of its norm.

    `stream` is the pair of both, or deferred. With `gate`, an activation, two layers make one:
    ``activation(first) * second``.
    """
    if isinstance(stream, fused.Deferred):
        width = stream.x.shape[-1]
        kernels = [_Kernel(n, name=name)(width) for name, n in features.items()]
        return fused.normed_products(stream, kernels, gate)
    x, normed = stream
    layers = [nn.Dense(n, use_bias=bias, dtype=dtype, name=name) for name, n in features.items()]
    ys = [layer(normed) for layer in layers]
    return x, ys if gate is None else [fused.gated(ys[0], ys[1], gate)]


class Attention(nn.Module):
    """Causal attention with grouped key and value heads and rotary positions.

    Takes the residual stream and its norm, and returns the stream and what is to be added to it.
    """

    config: Config

    @nn.compact
    def __call__(self, stream, positions: _Positions, keys, values, start):
        c = self.config
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        groups = c.num_heads // c.num_kv_heads
        features = {name: count * c.head_dim for name, count in heads.items()}
        x, projected = _project(stream, features, c.dtype, c.qkv_bias)
        b, s, _ = x.shape
        pairs = zip(projected, heads.values(), strict=True)
        q, k, v = (p.reshape(b, s, count, c.head_dim) for p, count in pairs)
        if c.qk_norm:
            q = RMSNorm(c.norm_epsilon, name="q_norm")(q)
            k = RMSNorm(c.norm_epsilon, name="k_norm")(k)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        turn, span = (positions.cos, positions.sin), (positions.first, start)
        done = fused.attention(q, k, v, turn, span, (keys, values), scale)
        if done is not None:
            y, keys, values = done
            return x, self._output(y.reshape(b, s, -1)), keys, values
        q = _rotate(q, *turn)
        k = _rotate(k, *turn)
        if keys is not None:
            keys, values = write(keys, k, start), write(values, v, start)
            k, v = read(keys, c.dtype), read(values, c.dtype)

        q = q.reshape(b, s, c.num_kv_heads, groups, c.head_dim)
        scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(positions.mask[None, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        y = jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(b, s, c.num_heads * c.head_dim)
        return x, self._output(y), keys, values

    def _output(self, y: jax.Array) -> jax.Array:
        c = self.config
        return nn.Dense(c.hidden_size, use_bias=False, dtype=c.dtype, name="o")(y)


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` of the norm of a stream; returns the stream too."""

    config: Config

    @nn.compact
    def __call__(self, stream) -> tuple[jax.Array, jax.Array]:
        c = self.config
        features = {"gate": c.intermediate_size, "up": c.intermediate_size}
        x, (y,) = _project(stream, features, c.dtype, gate=c.activation)
        return x, nn.Dense(c.hidden_size, use_bias=False, dtype=c.dtype, name="down")(y)


class Block(nn.Module):
    """Attention and MLP around a residual stream.

    What a part adds to the stream is added where it is normed next: y comes from the layer before,
    and the second result is for the one behind; None for nothing.
    """

    config: Config

    @nn.compact
    def __call__(self, x, y, positions: _Positions, keys, values, start):
        c = self.config

        def stream(name: str, *xy, **options):
            return StreamNorm(c.norm_epsilon, name=name)(*xy, **options)

        def post(name: str, y: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_epsilon, name=name)(y) if c.post_norms else y

        before = stream("attention_norm", x, y, defer=not c.qkv_bias)
        attention = Attention(c, name="attention")
        x, y, keys, values = attention(before, positions, keys, values, start)
        y = post("attention_post_norm", y)
        before = stream("mlp_norm", x, y, defer=not c.num_experts)
        if c.num_experts:
            x, normed = before
            y = Experts(c, name="mlp")(normed)
        else:
            x, y = MLP(c, name="mlp")(before)
        return x, post("mlp_post_norm", y), keys, values


class _ScannedBlock(nn.Module):
    """A Block as a scan body: it picks its positions by a flag, as all iterations are one trace."""

    config: Config

    @nn.compact
    def __call__(self, x, layer, both, start):
        local, keys, values = layer
        positions = both[0]
        if len(both) == 2:
            positions = jax.tree.map(lambda a, b: jnp.where(local, a, b), both[1], both[0])
        block = Block(self.config, name="block")
        x, y, keys, values = block(x, None, positions, keys, values, start)
        return x + y, (keys, values)


class Decoder(nn.Module):
    """A causal language model: token ids to logits.

    Example::

      model = Decoder(config)
      params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
      logits = model.apply(params, tokens)
      logits, cache = model.apply(params, tokens, cache=init_cache(config, batch, 256))
    """

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, *, cache: Cache | None = None, last=None):
        """Computes logits.

        Args:
          tokens: int [b, s]. With a cache they continue the positions it holds.
          cache: from `init_cache`, or returned by the previous call. The caller sees to it that
            ``cache.length + s`` fits: a longer one overwrites the last positions.
          last: int [] or None: compute the logits of this one of the s positions only.

        Returns:
          float32 logits [b, s, vocab] ([b, 1, vocab] with `last`); with a cache a pair of them and
          the new cache.
        """
        c = self.config
        s = tokens.shape[1]
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, name="embed")
        x = embed(tokens)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        t = s if cache is None else jax.tree.leaves(cache.keys)[0].shape[-3]
        if s > t:
            raise ValueError(f"Decoder: {s} tokens do not fit a cache of {t} positions")
        kinds = sorted({c.is_local(i) for i in range(c.num_layers)})
        positions = {local: _positions(c, start, s, t, local) for local in kinds}
        run = self._scanned if c.scan else self._unrolled
        x, y, keys, values = run(x, positions, cache, start)

        norm = StreamNorm(c.norm_epsilon, name="norm")
        stream = norm(x, y, defer=last is None and not c.tied)
        if last is not None:
            stream = (x, jax.lax.dynamic_slice_in_dim(stream[1], last, 1, axis=1))
        if c.tied:
            logits = embed.attend(stream[1])
        else:
            _, (logits,) = _project(stream, {"head": c.vocab_size}, c.dtype)
        logits = logits.astype(jnp.float32)
        return logits if cache is None else (logits, Cache(keys, values, start + s))

    def _unrolled(self, x, positions, cache, start):
        c = self.config
        keys, values, y = [], [], None
        for i in range(c.num_layers):
            k, v = (None, None) if cache is None else (cache.keys[i], cache.values[i])
            block = Block(c, name=f"layers_{i}")
            x, y, k, v = block(x, y, positions[c.is_local(i)], k, v, start)
            keys.append(k)
            values.append(v)
        return x, y, tuple(keys), tuple(values)

    def _scanned(self, x, positions, cache, start):
        c = self.config
        body = nn.scan(
            _ScannedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )
        local = jnp.asarray([c.is_local(i) for i in range(c.num_layers)])
        layers = (local, None, None) if cache is None else (local, cache.keys, cache.values)
        both = tuple(positions[kind] for kind in sorted(positions))
        x, (keys, values) = body(c, name="layers")(x, layers, both, start)
        return x, None, keys, values
