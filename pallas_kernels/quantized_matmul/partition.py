"""How a product is cut over a mesh: m, n and k, and the mapped axes in front."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.quantized_matmul.epilogue import finish
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem

Names = tuple[str, ...]  # mesh axes


class Cut(NamedTuple):
    """The mesh axes that cut the mapped axes, those that cut m and k, and n of each weight."""

    mapped: tuple[Names, ...]
    m: Names
    k: Names
    n: tuple[Names, ...]


def partitioned(
    run: Callable[..., tuple[jax.Array, ...]],
    problems: tuple[Problem, ...],
    stacked: int,
    names: Sequence[Sequence[str]],
) -> Callable[..., tuple[jax.Array, ...]]:
    """`run(x, arrays of each weight)` on the part of each device, summed over those that cut k.

    `run` takes `problems` as a keyword, so that the parts can have ones of their own.
    """

    def call(x: jax.Array, arrays: Any) -> tuple[jax.Array, ...]:
        return run(x, arrays, problems=problems)

    def shardings(mesh: Any, cut: Cut) -> tuple[Any, Any]:
        place = lambda axes: NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))
        arrays, results = [], []
        for problem, n, held in zip(problems, cut.n, names, strict=True):
            along = {"k": cut.k, "n": n, "": ()}
            scaled = {**along, "k": cut.k if problem.weight.groups > 1 else ()}
            axes = {
                name: [(along if name == "codes" else scaled)[a] for a in _axes(problem, name)]
                for name in held
            }
            arrays.append({name: place([*cut.mapped, *v]) for name, v in axes.items()})
            results.append(place([*cut.mapped, cut.m, n]))
        return (place([*cut.mapped, cut.m, cut.k]), tuple(arrays)), tuple(results)

    def split(mesh: Any, args: Any, result: Any) -> tuple[Any, Any, Any, Any]:
        cut = _cut(problems, stacked, *args)
        parts = _parts(problems, mesh, cut)

        def one(x: jax.Array, arrays: Any) -> tuple[jax.Array, ...]:
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # the part of one device
                if not cut.k:
                    return run(x, arrays, problems=parts)
                ys = lax.psum(run(x, arrays, problems=tuple(p.plain for p in parts)), cut.k)
                return tuple(finish(*v) for v in zip(ys, arrays, parts, strict=True))

        operands, whole = shardings(mesh, cut)
        return mesh, one, whole, operands

    def infer(mesh: Any, args: Any, result: Any) -> Any:
        return shardings(mesh, _cut(problems, stacked, *args))[1]

    op = custom_partitioning(call)
    rule, sizes, reduced = sharding_rule(problems, stacked, names)
    op.def_partition(
        split,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        reduction_factors=reduced,
        **sizes,  # pyright: ignore[reportArgumentType]
    )
    return op


def _axes(problem: Problem, name: str) -> tuple[str, ...]:
    """The axis of the weight that each axis of an operand runs along."""
    layout = LAYOUTS[problem.layout]
    if name == "bias":
        return ("n",)
    return layout.code_axes if name == "codes" else layout.scale_axes


def sharding_rule(
    problems: Sequence[Problem], stacked: int, names: Sequence[Sequence[str]]
) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """The rule for Shardy in einsum-like notation, the sizes of its factors, and which are summed.

    `kt` and `n0t`, `n1t` ... count tiles, of k and of n of each weight; an axis of an array that
    runs along k is `kt` tiles of something. Where the tiles of the weights differ along k, none
    counts them.
    """
    sizes, alone, counts = {}, set(), {}
    tiles = [LAYOUTS[p.layout].tile(p.weight) for p in problems]
    along_k = {k: problems[0].weight.k // k for k, _ in tiles if problems[0].weight.k % k == 0}
    counts["k"] = min(along_k.values(), default=1) if len({k for k, _ in tiles}) == 1 else 1
    for i, (problem, (_, tile)) in enumerate(zip(problems, tiles, strict=True)):
        counts[f"n{i}"] = problem.weight.n // tile if problem.weight.n % tile == 0 else 1

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
    operands = [" ".join([*lead, "m", factor("k", problems[0].weight.k)])]
    results = []
    for i, (problem, held) in enumerate(zip(problems, names, strict=True)):
        n, shapes = f"n{i}", LAYOUTS[problem.layout].shapes(problem.weight)
        for name in held:
            shape = (problem.weight.n,) if name == "bias" else shapes[name].shape
            pairs = zip(_axes(problem, name), shape, strict=True)
            cut = [factor(n if a == "n" else a, s) for a, s in pairs]
            operands.append(" ".join([*lead, *cut]))
        results.append(" ".join([*lead, "m", factor(n, problem.weight.n)]))
    sizes = {f: s for f, s in sizes.items() if f not in alone}
    reduced = ("kt",) if counts["k"] > 1 else ()
    return f"{', '.join(operands)} -> {', '.join(results)}", sizes, reduced


def _cut(problems: Sequence[Problem], stacked: int, x: Any, arrays: Sequence[Any]) -> Cut:
    """What cuts the operands. The weights go first: a mesh axis that cuts one cuts nothing else."""
    rows, mapped, of_weights = _entries(x), None, []
    for problem, held in zip(problems, arrays, strict=True):
        codes = _entries(held["codes"])
        axes = enumerate(_axes(problem, "codes"))
        of_weights.append({a: codes[stacked + i] for i, a in axes if a})
        lead = mapped or rows[:stacked]
        mapped = tuple(a or b for a, b in zip(codes[:stacked], lead, strict=True))
    assert mapped is not None
    taken = {name for names in mapped for name in names}
    k = next((w["k"] for w in of_weights if w["k"]), ())
    k = tuple(name for name in k if name not in taken)
    taken |= set(k)
    n = tuple(tuple(name for name in w["n"] if name not in taken) for w in of_weights)
    taken |= {name for names in n for name in names}
    free = lambda names: tuple(name for name in names if name not in taken)
    k = k or free(rows[stacked + 1])
    taken |= set(k)
    return Cut(mapped, free(rows[stacked]), k, n)


def _entries(operand: Any) -> list[Names]:
    spec = [*operand.sharding.spec, *[None] * len(operand.shape)][: len(operand.shape)]
    return [e if isinstance(e, tuple) else () if e is None else (e,) for e in spec]


def _parts(problems: Sequence[Problem], mesh: Any, cut: Cut) -> tuple[Problem, ...]:
    """The problems of one device.

    Raises:
      ValueError: if k or n is cut elsewhere than at a multiple of the layout's tile.
    """
    count = lambda names: math.prod(mesh.shape[n] for n in names)
    m, k = count(cut.m), count(cut.k)
    return tuple(
        part(p, k, count(n))._replace(m=p.m // m) for p, n in zip(problems, cut.n, strict=True)
    )


def part(problem: Problem, k: int, n: int) -> Problem:
    """The problem of one of `k` shards along k by `n` along n.

    Raises:
      ValueError: if k or n is cut elsewhere than at a multiple of the layout's tile.
    """
    weight = problem.weight
    tiles = LAYOUTS[problem.layout].tile(weight)
    for axis, tile, shards in zip("kn", tiles, (k, n), strict=True):
        size = getattr(weight, axis)
        if shards > 1 and size % (shards * tile):
            raise ValueError(
                f"quantized_matmul: {shards} shards cannot cut {axis} = {size} of {weight} "
                f"in layout {problem.layout}: each must hold a multiple of {tile}; replicate the "
                f"weight along {axis}, or choose groups that divide"
            )
    return problem._replace(weight=weight._replace(k=weight.k // k, n=weight.n // n))
