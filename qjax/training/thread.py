"""What runs beside the values of a training step: scales, slots for what is seen, noise."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.interpret import Thread
from qjax.training.recipes import Recipe
from qjax.training.state import State, scale_amax


def threading(start: State, seen: dict[str, jax.Array]) -> Thread:
    """The thread of one evaluation: a dict of "amax", by use and operand, that delayed scales are
    made from; "seen", by use, a slot per layer; "noise", uint32 [2]: the step, and a count of uses.
    """
    noisy = any(use.recipe is not None and _is_noisy(use.recipe) for use in start.uses)
    noise = jnp.stack([start.step, jnp.zeros((), jnp.uint32)]) if noisy else None
    return Thread({"amax": scale_amax(start), "seen": seen, "noise": noise}, _split, _join)


def _is_noisy(recipe: Recipe) -> bool:
    pairs = (*recipe.output, *recipe.input_grad, *recipe.weight_grad)
    return any(how is not None and how.stochastic for how in pairs)


def _split(value: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Slots of its own for every shard."""
    seen = {key: _fan_out(v, count) for key, v in value["seen"].items()}
    own = jax.tree.map(lambda v: False, value) | {"seen": dict.fromkeys(seen, True)}
    return value | {"seen": seen}, own


def _join(value: dict[str, Any]) -> dict[str, Any]:
    return value | {"seen": {key: _fan_in(v) for key, v in value["seen"].items()}}


def _fan_out(seen: jax.Array, count: int) -> jax.Array:
    """One copy per shard; what their gradients saw comes back by maximum, not as a sum."""

    @jax.custom_vjp
    def spread(v: jax.Array) -> jax.Array:
        return jnp.broadcast_to(v, (count, *v.shape))

    spread.defvjp(lambda v: (spread(v), None), lambda _, ct: (jnp.max(ct, axis=0),))
    return spread(seen)


@jax.custom_vjp
def _fan_in(seen: jax.Array) -> jax.Array:
    """What the shards saw, by maximum; each is handed all that was seen of gradients so far."""
    return jnp.max(seen, axis=0)


_fan_in.defvjp(
    lambda v: (_fan_in(v), v),
    lambda v, ct: (jnp.broadcast_to(ct, v.shape),),
)
