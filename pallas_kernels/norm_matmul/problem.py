"""What is normalized and multiplied, without the numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem as Product
from pallas_kernels.quantized_matmul.problem import Weight


class Problem(NamedTuple):
    """x and y `[rows, k]`, and products of `RMSNorm(x + y)` with each weight.

    Attributes:
      rows: of x and y.
      epsilon: of the norm.
      weights: those of one x.
      layout: the name in `LAYOUTS` of the order in which they lie.
      x: dtype name of x, y and their sum.
      out: dtype name of the results.
      gate: a name in `gated.reference.ACTIVATIONS`, where there are two weights and the result is
        activation of the first one's product times the second's; None for a result of each.
    """

    rows: int
    epsilon: float
    weights: tuple[Weight, ...]
    layout: str
    x: str = "bfloat16"
    out: str = "bfloat16"
    gate: str | None = None

    @property
    def products(self) -> list[Product]:
        """What the norm is multiplied with."""
        return [Product(self.rows, w, self.layout, self.x, self.out) for w in self.weights]

    def leaves(self, arrays: Sequence[dict[str, jax.Array]]) -> list[jax.Array]:
        """The arrays of all weights, one after another."""
        order = LAYOUTS[self.layout]
        pairs = zip(arrays, self.weights, strict=True)
        return [held[name] for held, w in pairs for name in order.shapes(w)]

    def arrays(self, leaves: Sequence[jax.Array]) -> list[dict[str, jax.Array]]:
        """The inverse of `leaves`."""
        rest, order = iter(leaves), LAYOUTS[self.layout]
        return [{name: next(rest) for name in order.shapes(w)} for w in self.weights]
