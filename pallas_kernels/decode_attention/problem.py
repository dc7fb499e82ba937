"""What is attended to, without the numbers."""

from typing import NamedTuple


class Problem(NamedTuple):
    """One new token per row of a batch, over a cache.

    Attributes:
      batch: rows.
      kv_heads: of keys and values.
      groups: query heads that share one.
      head_dim: of all heads.
      length: positions that the cache can hold.
      scale: on the scores.
      dtype: of all arrays but the rotation, a name.
    """

    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    length: int
    scale: float
    dtype: str = "bfloat16"
