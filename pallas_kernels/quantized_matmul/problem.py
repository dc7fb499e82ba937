"""What is multiplied, without the numbers: hashable descriptions of weights and products."""

from typing import Any, NamedTuple


class Weight(NamedTuple):
    """A quantized `[k, n]` weight, `w = (value(code) - zero) * scale + offset` by groups along k.

    Attributes:
      k, n: the contraction and the output channels.
      group: so many neighbors along k share a scale; the last group may be ragged. At least k: one
        scale per output channel.
      code: dtype name of the logical codes: "int4", "uint4", "int8", "uint8", "float8_e4m3fn",
        "float8_e5m2".
      scale: dtype name of the scales.
      zero, offset: dtype names, None where there are none.
      values: the codebook, one float32 value per code; None where the code is the value.
    """

    k: int
    n: int
    group: int
    code: str
    scale: str = "float32"
    zero: str | None = None
    offset: str | None = None
    values: tuple[float, ...] | None = None

    @property
    def groups(self) -> int:
        return -(-self.k // self.group)


class Problem(NamedTuple):
    """One product `[m, k] x [k, n] -> [m, n]`.

    Attributes:
      m: rows of x.
      weight: what it is multiplied with.
      layout: the name in `LAYOUTS` of the order in which the weight lies.
      x: dtype name of x. "int8": x holds codes that the caller has rounded, and the caller
        multiplies the result with their scales.
      out: dtype name of the result; sums are in float32 or better.
      bias: whether a bias `[n]` is added to the float32 sums.
      activation: a name in `epilogue.ACTIVATIONS` for what follows the bias; None for nothing.
      norm: epsilon, where x is an RMSNorm that the kernel computes; None where it is given. This
        and what follows belong to `norm_matmul` and are None in `quantized_matmul`.
      gate: a name in `gated.reference.ACTIVATIONS`, where the weight is two, tiles of channels in
        turn, and the result `[m, n / 2]` is activation(x @ first) * (x @ second).
      config: how the implementation is to cut the work, its module's `Config`; None for its choice.
    """

    m: int
    weight: Weight
    layout: str
    x: str
    out: str
    bias: bool = False
    activation: str | None = None
    norm: float | None = None
    gate: str | None = None
    config: tuple[Any, ...] | None = None

    @property
    def plain(self) -> "Problem":
        """The same product in float32, before bias and activation."""
        return self._replace(out="float32", bias=False, activation=None)
