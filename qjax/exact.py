"""Float32 arithmetic that rounds once per operation, also where XLA would rather not.

Under jit XLA:CPU fuses `a * b + c` into one rounding and turns division by a constant, or by what
is broadcast, into a multiplication. Where bytes must equal those of another library, these two
functions keep the operations apart.
"""

import jax
import jax.numpy as jnp


def divide(x: jax.Array, divisor: float | jax.Array) -> jax.Array:
    """`x / divisor`, correctly rounded: the divisor is made a runtime value of the shape of x."""
    ones = jnp.ones_like(x)
    return x / jnp.where(jnp.isnan(x), ones, ones * divisor)


def rounded(x: jax.Array) -> jax.Array:
    """A finite product or quotient, kept from being merged with what uses it.

    XLA fuses `a * b + c` and rewrites `a / (b / c)` as `a * c / b`.
    """
    largest = float(jnp.finfo(x.dtype).max)
    return jnp.clip(x, -largest, largest)
