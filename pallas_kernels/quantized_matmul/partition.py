"""How a product is cut over a mesh: m, n and k, and the mapped axes in front."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem

Names = tuple[str, ...]  # mesh axes


class Cut(NamedTuple):
    """The mesh axes that cut the mapped axes, and those that cut m, k and n."""

    mapped: tuple[Names, ...]
    m: Names
    k: Names
    n: Names


def partitioned(
    run: Callable[..., jax.Array], problem: Problem, stacked: int, names: Sequence[str]
) -> Callable[..., jax.Array]:
    """`run(x, arrays)` on the part of each device, summed over those that cut k.

    `run` takes `problem` as a keyword, so that the parts can have one of their own.
    """

    def call(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        return run(x, arrays, problem=problem)

    def shardings(mesh: Any, cut: Cut) -> tuple[Any, Any]:
        place = lambda axes: NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))
        along = {"k": cut.k, "n": cut.n, "": ()}
        scaled = {**along, "k": cut.k if problem.weight.groups > 1 else ()}
        layout = LAYOUTS[problem.layout]
        arrays = {
            name: place([*cut.mapped, *(_axes(layout, name, along, scaled))]) for name in names
        }
        return (place([*cut.mapped, cut.m, cut.k]), arrays), place([*cut.mapped, cut.m, cut.n])

    def split(mesh: Any, args: Any, result: Any) -> tuple[Any, Any, Any, Any]:
        cut = _cut(problem, stacked, *args)
        part = _part(problem, mesh, cut)

        def one(x: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # the part of one device
                if not cut.k:
                    return run(x, arrays, problem=part)
                y = run(x, arrays, problem=part._replace(out="float32"))
                return lax.psum(y, cut.k).astype(problem.out)

        operands, whole = shardings(mesh, cut)
        return mesh, one, whole, operands

    def infer(mesh: Any, args: Any, result: Any) -> Any:
        return shardings(mesh, _cut(problem, stacked, *args))[1]

    op = custom_partitioning(call)
    rule, sizes, reduced = sharding_rule(problem, stacked, names)
    op.def_partition(
        split,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        reduction_factors=reduced,
        **sizes,  # pyright: ignore[reportArgumentType]
    )
    return op


def _axes(layout: Any, name: str, along: dict[str, Names], scaled: dict[str, Names]) -> list[Names]:
    if name == "codes":
        return [along[a] for a in layout.code_axes]
    return [scaled[a] for a in layout.scale_axes]


def sharding_rule(
    problem: Problem, stacked: int, names: Sequence[str]
) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """The rule for Shardy in einsum-like notation, the sizes of its factors, and which are summed.

    `kt` and `nt` count tiles; an axis of an array that runs along k is `kt` tiles of something.
    """
    weight, layout = problem.weight, LAYOUTS[problem.layout]
    tiles = dict(zip("kn", layout.tile(weight), strict=True))
    counts = {a: s // tiles[a] if s % tiles[a] == 0 else 1 for a, s in _sizes(problem).items()}
    sizes, alone = {}, set()

    def factor(axis: str, size: int) -> str:
        count = counts.get(axis, 1)
        if count > 1 and size == count:
            alone.add(f"{axis}t")
            return f"{axis}t"
        own = f"own{len(sizes)}"
        sizes[own] = size // count if count > 1 and size % count == 0 else size
        if count == 1 or size % count:
            alone.add(own)
            return own
        sizes[f"{axis}t"] = count
        return f"({axis}t {own})"

    lead = [f"b{i}" for i in range(stacked)]
    shapes = layout.shapes(weight)
    operands = [" ".join([*lead, "m", factor("k", weight.k)])]
    for name in names:
        axes = layout.code_axes if name == "codes" else layout.scale_axes
        cut = [factor(a, s) for a, s in zip(axes, shapes[name].shape, strict=True)]
        operands.append(" ".join([*lead, *cut]))
    result = " ".join([*lead, "m", factor("n", weight.n)])
    sizes = {f: s for f, s in sizes.items() if f not in alone}
    reduced = ("kt",) if counts["k"] > 1 else ()
    return f"{', '.join(operands)} -> {result}", sizes, reduced


def _sizes(problem: Problem) -> dict[str, int]:
    return {"k": problem.weight.k, "n": problem.weight.n}


def _cut(problem: Problem, stacked: int, x: Any, arrays: dict[str, Any]) -> Cut:
    """What cuts the operands. The weight goes first: a mesh axis that cuts it cuts nothing else."""
    axes = LAYOUTS[problem.layout].code_axes
    codes, rows = _entries(arrays["codes"]), _entries(x)
    of_weight = {a: codes[stacked + i] for i, a in enumerate(axes) if a}
    mapped = tuple(a or b for a, b in zip(codes[:stacked], rows[:stacked], strict=True))
    taken = {name for names in (*mapped, *of_weight.values()) for name in names}
    free = lambda names: tuple(n for n in names if n not in taken)
    k = of_weight["k"] or free(rows[stacked + 1])
    taken |= set(k)
    return Cut(mapped, free(rows[stacked]), k, of_weight["n"])


def _entries(operand: Any) -> list[Names]:
    spec = [*operand.sharding.spec, *[None] * len(operand.shape)][: len(operand.shape)]
    return [e if isinstance(e, tuple) else () if e is None else (e,) for e in spec]


def _part(problem: Problem, mesh: Any, cut: Cut) -> Problem:
    """The problem of one device.

    Raises:
      ValueError: if k or n is cut elsewhere than at a multiple of the layout's tile.
    """
    weight = problem.weight
    shards = {a: math.prod(mesh.shape[n] for n in getattr(cut, a)) for a in ("m", "k", "n")}
    for axis, tile in zip("kn", LAYOUTS[problem.layout].tile(weight), strict=True):
        size = _sizes(problem)[axis]
        if shards[axis] > 1 and size % (shards[axis] * tile):
            raise ValueError(
                f"quantized_matmul: {shards[axis]} shards cannot cut {axis} = {size} of {weight} "
                f"in layout {problem.layout}: each must hold a multiple of {tile}; replicate the "
                f"weight along {axis}, or choose groups that divide"
            )
    part = weight._replace(k=weight.k // shards["k"], n=weight.n // shards["n"])
    return problem._replace(m=problem.m // shards["m"], weight=part)
