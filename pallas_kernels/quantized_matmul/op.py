"""quantized_matmul: the op as it is called, with its derivative, its vmap and its partitioning."""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul import partition, reference
from pallas_kernels.quantized_matmul.epilogue import ACTIVATIONS, finish
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Problem, Weight

Arrays: TypeAlias = dict[str, jax.Array]
Options: TypeAlias = tuple[Device | None, str | None]  # device, implementation
Config: TypeAlias = tuple[Any, ...]  # how an implementation cuts the work
Problems: TypeAlias = tuple[Problem, ...]  # of one x


def quantized_matmul(
    x: jax.Array,
    arrays: Arrays,
    weight: Weight,
    layout: str,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out: Any = None,
    implementation: str | None = None,
    config: Config | None = None,
    device: Device | None = None,
) -> jax.Array:
    """`y = activation(x @ w + bias)` with a quantized w.

    `w = (value(code) - zero) * scale + offset`, by groups.

    Differentiable in x and bias, forwards and backwards (through the dequantized weight). Under
    `vmap` over x alone the rows are one product; over the arrays it is a loop on the device, not
    unrolled. Under Auto mesh axes m, n and k (at multiples of the layout's tile, with a psum) and
    mapped axes are sharded as the operands are, and no operand is gathered.

    Args:
      x: `[m, k]` floats; or int8 codes, whose scales the caller multiplies to the result.
      arrays: "codes", "scale" and, where the weight has them, "zero" and "offset", in the order of
        `layout`.
      weight, layout: what the arrays hold, and a name in `LAYOUTS`.
      bias: `[n]` floats, added in float32.
      activation: a name in `epilogue.ACTIVATIONS`, applied in float32; None for nothing.
      out: dtype of the result; that of x if None (float32 for int8).
      implementation: a name in `IMPLEMENTATIONS["quantized_matmul"]`, taken or refused; None for
        the best that supports the problem.
      config: the `Config` of the named implementation's module by which each device is to cut its
        part of the work; None for what was measured, or its guess.
      device: where it will run; None for the default device.

    Returns:
      `[m, n]`.

    Raises:
      ValueError: if shapes, dtypes or names do not fit, the implementation cannot run this, or a
        config stands without the implementation's name.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"quantized_matmul: activation {activation!r} is none of {', '.join(ACTIVATIONS)}"
        )
    if config is not None and implementation is None:
        raise ValueError(f"quantized_matmul: {config} needs the name of its implementation")
    if bias is not None:
        if bias.shape != (weight.n,) or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(
                f"quantized_matmul: bias must be floats [{weight.n}] for {weight}, is "
                f"{bias.dtype}{list(bias.shape)}; give one float per output channel"
            )
        arrays = {**arrays, "bias": bias.astype(jnp.float32)}
    options = device, implementation
    (y,) = _joined(x, [arrays], [weight], layout, activation, out, options, config)
    return y


def joined_matmul(
    x: jax.Array,
    arrays: Sequence[Arrays],
    weights: Sequence[Weight],
    layout: str,
    *,
    out: Any = None,
    implementation: str | None = None,
    device: Device | None = None,
) -> list[jax.Array]:
    """`[x @ w for w in weights]`, one launch where the implementation has one for them.

    Everything else is as for `quantized_matmul`, which is this for a single weight. Weights keep
    their own arrays, so each is cut over a mesh for itself.

    Args:
      x: `[m, k]`.
      arrays, weights: of each weight; all have the k of x and lie in `layout`.
      layout, out, implementation, device: as for `quantized_matmul`.

    Returns:
      `[m, n]` of each weight.
    """
    return list(_joined(x, arrays, weights, layout, None, out, (device, implementation)))


def joins(problems: Sequence[Problem], device: Device | None = None) -> str | None:
    """None if these products of one x run as one launch, or the reason why they do not."""
    names = {choose("quantized_matmul", p, device) for p in problems}
    if len(names) > 1:
        return f"they run on {' and '.join(sorted(names))}"
    return IMPLEMENTATIONS["quantized_matmul"][names.pop()].joins(problems)


def _joined(
    x: jax.Array,
    arrays: Sequence[Arrays],
    weights: Sequence[Weight],
    layout: str,
    activation: str | None,
    out: Any,
    options: Options,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    if out is None:
        out = jnp.float32 if x.dtype == jnp.int8 else x.dtype
    out, problems = jnp.dtype(out).name, []
    for held, weight in zip(arrays, weights, strict=True):
        check(x, held, weight, layout)
        problem = Problem(x.shape[0], weight, layout, x.dtype.name, out, "bias" in held, activation)
        problem = problem._replace(config=config)
        choose("quantized_matmul", problem, *options)
        problems.append(problem)
    if x.shape[0] == 0:  # nothing to cut into blocks
        return tuple(jnp.zeros((0, weight.n), out) for weight in weights)
    return _once(x, tuple(arrays), tuple(problems), options)


@functools.partial(jax.jit, static_argnums=(2, 3))  # traced once for the layers of a model
def _once(
    x: jax.Array, arrays: tuple[Arrays, ...], problems: Problems, options: Options
) -> tuple[jax.Array, ...]:
    return _matmul(x, arrays, problems, options)


def check(
    x: jax.Array, arrays: Arrays, weight: Weight, layout: str, op: str = "quantized_matmul"
) -> None:
    """Whether the operands of a product fit together.

    Raises:
      ValueError: if not, in the name of `op`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    reason = LAYOUTS[layout].supports(weight)
    if reason is not None:
        raise ValueError(f"{op}: {weight} cannot lie in layout {layout}: {reason}")
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(
            f"{op}: x must be [m, {weight.k}] for {weight}, is {x.shape}; reshape it, "
            "or map over what is in front with vmap"
        )
    for name, wanted in LAYOUTS[layout].shapes(weight).items():
        got = arrays.get(name)
        if got is None or (got.shape, got.dtype.name) != (wanted.shape, wanted.dtype.name):
            raise ValueError(
                f"{op}: {name!r} of {weight} in layout {layout} must be "
                f"{wanted.dtype}{list(wanted.shape)}, is "
                f"{None if got is None else f'{got.dtype}{list(got.shape)}'}; pack it with the "
                "layout's pack_codes and pack_scale"
            )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _matmul(
    x: jax.Array, arrays: tuple[Arrays, ...], problems: Problems, options: Options
) -> tuple[jax.Array, ...]:
    return _mapped(problems, 0, options)(x, arrays)


