"""State of low-precision training: the amax that delayed scales are made from, and a step count."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.training.recipes import Use

OPERANDS = ("x", "w", "g")
Amax = Mapping[str, Mapping[str, Any]]  # by key of a use, by operand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training carries from step to step, a pytree that any checkpoint holds.

    Attributes:
      history: by use of a parameter and operand "x", "w", "g": float32 `[history, *layers]`, the
        amax of past steps, newest first, 0 where there is none; empty without delayed scaling.
      step: uint32 [], the number of updates; stochastic rounding depends on it.
      uses: static: what becomes of every use of a parameter.
    """

    history: Any
    step: jax.Array
    uses: tuple[Use, ...] = dataclasses.field(metadata={"static": True})


def empty(uses: tuple[Use, ...]) -> State:
    """The state before the first step."""
    history = {}
    for use in uses:
        if use.recipe is not None and use.recipe.delayed:
            shape = (use.recipe.history, *use.stacked)
            history[use.key] = {name: jnp.zeros(shape, jnp.float32) for name in OPERANDS}
    return State(history, jnp.zeros((), jnp.uint32), uses)


def scale_amax(state: State) -> Amax:
    """What delayed scales are made from: the largest amax of the history times 2^margin."""
    margins = {use.key: use.recipe.margin for use in state.uses if use.recipe is not None}
    return {
        key: {name: jnp.max(past, axis=0) * 2.0 ** margins[key] for name, past in by.items()}
        for key, by in state.history.items()
    }


def merged(first: Any, *others: Any) -> Any:
    """The largest amax of several microbatches or shards."""
    for other in others:
        first = jax.tree.map(jnp.maximum, first, other)
    return first


def updated(state: State, seen: Amax) -> State:
    """The state with what one step saw as the newest entry of each history.

    An amax that is not finite, or 0 because nothing was multiplied, enters no history.
    """

    def push(past: jax.Array, new: jax.Array) -> jax.Array:
        moved = jnp.concatenate([new[None], past[:-1]])
        return jnp.where((jnp.isfinite(new) & (new > 0))[None], moved, past)

    if jax.tree.structure(state.history) != jax.tree.structure(seen):
        raise ValueError(
            f"what was seen is of {sorted(seen)}, the state of {sorted(state.history)}; update "
            "takes what `grads` returned for the same loss function and recipe"
        )
    history = jax.tree.map(push, state.history, seen)
    return State(history, state.step + jnp.ones((), jnp.uint32), state.uses)
