"""Products of x in int8 codes and weights prepared for Hopper, outlier features beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import choose
from pallas_kernels.int8_matmul.op import int8_matmul
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul.op import quantized_matmul
from pallas_kernels.quantized_matmul.problem import Weight
from qjax import prepared_products
from qjax.prepared import Prepared
from qjax.products import Dot


def serves(p: Prepared) -> bool:
    """Whether x in codes goes through here: what multiplies on a CPU takes codes itself."""
    return p.layout == "hopper8"


def path(x: jax.Array, p: Prepared, dot: Dot) -> str:
    """The implementation and the layout."""
    assert p.activation is not None
    problem = prepared_products.problem_of(x, p, dot)
    count = 0 if p.activation.threshold is None else _budget(p)
    name = choose("int8_matmul", Problem(problem.m, problem.weight, p.layout, count, problem.out))
    outliers = "" if p.activation.threshold is None else _described(p)
    if name != "reference":
        return f"{name} on int8 in {p.layout}{outliers}"
    rows = problem._replace(m=problem.m * (2 if outliers else 1), x="bfloat16", out="float32")
    return f"{prepared_products.path(rows, p)}{outliers}"


def _described(p: Prepared) -> str:
    assert p.activation is not None
    return f", outliers from {p.activation.threshold:g} apart, {_budget(p)} at once"


def _budget(p: Prepared) -> int:
    """How many outlier features are multiplied in the launch of the others."""
    assert p.activation is not None
    return min(p.activation.budget or 64, p.local().weight.k)


def product(
    codes: jax.Array, scale: jax.Array, *beside: jax.Array, p: Prepared, dot: Dot
) -> jax.Array:
    """`dot` of `codes * scale`, and of the outlier features of x in floats, with the weight.

    Args:
      codes: int8, in the shape of x, zero where a feature is an outlier.
      scale: float32, of length 1 along the contracted axes.
      beside: x, and which features are outliers, of length 1 along the rows; or nothing.
      p: the weight.
      dot: what is computed.
    """
    contracted = dot.axes(1 - dot.weight_side)[0]
    shape = [1 if a in contracted else n for a, n in enumerate(codes.shape)]

    def call(xs: Any, arrays: Any, weight: Weight) -> jax.Array:
        return _rows(*xs, arrays=arrays, weight=weight, p=p, out=dot.out_dtype)

    return prepared_products.placed(call, (codes, jnp.broadcast_to(scale, shape), *beside), p, dot)


def _rows(
    codes: jax.Array,
    scale: jax.Array,
    *beside: jax.Array,
    arrays: Any,
    weight: Weight,
    p: Prepared,
    out: Any,
) -> jax.Array:
    """Of one matrix: codes and x `[m, k]`, scale `[m, 1]`, which are outliers `[1, k]`."""
    problem = Problem(
        codes.shape[0], weight, p.layout, _budget(p) if beside else 0, jnp.dtype(out).name
    )
    floats: Any = lambda x: quantized_matmul(x, arrays, weight, p.layout, out=jnp.float32)
    ints: Any = lambda outliers: int8_matmul(
        codes, scale[:, 0], arrays, weight, p.layout, outliers=outliers, out=out
    )
    fits = not beside or beside[0].dtype == jnp.bfloat16
    if not fits or choose("int8_matmul", problem) == "reference":
        return _in_floats(codes, scale, *beside, floats=floats).astype(out)
    if not beside:
        return ints(None)
    x, outlier = beside
    count = jnp.cumsum(outlier.astype(jnp.int32), axis=1)  # [1, k]
    # so many features come before the one after c outliers: one kernel, jnp.nonzero takes three
    numbers = lax.broadcasted_iota(jnp.int32, (problem.outliers, 1), 0)
    at = jnp.sum(count <= numbers, axis=1, dtype=jnp.int32)
    y = ints((jnp.take(x, at, axis=1, mode="fill", fill_value=0), at))
    more = outlier & (count > problem.outliers)

    def added() -> jax.Array:
        rest = floats(jnp.where(more, x, jnp.zeros_like(x)))
        return (y.astype(jnp.float32) + rest).astype(out)

    return lax.cond(jnp.any(more), added, lambda: y)


def _in_floats(
    codes: jax.Array, scale: jax.Array, *beside: jax.Array, floats: Callable[..., jax.Array]
) -> jax.Array:
    """The same by products of x in bfloat16, which holds all codes; one if outliers fit it too."""
    rows, m = codes.astype(jnp.bfloat16), codes.shape[0]
    if not beside:
        return floats(rows) * scale
    x, outlier = beside
    apart = jnp.where(outlier, x, jnp.zeros_like(x))
    if x.dtype != rows.dtype:
        return floats(rows) * scale + floats(apart)
    y = floats(jnp.concatenate([rows, apart]))
    return y[:m] * scale + y[m:]
