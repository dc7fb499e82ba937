"""The element encodings of llama.cpp's block types.

A block type is one of these rows plus the block structure that `Spec.parse` gives it: how many
elements share a scale, and how the scales themselves are held. The codes are those of the file,
unpacked.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.formats.base import Format
from qjax.formats.codebook import IQ4_VALUES, codebook
from qjax.formats.integer import integer


def ternary(name: str) -> Format:
    """-1, 0 and 1, held as value + 1 in two bits; the code 3, which no encoder gives, is 2."""

    def decode(codes: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return codes.astype(dtype) - jnp.asarray(1, dtype)

    def encode(x: jax.Array) -> jax.Array:
        return (jnp.clip(jnp.round(x), -1, 1) + 1).astype(jnp.uint8)

    return Format(name, "uint2", decode, encode, -1.0, 1.0, 2, integer=True)


_IQ4 = np.array(IQ4_VALUES, np.float32)

GGML: dict[str, Format] = {
    "q8_0": integer("q8_0", 8, -128),
    "q4_0": integer("q4_0", 4, -8),
    "q4_1": integer("q4_1", 4, 0),
    "q5_0": integer("q5_0", 5, -16),
    "q5_1": integer("q5_1", 5, 0),
    "q2_k": integer("q2_k", 2, 0),
    "q3_k": integer("q3_k", 3, -4),
    "q4_k": integer("q4_k", 4, 0),
    "q5_k": integer("q5_k", 5, 0),
    "q6_k": integer("q6_k", 6, -32),
    "iq4_nl": codebook("iq4_nl", "uint4", _IQ4, 4),
    "iq4_xs": codebook("iq4_xs", "uint4", _IQ4, 4),
    "tq1_0": ternary("tq1_0"),
    "tq2_0": ternary("tq2_0"),
}
