"""Layout: the order in which the arrays of a weight lie in memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.problem import Weight


class Layout(NamedTuple):
    """One order of a weight's arrays: "codes", "scale" and, where it has them, "zero", "offset".

    Arrays in kernel order have dtypes that `jax.export` can write (no 2- or 4-bit ones), and no
    axes for layers or experts: those are added by `vmap`.

    Attributes:
      supports: weight -> None, or the reason why it cannot lie so.
      pack_codes: (codes [k, n] of `weight.code`, weight) -> codes in kernel order.
      unpack_codes: its inverse, bit for bit.
      pack_scale: (scale, zero or offset [groups, n], weight) -> the same in kernel order.
      unpack_scale: (array in kernel order, weight, "scale", "zero" or "offset") -> the inverse, bit
        for bit; an integer array may come back wider.
      code_array: weight -> shape and dtype of what `pack_codes` returns.
      scale_array: (weight, "scale", "zero" or "offset") -> of what `pack_scale` returns.
      code_axes, scale_axes: for each axis of an array in kernel order, the axis of the weight that
        it runs along: "k", "n", or "" for one that is never cut.
      tile: weight -> (k, n): a shard of the weight must be a multiple of these along an axis that
        is cut.
      serves: device -> whether an implementation for it reads this layout.
      takes_codes: (weight, format of the codes of x) -> None, or the reason why no implementation
        for it multiplies x in codes.
    """

    supports: Callable[[Weight], str | None]
    pack_codes: Callable[[jax.Array, Weight], jax.Array]
    unpack_codes: Callable[[jax.Array, Weight], jax.Array]
    pack_scale: Callable[[jax.Array, Weight], jax.Array]
    unpack_scale: Callable[[jax.Array, Weight, str], jax.Array]
    code_array: Callable[[Weight], jax.ShapeDtypeStruct]
    scale_array: Callable[[Weight, str], jax.ShapeDtypeStruct]
    code_axes: tuple[str, ...]
    scale_axes: tuple[str, ...]
    tile: Callable[[Weight], tuple[int, int]]
    serves: Callable[[Device], bool]
    takes_codes: Callable[[Weight, str], str | None] = lambda weight, codes: None

    def shapes(self, weight: Weight) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays in kernel order that a weight consists of."""
        names = [n for n in ("scale", "zero", "offset") if getattr(weight, n) is not None]
        packed = {"codes": self.code_array(weight)}
        return packed | {name: self.scale_array(weight, name) for name in names}
