"""What is cast, without the numbers."""

from typing import NamedTuple

BLOCK = 128
SMALLEST = 2.0**-110  # an amax below counts as this, so that 1 / scale stays finite


class Problem(NamedTuple):
    """One cast.

    Attributes:
      rows, columns: of x.
      scales: "block", "tile" or "given".
      dtype: dtype name of the codes.
      x: dtype name of x.
    """

    rows: int
    columns: int
    scales: str
    dtype: str = "float8_e4m3fn"
    x: str = "bfloat16"
