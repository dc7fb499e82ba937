"""A matmul whose three GEMMs, the output and both gradients, each run on operands cast for it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from qjax import _compat, blocks, ops, products
from qjax.products import Axes
from qjax.qtensor import QTensor, dequantize
from qjax.training import casting, kernels
from qjax.training.recipes import Recipe

Operand = Any  # jax.Array or QTensor


class Dot(NamedTuple):
    """`lax.dot_general` of x and w; hashable. `side` is that of w."""

    numbers: Any
    side: int
    x_ndim: int
    w_ndim: int
    out_dtype: np.dtype
    out_sharding: Any
    x_sharding: Any
    w_sharding: Any

    def contracted(self) -> tuple[Axes, Axes, Axes, Axes, Axes, Axes]:
        """Which axes each GEMM contracts: of (x, w), then (g, w), then (x, g)."""
        x, w = self._of(1 - self.side)[0], self._of(self.side)[0]
        of_x, of_w = self._in_output(1 - self.side), self._in_output(self.side)
        return x, w, of_w, self._free(self.side), self._free(1 - self.side), of_x

    def output(self, x: Operand, w: Operand, extra: tuple) -> jax.Array:
        pair = (x, w) if self.side == 1 else (w, x)
        return _dot(*pair, self.numbers, self.out_dtype, self.out_sharding, 1 - self.side)

    def input_grad(self, g: Operand, w: Operand, extra: tuple, dtype: Any) -> jax.Array:
        return self._grad(g, w, 1 - self.side, dtype, self.x_sharding)

    def weight_grad(self, x: Operand, g: Operand, extra: tuple, dtype: Any) -> jax.Array:
        return self._grad(g, x, self.side, dtype, self.w_sharding, True)

    def _of(self, side: int) -> tuple[Axes, Axes]:
        contract, batch = self.numbers
        return tuple(contract[side]), tuple(batch[side])

    def _free(self, side: int) -> Axes:
        contract, batch = self._of(side)
        ndim = self.w_ndim if side == self.side else self.x_ndim
        return tuple(a for a in range(ndim) if a not in contract and a not in batch)

    def _in_output(self, side: int) -> Axes:
        """Where the free axes of the operand on `side` lie in the product."""
        start = len(self._of(0)[1]) + (len(self._free(0)) if side == 1 else 0)
        return tuple(range(start, start + len(self._free(side))))

    def _grad(
        self, g: Operand, other: Operand, side: int, dtype: Any, where: Any, stored: bool = False
    ) -> jax.Array:
        """The gradient of the operand on `side`: g times the other one, axes put back."""
        (mine, my_batch), (theirs, batch) = self._of(side), self._of(1 - side)
        free, shared = self._free(1 - side), tuple(range(len(batch)))
        pair = ((g, self._in_output(1 - side), shared), (other, free, batch))
        axes = [*self._free(side)], [mine[theirs.index(a)] for a in sorted(theirs)]
        turn = max(axes[0], default=-1) > min(
            axes[1], default=0
        )  # then nothing is transposed after
        first, second = pair[::-1] if turn else pair
        axes = [*my_batch, *axes[turn], *axes[1 - turn]]
        numbers = ((first[1], second[1]), (first[2], second[2]))
        if where is not None:
            spec = [*where.spec, *[None] * (len(axes) - len(where.spec))]
            where = NamedSharding(where.mesh, PartitionSpec(*(spec[a] for a in axes)))
        y = _dot(first[0], second[0], numbers, dtype, where, 0 if turn else 1, stored)
        return lax.transpose(y, np.argsort(axes).tolist())


class RaggedDot(NamedTuple):
    """`lax.ragged_dot` of rows x `[m, k]` and experts w `[e, k, n]`; `extra` holds group sizes."""

    out_dtype: np.dtype

    def contracted(self) -> tuple[Axes, Axes, Axes, Axes, Axes, Axes]:
        return (1,), (1,), (1,), (2,), (0,), (0,)

    def output(self, x: Operand, w: Operand, extra: tuple) -> jax.Array:
        return self._rows(x, w, extra, self.out_dtype)

    def input_grad(self, g: Operand, w: Operand, extra: tuple, dtype: Any) -> jax.Array:
        turn = lambda v: lax.transpose(v, (0, 2, 1))
        if isinstance(w, QTensor):
            block = blocks.align(w.block, 3)
            held = QTensor(turn(w.qvalue), turn(w.scale), None, None, None, w.format, (), w.dtype)
            return self._rows(g, _with_block(held, (block[0], block[2], block[1])), extra, dtype)
        return self._rows(g, turn(w), extra, dtype)

    def weight_grad(self, x: Operand, g: Operand, extra: tuple, dtype: Any) -> jax.Array:
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        after = all(isinstance(v, QTensor) and _is_constant(v, (0,)) for v in (x, g))
        a, b = (_codes(v) if after else _opened(v, x, g) for v in (x, g))
        y = lax.ragged_dot_general(a, b, extra[0], numbers, preferred_element_type=jnp.float32)
        if after:
            of_x = blocks.expand(x.scale, x.shape, x.block)
            of_g = blocks.expand(g.scale, g.shape, g.block)
            y = ops.times(ops.times(y, of_x[:, :, None]), of_g[:, None, :])
        return y.astype(dtype)

    def _rows(self, x: Operand, w: Operand, extra: tuple, dtype: Any) -> jax.Array:
        op = products.RaggedDot(None, np.dtype(np.float32))
        after = all(isinstance(v, QTensor) and _is_constant(v, (1,)) for v in (x, w))
        a, b = (_codes(v) if after else _opened(v, x, w) for v in (x, w))
        y = op(a, b, extra, jnp.float32)
        if after:
            y = ops.times(y, blocks.expand(x.scale, x.shape, x.block))
            y = ops.times(y, op.place_weight_scale(w.scale, w, x, extra))
        return y.astype(dtype)


def _with_block(q: QTensor, block: Sequence[int]) -> QTensor:
    return QTensor(q.qvalue, q.scale, None, None, None, q.format, blocks.trim(block), q.dtype)


def _codes(q: QTensor) -> jax.Array:
    """Codes in the dtype of what they stand for, which holds them exactly: ragged dots of FP8 and
    int8 are not to be had everywhere.
    """
    return q.qvalue.astype(q.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _opened(v: Operand, *pair: Operand) -> jax.Array:
    dtype = jnp.promote_types(*(p.dtype for p in pair))
    return (dequantize(v) if isinstance(v, QTensor) else v).astype(dtype)


def _is_constant(q: QTensor, contracted: Axes) -> bool:
    """Whether one scale holds for all that an output sums over."""
    block = blocks.align(q.block, q.ndim)
    return all(block[a] >= q.shape[a] for a in contracted)


def _dot(
    a: Operand,
    b: Operand,
    numbers: Any,
    dtype: Any,
    where: Any,
    scaled: int,
    stored: bool = False,
) -> jax.Array:
    """`lax.dot_general`, on codes where scales can follow, in `dtype`.

    XLA rewrites two forms to cuBLASLt FP8: a product of codes, whose scales follow, and codes times
    one scale of the whole tensor. cuBLASLt writes the dtype of the product, and a float32 product
    costs as much time in memory as FP8 saves: bfloat16 results come from bfloat16 products. Where
    each operand has one scale, theirs stand on operand `scaled`, and cuBLASLt applies them in
    float32. That shall be the one that several products share: XLA joins products that share an
    operand, which would then be none of FP8. A result that is `stored` as it is has no consumer to
    take scales of rows up: a kernel applies them where one runs.
    """
    of_a = products.Dot(numbers, 0, None, np.dtype(dtype), where)
    of_b = of_a._replace(weight_side=1)
    pair = ((a, numbers[0][0]), (b, numbers[0][1]))
    if not all(isinstance(q, QTensor) and _is_constant(q, axes) for q, axes in pair):
        if where is None and isinstance(a, QTensor) and isinstance(b, QTensor):
            y = kernels.product(a, b, numbers, dtype)
            if y is not None:
                return y
        y = of_a(_opened(b, a, b), _opened(a, a, b), (), jnp.float32)
        return y.astype(dtype)
    if stored and where is None:
        y = kernels.stored(a, b, numbers, dtype)
        if y is not None:
            return y
    integer = jnp.issubdtype(a.qvalue.dtype, jnp.integer)
    short = dtype == jnp.bfloat16 and not integer
    if short and a.scale.size == b.scale.size == 1:
        scale = lax.mul(a.scale.reshape(()), b.scale.reshape(())).astype(dtype)
        wide = [q.qvalue.astype(dtype) for q in (a, b)]
        wide[scaled] = wide[scaled] * scale
        return of_a(wide[1], wide[0], (), dtype)
    preferred = jnp.int32 if integer else jnp.bfloat16 if short else jnp.float32
    y = of_a(b.qvalue, a.qvalue, (), preferred).astype(jnp.float32)
    scales = of_a.place_weight_scale(a.scale, a, b, ()), of_b.place_weight_scale(b.scale, b, a, ())
    if all(s.size == 1 for s in scales):
        return ops.times(y, lax.mul(*scales)).astype(dtype)
    return ops.times(ops.times(y, scales[0]), scales[1]).astype(dtype)


class Held(NamedTuple):
    """What a matmul takes beside its operands, none of it differentiated.

    Attributes:
      w: casts of w for the output and for the gradient of x; `None` where there is none yet.
      amax: by operand "x", "w", "g", what its delayed scale is made from: a float32 scalar.
      layers: where in what was seen this use has its place.
      noise: uint32 [2], what the key of the stochastic rounding is folded from.
      extra: further operands of the op.
    """

    w: tuple[QTensor | None, QTensor | None]
    amax: dict[str, jax.Array]
    layers: tuple[jax.Array, ...]
    noise: jax.Array | None
    extra: tuple


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def matmul(
    op: Dot | RaggedDot, recipe: Recipe, x: jax.Array, w: jax.Array, held: Held, seen: Any
) -> tuple[jax.Array, Any]:
    """The product, and `seen` with the amax of x noted by maximum.

    The cotangent of `seen` is no derivative: on its way back through the program it notes the amax
    of the gradients, by maximum too. As `seen` runs through the program once, nothing is ever added
    to it. `None` where the recipe has no delayed scales.
    """
    return _forward(op, recipe, x, w, held, seen)[0]


def _forward(op: Any, recipe: Recipe, x: jax.Array, w: jax.Array, held: Held, seen: Any):
    x_out, w_out, _, w_in, x_grad, _ = op.contracted()
    whole = tuple(range(x.ndim))
    hows = (recipe.output[0], recipe.weight_grad[0])
    amax = held.amax.get("x")
    first, second = casting.cast_both(x, hows, (x_out, x_grad), whole, amax, _key(held, 0, x))
    ws = held.w
    if ws[0] is None or ws[1] is None:
        hows = (recipe.output[1], recipe.input_grad[1])
        whole = tuple(range(w.ndim))
        amax = held.amax.get("w")
        ws = casting.cast_both(w, hows, (w_out, w_in), whole, amax, _key(held, 2, w))
    y = op.output(first, ws[0], held.extra)
    if seen is not None:
        seen = _note(seen, held.layers, x)
    like = (jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))
    return (y, seen), (second, ws[1], held, like)


def _backward(op: Any, recipe: Recipe, saved: Any, cotangents: Any):
    x, w, held, like = saved
    g, seen = cotangents
    _, _, g_in, _, _, g_grad = op.contracted()
    hows = (recipe.input_grad[0], recipe.weight_grad[1])
    whole, amax = tuple(range(g.ndim)), held.amax.get("g")
    first, second = casting.cast_both(g, hows, (g_in, g_grad), whole, amax, _key(held, 4, g))
    dx = op.input_grad(first, w, held.extra, like[0].dtype)
    dw = op.weight_grad(x, second, held.extra, like[1].dtype)
    if seen is not None:
        seen = _note(seen, held.layers, g)
    return dx, dw, None, seen


matmul.defvjp(_forward, _backward)


def _note(seen: jax.Array, layers: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """`seen` with the amax of x at `layers`, by maximum."""
    top = casting.largest(x, x.shape).reshape(())
    return seen.at[layers].max(top) if layers else jnp.maximum(seen, top)


def _key(held: Held, cast: int, x: jax.Array) -> jax.Array | None:
    """The key of one cast of one use, of its own on every shard of a shard_map that x varies over
    (as far as its `check_vma` tells).
    """
    if held.noise is None:
        return None
    key = jax.random.key(cast)
    shard = (lax.axis_index(a).astype(jnp.uint32) for a in _compat.varying_axes(x))
    for part in (held.noise[0], held.noise[1], *shard):
        key = jax.random.fold_in(key, part)
    return key
