"""Float32 arithmetic that rounds once per operation, also where XLA would rather not.

Under jit XLA:CPU fuses `a * b + c` into one rounding and turns division by a constant into a
multiplication. Where bytes must equal those of another library, these two keep both apart.
"""

import jax
import jax.numpy as jnp

from qjax import _compat


def divide(x: jax.Array, divisor: float | jax.Array) -> jax.Array:
    """`x / divisor`, correctly rounded: the divisor is made a runtime value of the shape of x."""
    where = _compat.explicit_sharding(x)
    divisor = jnp.broadcast_to(jnp.asarray(divisor, x.dtype), x.shape, out_sharding=where)
    return x / jnp.where(jnp.isnan(x), jnp.ones_like(x), divisor)


def rounded(product: jax.Array) -> jax.Array:
    """A finite product, kept from being fused into the sum that uses it."""
    largest = float(jnp.finfo(product.dtype).max)
    return jnp.clip(product, -largest, largest)
