"""What is multiplied, without the numbers."""

from typing import NamedTuple


class Problem(NamedTuple):
    """One product `[m, k] x [n, k]^T -> [m, n]` of E4M3 codes whose rows have scales.

    Attributes:
      m, n, k: rows of a, rows of b, the contraction.
      out: dtype name of the result.
    """

    m: int
    n: int
    k: int
    out: str
