"""What is multiplied, without the numbers."""

from typing import NamedTuple

BLOCK = 128  # neighbors along k that share a scale


class Problem(NamedTuple):
    """One product `[m, k] x [n, k]^T -> [m, n]` of E4M3 codes in blocks of 128 along k.

    Attributes:
      m, n, k: rows of a, rows of b, the contraction.
      b_rows: whether the rows of b have scales of their own, as those of a do; else 128 of them
        share one.
      out: dtype name of the result.
    """

    m: int
    n: int
    k: int
    b_rows: bool
    out: str
