"""What is added and normalized, without the numbers."""

from typing import NamedTuple


class Problem(NamedTuple):
    """x and y `[rows, width]`; `x` is the dtype name of both."""

    rows: int
    width: int
    epsilon: float
    x: str = "bfloat16"
