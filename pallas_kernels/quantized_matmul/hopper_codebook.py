"""The table of a codebook as the byte permutation reads it; needs no Mosaic GPU."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


def codebook_bytes(values: Sequence[float]) -> list[int]:
    """Low bytes of the sixteen bfloat16 values in four words, then the high bytes in four."""
    full = (*values, *(values[-1],) * (16 - len(values)))
    bits = np.asarray(full, np.float32).astype(jnp.bfloat16).view(np.uint16)
    planes = np.stack([bits & 0xFF, bits >> 8]).astype(np.uint8)
    return [int(v) for v in planes.view("<u4").reshape(-1)]
