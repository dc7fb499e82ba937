"""Small floating-point formats: the code is the bit pattern, the device dtype does the work."""

import jax
import jax.numpy as jnp
import ml_dtypes

from qjax.formats.base import Format


def floating(name: str, storage: str) -> Format:
    """The values of the ml_dtypes float `storage`.

    Encoding rounds half to even and saturates at the largest finite value.
    """
    info = ml_dtypes.finfo(storage)
    low, high = float(info.min), float(info.max)

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return codes.astype(dtype)

    def encode(x: jax.Array) -> jax.Array:
        return jnp.clip(x, low, high).astype(storage)

    return Format(name, storage, decode, encode, low, high, info.bits)


FLOATING = {
    "fp8_e4m3": floating("fp8_e4m3", "float8_e4m3fn"),
    "fp8_e5m2": floating("fp8_e5m2", "float8_e5m2"),
}