@_matmul.defjvp
def _matmul_jvp(problems: Problems, options: Options, primals: tuple, tangents: tuple) -> Any:
    x, arrays = primals
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.dtype(jnp.float32)

    def tangent(held: Arrays, moved: Arrays, problem: Problem) -> jax.Array:
        w = reference.dequantize(held, problem.weight, problem.layout).astype(dtype)
        t = jnp.dot(tangents[0], w, preferred_element_type=jnp.float32)
        return t + moved["bias"][None] if problem.bias else t

    each = [tangent(*v) for v in zip(arrays, tangents[1], problems, strict=True)]
    if all(p.activation is None for p in problems):
        y = _matmul(x, arrays, problems, options)
        return y, tuple(t.astype(p.out) for t, p in zip(each, problems, strict=True))
    before = tuple(p._replace(activation=None, out="float32") for p in problems)
    sums, ys, moved = _matmul(x, arrays, before, options), [], []
    for z, t, problem in zip(sums, each, problems, strict=True):
        last = problem._replace(bias=False)
        y, t = jax.jvp(lambda z, last=last: finish(z, {}, last), (z,), (t,))
        ys.append(y)
        moved.append(t)
    return tuple(ys), tuple(moved)


def _mapped(problems: Problems, stacked: int, options: Options) -> Any:
    """The products with `stacked` mapped axes in front of all operands."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, arrays: tuple[Arrays, ...]) -> tuple[jax.Array, ...]:
        run = functools.partial(_run_stacked, stacked=stacked, options=options)
        names = [sorted(held) for held in arrays]
        return partition.partitioned(run, problems, stacked, names)(x, arrays)

    @call.def_vmap
    def _vmap(size: int, mapped: Any, x: jax.Array, arrays: tuple[Arrays, ...]) -> Any:
        everywhere = (True,) * len(problems)
        if not any(jax.tree.leaves(mapped[1])):  # more rows of x for the same weight
            m, k = problems[0].m, problems[0].weight.k
            rows = jnp.moveaxis(x, 0, stacked)
            rows = rows.reshape(*rows.shape[:stacked], size * m, k)
            more = tuple(p._replace(m=size * m) for p in problems)
            ys = [
                jnp.moveaxis(y.reshape(*y.shape[:stacked], size, m, y.shape[-1]), stacked, 0)
                for y in _mapped(more, stacked, options)(rows, arrays)
            ]
            return tuple(ys), everywhere
        spread = lambda v, is_mapped: v if is_mapped else jnp.broadcast_to(v, (size, *v.shape))
        x, arrays = spread(x, mapped[0]), jax.tree.map(spread, arrays, mapped[1])
        return _mapped(problems, stacked + 1, options)(x, arrays), everywhere

    return call


def _run_stacked(
    x: jax.Array, arrays: tuple[Arrays, ...], problems: Problems, stacked: int, options: Options
) -> tuple[jax.Array, ...]:
    run = functools.partial(_run, problems=problems, options=options)
    lead = x.shape[:stacked]
    if math.prod(lead) == 1:
        one = jax.tree.map(lambda v: v.reshape(v.shape[stacked:]), (x, arrays))
        ys = run(*one)
    else:
        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[stacked:]), (x, arrays))
        ys = lax.map(lambda operands: run(*operands), flat)
    return tuple(y.reshape(*lead, p.m, p.weight.n) for y, p in zip(ys, problems, strict=True))


def _run(
    x: jax.Array, arrays: tuple[Arrays, ...], problems: Problems, options: Options
) -> tuple[jax.Array, ...]:
    """The products of one device."""
    rows = IMPLEMENTATIONS["quantized_matmul"]
    names = [choose("quantized_matmul", p, *options) for p in problems]
    row = rows[names[0]]
    together = len(problems) > 1 and len(set(names)) == 1 and row.joins(problems) is None
    if together and row.run_joined is not None:
        return tuple(row.run_joined(x, arrays, problems))
    ys = []
    for name, held, problem in zip(names, arrays, problems, strict=True):
        ends = problem.bias or problem.activation is not None
        if ends and not rows[name].epilogue:
            ys.append(finish(rows[name].run(x, held, problem.plain), held, problem))
        else:
            ys.append(rows[name].run(x, held, problem))
    return tuple(ys)
