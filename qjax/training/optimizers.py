"""adamw8bit, adamw4bit, lion8bit: optax transformations whose moments are held in low precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax.training import moments

BLOCK8, BLOCK4 = 256, 128  # elements of a block: bitsandbytes; Li et al.
SMALL = 4096  # parameters of fewer elements keep float32 moments, as in bitsandbytes


class State(NamedTuple):
    """What the transformations carry.

    Attributes:
      count: int32 [], the updates so far.
      moments: by moment a tree like the parameters: QTensors, `RankOne`s, float32 arrays.
    """

    count: jax.Array
    moments: tuple[Any, ...]


Hold = Callable[[jax.Array, jax.Array], Any]  # (moment, key) -> what holds it
Rule = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    moments: str = "dynamic8",
    min_size: int = SMALL,
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW with 8-bit moments: about 2.03 bytes of state per parameter.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= rate (m / (1 - b1^t) / (sqrt(v / (1 -
    b2^t)) + eps) + weight_decay p), in float32; between updates m and v are codes with one float32
    scale per 256 neighbors. Parameters in bfloat16 are rounded stochastically.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask: as for `optax.adamw`.
      moments: "dynamic8", bitsandbytes' block-wise dynamic map, rounded to nearest; or "fp8_e4m3",
        linear, rounded stochastically, as averages that move by less than half a step would stand
        still.
      min_size: parameters of fewer elements keep float32 moments.
      seed: of the stochastic rounding, which also depends on the number of updates.

    Returns:
      An optax transformation. Its updates are float32 whatever the parameters are; the blocks of a
      moment are those of the whole array, whatever its sharding.

    Raises:
      ValueError: if `moments` is no such name; on update, if no params are given.

    Sources: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.

    *Deviations*: blocks run along the last axis and restart where it is neither a multiple nor a
    divisor of 256; bitsandbytes' run over the flattened parameter. Codes are the nearest ones;
    bitsandbytes' CPU library finds them in a table of 65,536 entries.

    Example:
      >>> tx = qjax.training.adamw8bit(1e-3)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((64, 64))}, state, params)
      >>> state[0].moments[1]["w"]
      QTensor(udynamic8, shape=(64, 64), block=(4, 64), dtype=float32)
      >>> bool(jnp.allclose(updates["w"], -1e-3 * (1 + 1e-4)))
      True
    """
    first, second = _eight_bits(moments)
    adam = _low_bit(_adam(b1, b2, eps), (first, second), min_size, seed)
    return _whole(adam, learning_rate, weight_decay, mask, seed)


def adamw4bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    min_size: int = SMALL,
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW with 4-bit moments (Li et al., arXiv:2309.01507): about 1.1 bytes of state a parameter.

    m in the 4-bit dynamic map under one float32 scale per 128 neighbors; v in linear codes without
    a zero under scales of rank one (`moments.RankOne`), as a v of zero divides by eps alone. The
    update is that of `adamw8bit`, and so are the arguments.

    *Deviations*: a v of one axis is held in `udynamic8` blocks; the paper has 4-bit linear ones.

    Example:
      >>> tx = qjax.training.adamw4bit(1e-3)
      >>> tx.init({"w": jnp.ones((64, 64))})[0].moments[0]["w"].format
      'dynamic4'
    """

    def second(v: jax.Array, key: jax.Array) -> Any:
        return moments.hold_rank_one(v) if v.ndim > 1 else moments.hold(v, "udynamic8", BLOCK8)

    first = lambda m, key: moments.hold(m, "dynamic4", BLOCK4)
    adam = _low_bit(_adam(b1, b2, eps), (first, second), min_size, seed)
    return _whole(adam, learning_rate, weight_decay, mask, seed)


def lion8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    mask: Any = None,
    *,
    moments: str = "dynamic8",
    min_size: int = SMALL,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Lion with an 8-bit moment: about 1.02 bytes of state per parameter.

    p -= rate (sign(b1 m + (1 - b1) g) + weight_decay p), then m = b2 m + (1 - b2) g (Chen et al.,
    arXiv:2302.06675). Arguments, state and rounding as for `adamw8bit`.

    Example:
      >>> tx = qjax.training.lion8bit(1e-4)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": -params["w"]}, tx.init(params), params)
      >>> bool(jnp.allclose(updates["w"], 1e-4 * (1 - 1e-3)))
      True
    """

    def rule(t: jax.Array, g: jax.Array, m: jax.Array):
        return jnp.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g,)

    lion = _low_bit(rule, _eight_bits(moments)[:1], min_size, seed)
    return _whole(lion, learning_rate, weight_decay, mask, seed)


