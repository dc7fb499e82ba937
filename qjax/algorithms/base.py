"""What an algorithm is: pure functions of a weight, a Spec and the statistics of its input."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from qjax.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stats:
    """What calibration saw of the input x `[tokens, in]` of one weight; float32, or None.

    Leading axes (layers, experts) stand in front of every leaf, as they do in front of the weight.

    Attributes:
      hessian: `[in, in]`, the sum over tokens of x^T x.
      mean_abs: `[in]`, the mean over tokens of |x|.
      max_abs: `[in]`, the maximum over tokens of |x|.
      second_moment: `[in]`, the mean over tokens of x^2.
      samples: `[s, in]`, the first tokens seen; rows beyond `count` are zero.
      count: `[]`, how many tokens there were.
    """

    hessian: jax.Array | None = None
    mean_abs: jax.Array | None = None
    max_abs: jax.Array | None = None
    second_moment: jax.Array | None = None
    samples: jax.Array | None = None
    count: jax.Array | None = None


Notes = dict[str, jax.Array]  # scalars for the log and the report, such as the damping used


class Algorithm(NamedTuple):
    """How codes are chosen; made by a factory such as `gptq(damping=0.01)`.

    Attributes:
      name: of the factory.
      needs: which fields of Stats `quantize` reads.
      joint: whether weights that share an input and a Spec are seen as one, side by side along out.
        Where a scale is shared across out (block `()`, tiles, `scale_spec`) they stay apart.
      quantize: (w `[in, out]`, spec, stats) -> (QTensor of w, notes); leading axes by vmap. Those
        of rtn and gptq, which others end in, take as `within` what scales are chosen from: w, with
        some elements clipped.
      finish: (QTensor, notes), both with their leading axes and outside jit -> QTensor: sets static
        fields by what calibration saw. The identity by default.
      options: the hyperparameters of the factory, as text: what tells a run with others apart.
    """

    name: str
    needs: frozenset[str]
    joint: bool
    quantize: Callable[..., tuple[QTensor, Notes]]
    finish: Callable[[QTensor, Notes], QTensor] = lambda q, notes: q
    options: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.options})"


def needed(name: str, stats: Stats, field: str) -> jax.Array:
    """A field of `stats`; raises ValueError, naming the algorithm and the remedy, if it is None."""
    value = getattr(stats, field)
    if value is None:
        raise ValueError(
            f"{name} needs the {field} of the input, and these Stats have none; collect it with "
            f"qjax.calibrate(fn, params, batches, recipe), where the recipe asks for {name}"
        )
    return value
