"""Learned: a weight that trains together with its scales (LSQ) and the clip of its input (PACT)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks
from qjax.formats import FORMATS, split_planes
from qjax.formats.floating import narrow
from qjax.qtensor import Activation, QTensor, dequantize
from qjax.spec import Spec

LEAST = 2.0**-100  # a scale or clip below counts as this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """A parameter of a tree that `FakeQuant.learn` made; its leaves train like any others.

    Attributes:
      value: the weight.
      scale: float32, one step size per block; codes = clip(round(value / scale)).
      clip: float32, a scalar, or one per stacked layer; the other operand of the matmul is cut to
        [-clip, clip] and then rounded to codes of step clip / largest code. `None` leaves it to the
        spec.
    """

    value: Any
    scale: Any
    clip: Any
    spec: Spec = dataclasses.field(metadata={"static": True})
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


def is_learned(leaf: Any) -> bool:
    """Whether a leaf trains with its scales."""
    return isinstance(leaf, Learned)


def start(
    path: str, w: jax.Array, q: Any, spec: Spec, clip: float | None, stacked: int, begin: str
) -> Learned:
    """A weight with the step sizes that it begins with.

    Args:
      path: for error messages.
      w: the weight.
      q: the QTensor that its spec gives, for format and blocks.
      spec: what it is quantized to.
      clip: where the clip of the other operand begins; `None` for none.
      stacked: how many leading axes of w are layers, which have clips of their own.
      begin: "spec", the scales of q; "lsq", 2 mean|w| / sqrt(largest code) of each block.
    """
    if begin not in ("spec", "lsq"):
        raise ValueError(f"begin={begin!r} is unknown; scales may begin as 'spec' or 'lsq'")
    plain = isinstance(q, QTensor) and q.zero_point is None and q.offset is None
    fmt = FORMATS[q.format] if plain else None
    if fmt is None or not fmt.integer or fmt.min >= 0 or isinstance(q.scale, QTensor):
        raise ValueError(
            f"{path}: {spec} cannot learn its scales, symmetric integers such as int4_g128 can; "
            "leave it out of what learns (`only`)"
        )
    if clip is not None and spec.activation is None:
        raise ValueError(
            f"{path}: a clip of {clip} was given, but {spec} leaves the other operand alone; write "
            f"{spec}/int8_token, or give no clip"
        )
    block, scale = blocks.align(q.block, w.ndim), q.scale
    if begin == "lsq":
        total, count = (blocks.totals(v, block) for v in (jnp.abs(w), jnp.ones_like(w)))
        scale = 2 * (total / count) / math.sqrt(fmt.max)
    scale = jnp.maximum(_float32(scale), LEAST).reshape(q.scale.shape)
    clips = None if clip is None else jnp.full(w.shape[:stacked], clip, jnp.float32)
    return Learned(w, scale, clips, spec, q.block)


def held(leaf: Learned) -> QTensor:
    """The QTensor of a learned weight: codes clip(round(value / scale)), scales in their dtype."""
    spec, block = leaf.spec, blocks.align(leaf.block, leaf.value.ndim)
    fmt = FORMATS[spec.format]
    scale = narrow(_step(leaf), spec.scale_dtype)
    wide = scale.astype(jnp.float32)
    codes = blocks.apply(lambda x, s: fmt.encode(x / s), _float32(leaf.value), block, wide)
    act = None if spec.activation is None else Activation(spec.activation)
    if leaf.clip is not None:
        assert spec.activation is not None
        step = jnp.maximum(leaf.clip, LEAST) / FORMATS[spec.activation.format].max
        act = Activation(spec.activation._replace(block=()), scale=step)
    dtype = np.dtype(leaf.value.dtype)
    return QTensor(split_planes(fmt, codes), scale, None, None, act, spec.format, leaf.block, dtype)


def simulated(leaf: Learned, q: QTensor) -> jax.Array:
    """What `held` decodes to, with the derivatives of LSQ (Esser et al., arXiv:1902.08153).

    With x = value / scale and codes of -n to p: d/d value is 1 where -n < x < p, else 0; d/d scale
    is round(x) - x there, and -n or p outside, times 1 / sqrt(elements of the block * p).
    """
    block = blocks.align(leaf.block, leaf.value.ndim)
    return _simulated(dequantize(q), leaf.value, leaf.scale, leaf.spec, block)


def _simulated(
    value: jax.Array, w: jax.Array, scale: jax.Array, spec: Spec, block: blocks.Block
) -> jax.Array:
    fmt = FORMATS[spec.format]
    fixed = _float32(narrow(lax.stop_gradient(jnp.maximum(scale, LEAST)), spec.scale_dtype))
    x = blocks.apply(jnp.divide, lax.stop_gradient(_float32(w)), block, fixed)
    inside = (x > fmt.min) & (x < fmt.max)
    slope = jnp.where(inside, jnp.round(x) - x, jnp.clip(x, fmt.min, fmt.max))
    count = math.prod(min(b, n) for b, n in zip(block, w.shape, strict=True))
    slope = slope / math.sqrt(count * fmt.max)
    by_scale = blocks.apply(jnp.multiply, slope, block, scale.astype(jnp.float32))
    linear = jnp.where(inside, _float32(w), 0.0) + by_scale
    return straight(lax.stop_gradient(value), linear.astype(value.dtype))


@jax.custom_jvp
def straight(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, with the derivative of `like`."""
    return value


@straight.defjvp
def _straight_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    return primals[0], tangents[1]


def _step(leaf: Learned) -> jax.Array:
    return jnp.maximum(_float32(leaf.scale), LEAST)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
