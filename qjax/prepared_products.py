"""Matmuls on prepared weights: x in the order of a kernel, its result in that of the matmul."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.dispatch import choose
from pallas_kernels.norm_matmul.op import norm_matmul
from pallas_kernels.norm_matmul.problem import Problem as NormMatmul
from pallas_kernels.quantized_matmul.op import joined_matmul, joins, quantized_matmul
from pallas_kernels.quantized_matmul.partition import part as check_part
from pallas_kernels.quantized_matmul.problem import Problem
from qjax import _compat
from qjax.prepared import Prepared
from qjax.products import Axes, Dot, Op, RaggedDot
from qjax.qtensor import Quantized


def alike(x: jax.Array, products: Sequence[tuple[Quantized, Dot]]) -> list[int]:
    """Which of these products with x can be one op with the first: prepared weights without layers
    that differ in their channels only.
    """

    def kind(q: Quantized, dot: Dot) -> Any:
        if not isinstance(q, Prepared) or q.lead or q.activation is not None:
            return None
        if unfit(x, q, dot) is not None or _out_sharding(x, q, dot) is not None:
            return None
        weight = q.local().weight._replace(n=0)
        return q.layout, weight, _order(x, q, dot), dot.out_dtype

    kinds = [kind(q, dot) for q, dot in products]
    return [i for i, k in enumerate(kinds) if k is not None and k == kinds[0]]


def joined(x: jax.Array, products: Sequence[tuple[Any, Dot]]) -> tuple[list[jax.Array], str, bool]:
    """Products that are `alike`, the name of their path, and whether they are one launch."""
    parts = [(p.local(), dot) for p, dot in products]
    problems = [problem_of(x, p, dot) for p, dot in parts]
    first, dot = parts[0]
    ys = joined_matmul(
        _as_rows(x, first, dot),
        [p.operands() for p, _ in parts],
        [p.weight for p, _ in parts],
        first.layout,
        out=dot.out_dtype,
    )
    shaped = [_as_result(y, x, p, dot) for y, (p, dot) in zip(ys, parts, strict=True)]
    return shaped, path(problems[0], first), joins(problems) is None


def normed(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    epsilon: float,
    weights: Sequence[Quantized],
    gate: str | None,
) -> tuple[list[jax.Array], str] | None:
    """`x + y` and its RMSNorm by each weight `[k, n]` (`gate(first) * second` of two with a gate),
    and the name of their path; None where that is no launch of its own.

    x and y are `[..., k]`, scale is `[k]`.
    """
    held = [q for q in weights if isinstance(q, Prepared)]
    last = Dot((((x.ndim - 1,), (0,)), ((), ())), 1, None, x.dtype)
    if len(held) < len(weights) or len(alike(x, [(q, last) for q in held])) < len(held):
        return None
    parts, rows = [q.local() for q in held], x.size // x.shape[-1]
    layout, kinds = parts[0].layout, tuple(p.weight for p in parts)
    problem = NormMatmul(rows, epsilon, kinds, layout, x.dtype.name, x.dtype.name, gate)
    name = choose("norm_matmul", problem)
    if name == "reference":
        return None
    x_rows, y_rows = x.reshape(rows, -1), y.reshape(rows, -1)
    arrays = [p.operands() for p in parts]
    total, ys = norm_matmul(x_rows, y_rows, scale, epsilon, arrays, kinds, layout, gate=gate)
    results = [v.reshape(*x.shape[:-1], -1) for v in (total, *ys)]
    return results, f"{name} on {layout} behind its norm{' and before its gate' if gate else ''}"


def unfit(x: jax.Array, p: Prepared, op: Op) -> str | None:
    """Why a prepared weight cannot be multiplied as it lies."""
    lead = len(p.lead)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the other operand is {x.dtype}"
    if isinstance(op, RaggedDot):
        if p.activation is not None or p.explicit_sharding() is not None or lead != 1:
            return "kernels run experts of plain activations on Auto mesh axes only"
        return None if p.k_axes == (0,) else "it was prepared for another contraction"
    if not isinstance(op, Dot):
        return "kernels run plain matmuls only"
    contracted, batch = op.axes(op.weight_side)
    if any(a >= lead for a in batch):
        return "the matmul runs in parallel over an axis that was prepared as k or n"
    if sorted(contracted) != sorted(lead + a for a in p.k_axes):
        return "it was prepared for another contraction"
    return None


def problem_of(x: jax.Array, p: Prepared, dot: Dot) -> Problem:
    """What the kernel is asked for, of one layer."""
    weight = p.local().weight
    spec = None if p.activation is None else p.activation.spec
    dtype = x.dtype if spec is None else "int8" if spec.format == "int8" else "float32"
    m = math.prod(x.shape[a] for a in dot.rows(x))
    return Problem(m, weight, p.layout, jnp.dtype(dtype).name, jnp.dtype(dot.out_dtype).name)


def path(problem: Problem, p: Prepared) -> str:
    """The implementation and the layout; and what of the weight is packed anew in every call."""
    opened = ", its quantized scales opened in the call" if p.nested else ""
    return f"{choose('quantized_matmul', problem)} on {p.layout}{opened}"


def experts(x: jax.Array, p: Prepared, op: RaggedDot, extra: tuple) -> tuple[jax.Array, str]:
    """Rows `[m, k]` by the experts that they belong to; rows beyond the last group are zeros.

    With fewer rows than experts each row is multiplied with its own expert's arrays; else each
    expert that has rows is multiplied with all of them, and its own are kept.
    """
    (sizes,), p = extra, p.local()
    (m, _), (experts,), arrays = x.shape, p.lead, p.operands()
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(m, dtype=ends.dtype)
    owner = jnp.searchsorted(ends, rows, side="right").astype(jnp.int32)
    one = lambda x, held: quantized_matmul(x, held, p.weight, p.layout, out=op.out_dtype)
    if m < experts:

        def row(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            cut = lambda v: lax.dynamic_index_in_dim(v, pair[1], keepdims=False)
            y = one(pair[0][None], jax.tree.map(cut, arrays))[0]
            return jnp.where(pair[1] < experts, y, jnp.zeros_like(y))

        y = lax.map(row, (x, owner))
    else:

        def step(y: jax.Array, expert: Any) -> tuple[jax.Array, None]:
            number, size, held = expert
            run = lambda: jnp.where((owner == number)[:, None], one(x, held), y)
            return lax.cond(size > 0, run, lambda: y), None

        start = jnp.zeros((m, p.weight.n), op.out_dtype)
        y, _ = lax.scan(step, start, (jnp.arange(experts, dtype=jnp.int32), sizes, arrays))
    order = [p.n_axes.index(a) for a in sorted(p.n_axes)]
    y = lax.transpose(y.reshape(m, *(p.inner[a] for a in p.n_axes)), [0, *(1 + a for a in order)])
    problem = Problem(
        1 if m < experts else m, p.weight, p.layout, x.dtype.name, np.dtype(op.out_dtype).name
    )
    by = "row by row" if m < experts else "expert by expert"
    return y, f"{path(problem, p)}, {by}"


def product(x: jax.Array, p: Prepared, dot: Dot, out: Any) -> jax.Array:
    """`dot` on the kernel."""
    call = lambda x, arrays, weight: quantized_matmul(x, arrays, weight, p.layout, out=out)
    return placed(call, x, p, dot)


def placed(call: Callable[..., jax.Array], xs: Any, p: Prepared, dot: Dot) -> jax.Array:
    """`call(rows [m, k] of each of xs, arrays, weight)`, and the result's axes where they belong.

    xs are x, or a tuple of it and arrays of its shape or with axes of length 1 for rows or k. An
    axis of layers that x does not have is mapped over with all of xs.
    """
    x = jax.tree.leaves(xs)[0]

    def run(xs: Any, p: Prepared) -> jax.Array:
        of_w, weight = _meets(p, dot), p.weight
        mapped: Any = lambda xs, arrays: call(xs, arrays, weight)
        for a in reversed(range(len(p.lead))):
            mapped = jax.vmap(mapped, (0 if a in of_w else None, 0))
        rows = jax.tree.map(lambda v: _as_rows(v, p, dot), xs)
        return _as_result(mapped(rows, p.operands()), x, p, dot)

    where = _out_sharding(x, p, dot)
    if where is None:
        return run(xs, p.local())
    _check_cut(x, p, dot)
    under_auto: Any = jax.sharding.auto_axes(run, out_sharding=where)
    return under_auto(xs, p.local())


def _meets(p: Prepared, dot: Dot) -> dict[int, int]:
    """The axis of x that each contracted or parallel axis of the weight meets."""
    (w_contract, w_batch), (x_contract, x_batch) = (
        dot.axes(side) for side in (dot.weight_side, 1 - dot.weight_side)
    )
    return dict(zip((*w_contract, *w_batch), (*x_contract, *x_batch), strict=True))


def _order(x: jax.Array, p: Prepared, dot: Dot) -> tuple[Axes, Axes, Axes]:
    """The axes of x that are layers, rows and k."""
    of_w, lead = _meets(p, dot), len(p.lead)
    layers = tuple(of_w[a] for a in range(lead) if a in of_w)
    return layers, dot.rows(x), tuple(of_w[lead + a] for a in p.k_axes)


def _as_rows(x: jax.Array, p: Prepared, dot: Dot) -> jax.Array:
    """`[*layers, m, k]`."""
    layers, rows, k = _order(x, p, dot)
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (rows, k)]
    ordered = lax.transpose(x, [*layers, *rows, *k])
    return ordered.reshape(*(x.shape[a] for a in layers), *sizes)


def _as_result(y: jax.Array, x: jax.Array, p: Prepared, dot: Dot) -> jax.Array:
    """`[*lead, m, n]` as `dot` orders its result."""
    side, of_w, lead = dot.weight_side, _meets(p, dot), len(p.lead)
    rows = [x.shape[a] for a in dot.rows(x)]
    y = y.reshape(*p.lead, *rows, *(p.inner[a] for a in p.n_axes))
    first = lead + len(rows)
    channels = [a for a in range(lead) if a not in of_w]
    channels += [first + p.n_axes.index(a) for a in sorted(p.n_axes)]
    middle = list(range(lead, first))
    after = [*channels, *middle] if side == 0 else [*middle, *channels]
    return lax.transpose(y, [*dot.axes(side)[1], *after])


def _check_cut(x: jax.Array, p: Prepared, dot: Dot) -> None:
    """Raises ValueError if Explicit mesh axes cut k or n elsewhere than between tiles."""
    of_x, (k, n) = _compat.explicit_shards(x), p.explicit_cut()
    of_k = math.prod(of_x[a] for a in _order(x, p, dot)[2])
    check_part(problem_of(x, p, dot), max(k, of_k), n)


def _out_sharding(x: jax.Array, p: Prepared, dot: Dot) -> Any:
    """The sharding of the result where the mesh has Explicit axes: kernels run under Auto ones."""
    of_x, of_p = _compat.explicit_sharding(x), p.explicit_sharding()
    if of_x is None and of_p is None:
        return None
    if dot.out_sharding is not None:
        return dot.out_sharding
    parts = []
    for side, v, where in ((dot.weight_side, p, of_p), (1 - dot.weight_side, x, of_x)):
        spec = [None] * v.ndim if where is None else [*where.spec, *[None] * v.ndim]
        contracted, batch = dot.axes(side)
        free = [spec[a] for a in range(v.ndim) if a not in (*contracted, *batch)]
        parts.append(([spec[a] for a in batch], free))
    layers = [a or b for a, b in zip(parts[0][0], parts[1][0], strict=True)]
    frees = parts if dot.weight_side == 0 else parts[::-1]
    mesh = (of_x or of_p).mesh  # pyright: ignore[reportOptionalMemberAccess]
    return NamedSharding(mesh, PartitionSpec(*layers, *frees[0][1], *frees[1][1]))
