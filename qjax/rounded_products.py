"""Products of x in int8 codes and weights prepared for Hopper, outlier features beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import choose
from pallas_kernels.int8_matmul.op import int8_matmul
from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.mapping import looped
from pallas_kernels.quantized_matmul.op import quantized_matmul
from pallas_kernels.quantized_matmul.problem import Problem as Product
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
    product, apart = prepared_products.problem_of(x, p, dot), p.activation.threshold is not None
    count = _budget(p) if apart else 0
    problem = Problem(product.m, product.weight, p.layout, count, product.out)
    way = _way(problem, x.dtype if apart else None)
    outliers = _described(p) if apart else ""
    if way != "in floats":
        return f"{way} on int8 in {p.layout}{outliers}"
    return f"{prepared_products.path(_floats(problem), p)}{outliers}"


def _way(problem: Problem, outliers: Any) -> str:
    """The implementation of `int8_matmul`, or "in floats": with few rows or on several devices by a
    kernel that takes x in bfloat16, as outliers of that dtype (None: there are none) allow.
    """
    plain = outliers in (None, jnp.bfloat16)
    name = choose("int8_matmul", problem) if plain else "reference"
    if name != "reference" or not plain:
        return name
    return name if choose("quantized_matmul", _floats(problem)) == name else "in floats"


def _floats(problem: Problem) -> Product:
    """Codes, and outliers as rows of their own, in bfloat16."""
    rows = problem.m * (2 if problem.outliers else 1)
    return Product(rows, problem.weight, problem.layout, "bfloat16", "float32")


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
        def run(codes: jax.Array, scale: jax.Array, *rest: jax.Array) -> jax.Array:
            held = dict(zip(arrays, rest[len(beside) :], strict=True))
            first = rest[: len(beside)]
            return _rows(codes, scale, *first, arrays=held, weight=weight, p=p, out=dot.out_dtype)

        return looped(run)(*xs, *arrays.values())  # under a plain vmap `cond` runs both branches

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
        codes, scale[:, 0], arrays, weight, p.layout, outliers=outliers, out=out, implementation=way
    )
    way = _way(problem, beside[0].dtype if beside else None)
    if way == "in floats":
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
    """The same by one product of x in bfloat16, which holds all codes."""
    rows, m = codes.astype(jnp.bfloat16), codes.shape[0]
    if not beside:
        return floats(rows) * scale
    x, outlier = beside
    y = floats(jnp.concatenate([rows, jnp.where(outlier, x, jnp.zeros_like(x))]))
    return y[:m] * scale + y[m:]
