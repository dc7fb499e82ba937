"""What is gated, without the numbers."""

from typing import NamedTuple


class Problem(NamedTuple):
    """gate and up `[rows, width]` of dtype `x`; `activation`: a name in `reference.ACTIVATIONS`."""

    rows: int
    width: int
    activation: str
    x: str = "bfloat16"
