"""What is cast, without the numbers."""

from typing import NamedTuple

BLOCK = 128
SMALLEST = 2.0**-110  # an amax below counts as this, so that 1 / scale stays finite


class Problem(NamedTuple):
    """A cast of x `[rows, columns]`.

    Attributes:
      rows, columns: of x.
      scales: what shares one. "block": 128 neighbors along the contraction, which is columns for
        the codes as they lie and rows for the transposed ones; "tile": 128 x 128; "row": a row, not
        for transposed codes; "given": the caller has the reciprocals, one per row and one per
        column.
      dtype: dtype name of the codes.
      x: dtype name of x.
      turned: whether transposed codes are written, too.
    """

    rows: int
    columns: int
    scales: str
    dtype: str = "float8_e4m3fn"
    x: str = "bfloat16"
    turned: bool = True
