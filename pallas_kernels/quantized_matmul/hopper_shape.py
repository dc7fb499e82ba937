"""Shape: what the Hopper kernel is built for, and how a stage of its rings is laid out."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.quantized_matmul import hopper_layout as layout
from pallas_kernels.quantized_matmul.hopper_decode import decode_of
from pallas_kernels.quantized_matmul.mosaic_gpu import Plan, columns
from pallas_kernels.quantized_matmul.problem import Problem


class Piece(NamedTuple):
    """An operand in a stage of a warp: `words` of each of its tiles along k, or of all of them."""

    name: str
    words: int
    per_tile: bool

    def length(self, depth: int) -> int:
        """Words in a stage of `depth` tiles."""
        return self.words * (depth if self.per_tile else 1)


class Shape(NamedTuple):
    """What the kernel is built for.

    Attributes:
      m, n, k: rows of x, channels, contraction.
      decode: how codes become bfloat16, a key of `hopper_decode.RAW`, or "codebook".
      values: the codebook, or None.
      group: so many of k share a scale; a whole tile where the channel has one.
      center: of integers, the stored code that stands for 0, the same for all: accumulators start
        at -center * sum(x).
      start: warps take -start * sum(x): `center`, or 1 where zero points or offsets are to be
        multiplied with; 0 where no sums are wanted.
      scale, offset: dtype names.
      out, activation: what is written.
      norm, gate: as of the problem.
      tiles_n, tiles_k: 16 channels, 128 of k.
      pieces: what a stage holds, in order.
    """

    m: int
    n: int
    k: int
    decode: str
    values: tuple[float, ...] | None
    group: int
    center: float
    start: float
    scale: str
    offset: str | None
    out: Any
    activation: str | None
    tiles_n: int
    tiles_k: int
    pieces: tuple[Piece, ...]
    norm: float | None
    gate: str | None

    @property
    def columns(self) -> int:
        """Tiles of 8 rows of x."""
        return columns(self.m)

    @property
    def groups(self) -> int:
        """Of a tile."""
        return layout.DEPTH // self.group

    def has(self, name: str) -> bool:
        """Whether a stage holds such a piece."""
        return any(p.name == name for p in self.pieces)

    def piece(self, name: str) -> Piece:
        """The piece of that name."""
        return next(p for p in self.pieces if p.name == name)

    def words(self, depth: int) -> int:
        """Words of a stage of `depth` tiles."""
        return sum(p.length(depth) for p in self.pieces)

    def begin(self, name: str, depth: int) -> int:
        """The word of a stage where a piece begins."""
        names = [p.name for p in self.pieces]
        return sum(p.length(depth) for p in self.pieces[: names.index(name)])


def shape_of(problem: Problem, sizes: Plan) -> Shape:
    """What a kernel for `problem` is built for."""
    weight = problem.weight
    channel = layout.per_channel(weight)
    names = [n for n in ("zero", "offset") if getattr(weight, n)]
    pieces = [Piece("codes", layout.code_words(weight), True)]
    if channel:
        pieces.append(Piece("scale", layout.ROWS, False))
    else:
        pieces += [Piece(n, layout.group_words(weight, n), True) for n in ("scale", *names)]
    if problem.bias:
        pieces.append(Piece("bias", layout.ROWS, False))
    center = 0.0 if weight.zero is not None else float(-layout.lowest(weight))
    start = center or float(bool(names))
    return Shape(
        problem.m,
        weight.n,
        weight.k,
        decode_of(weight),
        weight.values,
        layout.DEPTH if channel else weight.group,
        center,
        start,
        weight.scale,
        weight.offset,
        jnp.dtype(problem.out),
        problem.activation,
        sizes.tiles_n,
        sizes.tiles_k,
        tuple(pieces),
        problem.norm,
        problem.gate,
    )
