"""Kernels on a mesh with Auto axes: each device runs its part."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

BLOCK = 128
Cut = Mapping[str, tuple[str, ...]]  # logical axis -> the mesh axes that cut it


def on_mesh(
    run: Callable[..., Any],
    operands: Sequence[str],
    results: Sequence[str],
    part: Callable[..., Any] | None = None,
    summed: str = "",
) -> Callable[..., Any]:
    """`run` on arrays, which under Auto mesh axes runs on the part of each device; inside a
    `shard_map` arrays are such parts already.

    Logical axes are letters; "r" is an axis, "r/" one that has an entry per 128 of it. A device
    holds whole runs of 128 of each: where `divides` does not promise that, operands are gathered.
    So is the later one of two operands that one mesh axis cuts along different axes.

    Args:
      run: from operands to one array or a tuple; it sees whole operands or parts.
      operands, results: the logical axes of each, such as "r c/"; sizes are multiples of 128.
      part: (cut, *operands) -> what a device makes of its part, where that is not `run`.
      summed: logical axes that no result has.
    """
    if jax.device_count() == 1 or any(jax.sharding.get_abstract_mesh().manual_axes):
        return run
    given, made = [o.split() for o in operands], [r.split() for r in results]

    def call(*arrays: jax.Array) -> Any:
        return run(*arrays)

    def plan(mesh: Any, infos: Sequence[Any]) -> tuple[Cut, Any, Any]:
        cut, taken = {}, set()
        for names, info in zip(given, infos, strict=True):
            spec = [*info.sharding.spec, *[None] * len(names)][: len(names)]
            for axis, entry in zip(names, spec, strict=True):
                axis, entry = axis[0], entry if isinstance(entry, tuple) else (entry,)
                shards = math.prod(mesh.shape[n] for n in entry if n is not None)
                free = shards > 1 and not taken & set(entry)
                if axis not in cut and free:
                    cut[axis] = entry
                    taken |= set(entry)
        place = lambda axes: NamedSharding(mesh, PartitionSpec(*(cut.get(a[0]) for a in axes)))
        whole = [place(axes) for axes in made]
        return cut, tuple(map(place, given)), tuple(whole) if len(whole) > 1 else whole[0]

    def split(mesh: Any, args: Any, result: Any) -> tuple[Any, Any, Any, Any]:
        cut, parts, whole = plan(mesh, args)

        def one(*arrays: jax.Array) -> Any:
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # that of one device
                return run(*arrays) if part is None else part(cut, *arrays)

        return mesh, one, whole, parts

    def on(*arrays: jax.Array) -> Any:
        sizes = _sizes(given, [v.shape for v in arrays])
        if not all(map(divides, sizes.values())):
            return run(*arrays)
        rule, factors = _rule(given, made, sizes)
        op = custom_partitioning(call)
        op.def_partition(
            split,
            infer_sharding_from_operands=lambda mesh, args, result: plan(mesh, args)[2],
            sharding_rule=rule,
            reduction_factors=tuple(f"{a}t" for a in summed.split() if f"{a}t" in rule),
            **factors,  # pyright: ignore[reportArgumentType]
        )
        return op(*arrays)

    return on


def divides(size: int) -> bool:
    """Whether every mesh of jax's devices cuts an axis of this length into whole runs of 128."""
    return size % (BLOCK * jax.device_count()) == 0


def _sizes(operands: Sequence[Sequence[str]], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The length of each logical axis."""
    pairs = [
        p for names, s in zip(operands, shapes, strict=True) for p in zip(names, s, strict=True)
    ]
    found = {axis: size for axis, size in pairs if "/" not in axis}
    return {axis[0]: size * BLOCK for axis, size in pairs if "/" in axis} | found


def _rule(
    operands: Sequence[Sequence[str]], results: Sequence[Sequence[str]], sizes: dict[str, int]
) -> tuple[str, dict[str, int]]:
    """Shardy's rule, and the sizes of its factors: "rt" counts blocks of 128, "rb" is one."""
    factors: dict[str, int] = {}

    def dim(axis: str) -> str:
        name = axis[0]
        count, rest = divmod(sizes[name], BLOCK)
        if rest or count < 2:  # nothing to cut
            own = f"{name}n" if "/" not in axis else f"{name}u"
            return own
        if "/" in axis:
            return f"{name}t"
        factors.update({f"{name}t": count, f"{name}b": BLOCK})
        return f"({name}t {name}b)"

    sides = [", ".join(" ".join(map(dim, names)) for names in side) for side in (operands, results)]
    alone = {f"{axis[0]}t" for names in (*operands, *results) for axis in names if "/" in axis}
    return " -> ".join(sides), {f: size for f, size in factors.items() if f not in alone}
