"""What is multiplied, without the numbers."""

from typing import NamedTuple

from pallas_kernels.quantized_matmul.problem import Weight


class Problem(NamedTuple):
    """One product `[m, k] x [k, n] -> [m, n]` of int8 codes, both with scales.

    Attributes:
      m: rows of x.
      weight: int8 codes with one scale per channel.
      layout: the name in `LAYOUTS` of the order in which it lies.
      outliers: columns of the second operand; 0 for none.
      out: dtype name of the result.
    """

    m: int
    weight: Weight
    layout: str
    outliers: int
    out: str
