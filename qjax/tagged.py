"""Tagged: a parameter on its way through a jaxpr that collects statistics, and how it moves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qjax import _compat

Axes = tuple[int, ...]
Values = list[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Tagged:
    """A parameter on its way through a jaxpr.

    Attributes:
      value: the array.
      path: of the parameter.
      axes: the parameter's axes that each axis of `value` holds.
      starts: (axis of the parameter, where a slice of it starts; None where that is not known).
      loops: for each loop around, outermost first, the parameter's axes that it iterates over, or
        None where every iteration has all of it.
    """

    value: Any
    path: str
    axes: tuple[Axes, ...]
    starts: tuple[tuple[int, int | None], ...] = ()
    loops: tuple[Axes | None, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether this is the parameter as it is, nothing moved, cut or looped over."""
        axes = tuple((a,) for a in range(self.value.ndim))
        return (self.axes, self.starts, self.loops) == (axes, (), ())


def array_of(value: Any) -> Any:
    """The array that a parameter stands for; other values as they are."""
    return value.value if isinstance(value, Tagged) else value


def arrays_of(values: Sequence[Any]) -> Values:
    """`array_of` each."""
    return [array_of(v) for v in values]


def in_loop(value: Any, axes: Axes | None) -> Any:
    """A value in the body of a loop that iterates over these axes of the parameter."""
    if not isinstance(value, Tagged):
        return value
    return dataclasses.replace(value, loops=(*value.loops, axes))


def slice_of(value: Any, part: Any) -> Any:
    """A loop's slice `part` of what it iterates over."""
    if not isinstance(value, Tagged):
        return part
    box = dataclasses.replace(value, value=part, axes=value.axes[1:])
    return in_loop(box, value.axes[0] or None)


def carried_on(carry: Values, outvars: Sequence[Any], invars: Sequence[Any]) -> list[bool]:
    """Which carries are parameters that the body hands on."""
    pairs = zip(carry, outvars[: len(carry)], invars[: len(carry)], strict=True)
    return [isinstance(v, Tagged) and out is var for v, out, var in pairs]


def starts_of(eqn: _compat.JaxprEqn, box: Tagged, outputs: Values) -> list[Any]:
    """Where the slices of a parameter that a structural operation gives begin."""
    name, params = eqn.primitive.name, eqn.params
    if name not in ("slice", "split", "dynamic_slice"):
        return [box.starts] * len(outputs)
    begins = [[0] * box.value.ndim for _ in outputs]
    if name == "slice":
        begins = [list(params["start_indices"])]
    elif name == "split":
        at = 0
        for begin, size in zip(begins, params["sizes"], strict=True):
            begin[params["axis"]], at = at, at + size
    found = []
    for begin, output in zip(begins, outputs, strict=True):
        starts: dict[int, int | None] = dict(box.starts)
        for d, axes in enumerate(box.axes):
            if output.shape[d] == box.value.shape[d]:
                continue
            strided = name == "slice" and params["strides"] and params["strides"][d] != 1
            known = name != "dynamic_slice" and len(axes) == 1 and not strided
            for a in axes:
                before = starts.get(a, 0)
                starts[a] = before + begin[d] if known and before is not None else None
        found.append(tuple(sorted(starts.items())))
    return found


def in_shards(box: Tagged, spec: Any) -> Tagged:
    """A parameter in a shard_map: where a cut axis begins is not known before it runs."""
    cut = {
        a for axes, entry in zip(box.axes, spec, strict=False) if entry is not None for a in axes
    }
    return dataclasses.replace(
        box, starts=tuple(sorted((dict(box.starts) | dict.fromkeys(cut)).items()))
    )
