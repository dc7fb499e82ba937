"""What is reduced, without the numbers."""

from typing import NamedTuple

BLOCK = 128


class Problem(NamedTuple):
    """The maxima of x `[rows, columns]`; `x` is its dtype name."""

    rows: int
    columns: int
    x: str = "bfloat16"
