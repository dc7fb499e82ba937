"""What follows a product before it is rounded: a bias, and an activation function."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.problem import Problem

# name -> function of float32
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_tanh": lambda y: jax.nn.gelu(y, approximate=True),
}


def finish(y: jax.Array, arrays: dict[str, jax.Array], problem: Problem) -> jax.Array:
    """`activation(y + bias)` of float32 sums `[..., n]`, in the dtype of the result."""
    if problem.bias:
        bias = arrays["bias"].astype(jnp.float32)
        y = y + jnp.expand_dims(bias, range(bias.ndim - 1, y.ndim - 1))
    if problem.activation is not None:
        y = ACTIVATIONS[problem.activation](y)
    return y.astype(problem.out)