def round_stochastically(seed: int = 0) -> optax.GradientTransformation:
    """Last in a chain: bfloat16 parameters plus their updates are rounded up or down at random.

    The probability of each neighbor is such that the mean is the exact sum: an update below half a
    step of the parameter is not lost. Updates come out in float32; `optax.apply_updates` adds them
    exactly. Other dtypes pass through.

    Example:
      >>> tx = optax.chain(optax.sgd(1e-4), qjax.training.round_stochastically())
    """

    def init(params: Any) -> State:
        return State(jnp.zeros((), jnp.int32), ())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _need(params)
        keys = _keys(params, seed + 1, state.count)

        def one(u: jax.Array, p: jax.Array, key: jax.Array) -> jax.Array:
            if p.dtype != jnp.bfloat16:
                return u
            p = p.astype(jnp.float32)
            return _bfloat16(p + u.astype(jnp.float32), key) - p

        return jax.tree.map(one, updates, params, keys), State(state.count + 1, ())

    return optax.GradientTransformation(init, update)


def _bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """X in float32, rounded to one of its two bfloat16 neighbors; Inf and NaN as they are."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), lax.bitcast_convert_type(cut, jnp.float32), x)


def _adam(b1: float, b2: float, eps: float) -> Rule:
    def rule(t: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g * g)
        root = jnp.sqrt(v) / jnp.sqrt(1 - b2**t)
        return m / (1 - b1**t) / (root + eps), (m, v)

    return rule


def _eight_bits(name: str) -> tuple[Hold, Hold]:
    """How a first and a second moment are held."""
    if name == "dynamic8":
        return (
            lambda m, key: moments.hold(m, "dynamic8", BLOCK8),
            lambda v, key: moments.hold(v, "udynamic8", BLOCK8),
        )
    if name == "fp8_e4m3":
        return (
            lambda m, key: moments.hold(m, "fp8_e4m3", BLOCK8, key),
            lambda v, key: moments.hold(v, "fp8_e4m3", BLOCK8, key, positive=True),
        )
    raise ValueError(f"moments {name!r} are unknown; they may be 'dynamic8' or 'fp8_e4m3'")


def _low_bit(
    rule: Rule, holds: tuple[Hold, ...], min_size: int, seed: int
) -> optax.GradientTransformation:
    """The transformation of `rule`: (step, g, *moments) -> (direction, new moments), in float32."""

    def held(values: Any, hold: Hold, keys: Any) -> Any:
        one = lambda v, key: hold(v, key) if v.size >= min_size else v
        return jax.tree.map(one, values, keys)

    def init(params: Any) -> State:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        keys = _keys(params, seed, jnp.zeros((), jnp.int32))
        # arrays of its own for each moment: a buffer that two leaves share cannot be donated
        return State(jnp.zeros((), jnp.int32), tuple(held(zeros(), h, keys) for h in holds))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        t = (state.count + 1).astype(jnp.float32)
        tree = jax.tree.structure(updates)
        leaf = lambda m: moments.is_held(m) or m is None
        past = [jax.tree.leaves(m, is_leaf=leaf) for m in state.moments]
        grads = [g.astype(jnp.float32) for g in jax.tree.leaves(updates)]
        steps = [rule(t, g, *map(moments.opened, ms)) for g, *ms in zip(grads, *past, strict=True)]
        new = []
        for i, hold in enumerate(holds):
            values = jax.tree.unflatten(tree, [after[i] for _, after in steps])
            new.append(held(values, hold, _keys(values, seed + 2 + i, state.count)))
        directions = jax.tree.unflatten(tree, [direction for direction, _ in steps])
        return directions, State(state.count + 1, tuple(new))

    return optax.GradientTransformation(init, update)


def _whole(
    direction: optax.GradientTransformation, rate: Any, decay: float, mask: Any, seed: int
) -> optax.GradientTransformation:
    """Decay, rate and rounding after a direction, in optax's order."""
    return optax.chain(
        direction,
        _decayed(decay, mask),
        optax.scale_by_learning_rate(rate),
        round_stochastically(seed),
    )


def _decayed(decay: float, mask: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` in float32."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _need(params)
        add = lambda u, p: u + decay * p.astype(jnp.float32)
        return jax.tree.map(add, updates, params), state

    plain = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return plain if mask is None else optax.masked(plain, mask)


def _need(params: Any) -> None:
    if params is None:
        raise ValueError("this optimizer needs the parameters: tx.update(grads, state, params)")


def _keys(tree: Any, seed: int, count: jax.Array) -> Any:
    """A key per leaf and update."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jax.random.fold_in(key, i) for i in range(len(leaves))])
