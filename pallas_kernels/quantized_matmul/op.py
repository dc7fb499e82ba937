"""quantized_matmul: the op as it is called, with its derivative, its vmap and its partitioning."""

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import partition, reference
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem, Weight

Arrays: TypeAlias = dict[str, jax.Array]
Options: TypeAlias = tuple[Device | None, str | None]  # device, implementation


def quantized_matmul(
    x: jax.Array,
    arrays: Arrays,
    weight: Weight,
    layout: str,
    *,
    out: Any = None,
    implementation: str | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`y = x @ w` with a quantized w, `w = (value(code) - zero) * scale + offset` by groups.

    Differentiable in x, forwards and backwards (through the dequantized weight). Under `vmap` over
    x alone the rows are one product; over the arrays it is a loop on the device, not unrolled.
    Under Auto mesh axes m, n and k (at multiples of the layout's tile, with a psum) and mapped axes
    are sharded as the operands are, and no operand is gathered.

    Args:
      x: `[m, k]` floats; or int8 codes, whose scales the caller multiplies to the result.
      arrays: "codes", "scale" and, where the weight has them, "zero" and "offset", in the order of
        `layout`.
      weight, layout: what the arrays hold, and a name in `LAYOUTS`.
      out: dtype of the result; that of x if None (float32 for int8).
      implementation: a name in `IMPLEMENTATIONS["quantized_matmul"]`, taken or refused; None for
        the best that supports the problem.
      device: where it will run; None for the default device.

    Returns:
      `[m, n]`.

    Raises:
      ValueError: if shapes, dtypes or names do not fit, or the implementation cannot run this.
    """
    if out is None:
        out = jnp.float32 if x.dtype == jnp.int8 else x.dtype
    _check(x, arrays, weight, layout)
    problem = Problem(x.shape[0], weight, layout, x.dtype.name, jnp.dtype(out).name)
    choose("quantized_matmul", problem, device, implementation)
    if problem.m == 0:  # nothing to cut into blocks
        return jnp.zeros((0, weight.n), problem.out)
    return _matmul(x, arrays, problem, (device, implementation))


def _check(x: jax.Array, arrays: Arrays, weight: Weight, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"quantized_matmul: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    reason = LAYOUTS[layout].supports(weight)
    if reason is not None:
        raise ValueError(f"quantized_matmul: {weight} cannot lie in layout {layout}: {reason}")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(
            f"quantized_matmul: x must be [m, {weight.k}] for {weight}, is {x.shape}; reshape it, "
            "or map over what is in front with vmap"
        )
    for name, wanted in LAYOUTS[layout].shapes(weight).items():
        got = arrays.get(name)
        if got is None or (got.shape, got.dtype.name) != (wanted.shape, wanted.dtype.name):
            raise ValueError(
                f"quantized_matmul: {name!r} of {weight} in layout {layout} must be "
                f"{wanted.dtype}{list(wanted.shape)}, is "
                f"{None if got is None else f'{got.dtype}{list(got.shape)}'}; pack it with the "
                "layout's pack_codes and pack_scale"
            )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, arrays: Arrays, problem: Problem, options: Options) -> jax.Array:
    return _mapped(problem, 0, options)(x, arrays)


@_matmul.defjvp
def _matmul_jvp(problem: Problem, options: Options, primals: tuple, tangents: tuple) -> Any:
    x, arrays = primals
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.dtype(jnp.float32)
    w = reference.dequantize(arrays, problem.weight, problem.layout).astype(dtype)
    tangent = jnp.dot(tangents[0], w, preferred_element_type=jnp.float32).astype(problem.out)
    return _matmul(x, arrays, problem, options), tangent


def _mapped(problem: Problem, stacked: int, options: Options) -> Any:
    """The product with `stacked` mapped axes in front of all operands."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, arrays: Arrays) -> jax.Array:
        run = functools.partial(_run_stacked, problem=problem, stacked=stacked, options=options)
        return partition.partitioned(run, problem, stacked, sorted(arrays))(x, arrays)

    @call.def_vmap
    def _vmap(size: int, mapped: Any, x: jax.Array, arrays: Arrays) -> tuple[jax.Array, bool]:
        if not any(mapped[1].values()):  # more rows of x for the same weight
            rows = jnp.moveaxis(x, 0, stacked)
            rows = rows.reshape(*rows.shape[:stacked], size * problem.m, problem.weight.k)
            y = _mapped(problem._replace(m=size * problem.m), stacked, options)(rows, arrays)
            y = y.reshape(*y.shape[:stacked], size, problem.m, problem.weight.n)
            return jnp.moveaxis(y, stacked, 0), True
        spread = lambda v, is_mapped: v if is_mapped else jnp.broadcast_to(v, (size, *v.shape))
        x, arrays = spread(x, mapped[0]), jax.tree.map(spread, arrays, mapped[1])
        return _mapped(problem, stacked + 1, options)(x, arrays), True

    return call


def _run_stacked(
    x: jax.Array, arrays: Arrays, problem: Problem, stacked: int, options: Options
) -> jax.Array:
    name = choose("quantized_matmul", problem, *options)
    run = IMPLEMENTATIONS["quantized_matmul"][name].run
    lead = x.shape[:stacked]
    if math.prod(lead) == 1:
        one = jax.tree.map(lambda v: v.reshape(v.shape[stacked:]), (x, arrays))
        return run(*one, problem).reshape(*lead, problem.m, problem.weight.n)
    flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[stacked:]), (x, arrays))
    y = lax.map(lambda operands: run(*operands, problem), flat)
    return y.reshape(*lead, *y.shape[1:])
