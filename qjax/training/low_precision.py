"""fp8: any loss function with its matmuls on parameters in FP8, INT8 or FP4; state explicit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax import _compat, sites, tracing
from qjax.interpret import interpret
from qjax.run import Explanation
from qjax.run import Use as Line
from qjax.training import casting
from qjax.training.recipes import Recipe, Use, plan
from qjax.training.state import State, empty, merged, scale_amax, updated
from qjax.training.table import Casts, Record, Weight, table
from qjax.training.thread import threading


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CastParam:
    """A parameter and its casts, made once for many calls: a leaf of what `prepare` returns."""

    value: Any
    casts: dict[str, Casts]
    amax: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


@dataclasses.dataclass(frozen=True)
class FP8:
    """A loss function in low precision; what `fp8` returns. All methods are pure and jit.

    Attributes:
      loss_fn: `(params, *args, **kwargs) -> loss`, or `(loss, aux)`.
      recipe: what runs in which precision.
      has_aux, argnums: as for `jax.value_and_grad`, counted on the arguments of `loss_fn`.
    """

    loss_fn: Callable[..., Any]
    recipe: Recipe
    has_aux: bool = False
    argnums: int | Sequence[int] = 0

    def init(self, params: Any, *args: Any, **kwargs: Any) -> State:
        """The state before the first step; arrays may be ShapeDtypeStructs.

        Raises:
          ValueError: if no matmul of the loss function takes one of `params`.
        """
        leaves, tree = _flatten(params, args, kwargs)
        traced = tracing.trace(self.loss_fn, [v for _, v in leaves], tree, lambda v: v)
        return empty(_found(self, traced.jaxpr, leaves, params)[0])

    def __call__(self, params: Any, state: State, *args: Any, **kwargs: Any) -> Any:
        """What `loss_fn` returns, for users of `jax.grad`: nothing is observed."""
        prepared = self.prepare(params, state)
        dense = _dense(prepared)
        return _run(self, prepared, state, _seen(state), (dense, *args), kwargs)[0]

    def prepare(self, params: Any, state: State) -> Any:
        """The parameters with their casts, to hand to the other methods in place of `params`.

        They cast the weights once per call; this does it once for many, such as the microbatches
        of a step.
        """
        uses: dict[str, list[Use]] = {}
        for use in state.uses:
            if use.recipe is not None:
                uses.setdefault(use.site.path, []).append(use)
        amax = scale_amax(state)

        def one(path: Any, leaf: Any) -> Any:
            name = tracing.param_path(path)
            found = uses.get(name, [])
            for use in found:
                if use.shape != leaf.shape:
                    raise ValueError(
                        f"the state is of another model: it has {name} of shape {use.shape}, the "
                        f"parameters one of shape {leaf.shape}; make one with init"
                    )
            return leaf if not found or _is_cast(leaf) else _cast_param(leaf, found, amax)

        return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_cast)

    def grads(self, params: Any, state: State, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """(value, gradients, what was seen), of one microbatch.

        `value` is what `loss_fn` returns. The gradients have the structure and dtypes of `params`
        (or of the arguments that `argnums` names). What was seen goes to `merge` and `update`;
        across devices it is reduced by `jax.lax.pmax`.
        """
        prepared = self.prepare(params, state)

        def objective(seen: Any, *inner: Any) -> tuple[Any, Any]:
            output, after = _run(self, prepared, state, seen, inner, kwargs)
            loss = output[0] if self.has_aux else output
            return loss, (output, after)

        single = isinstance(self.argnums, int)
        of = (self.argnums,) if isinstance(self.argnums, int) else tuple(self.argnums)
        argnums = (0, *(1 + n % (1 + len(args)) for n in of))
        run = jax.value_and_grad(objective, argnums, has_aux=True)
        dense = _dense(prepared)
        (_, (output, x)), (g, *grads) = run(_seen(state), dense, *args)
        params_amax = [v.amax for v in jax.tree.leaves(prepared, is_leaf=_is_cast) if _is_cast(v)]
        w = {key: top for by_key in params_amax for key, top in by_key.items()}
        seen = {key: {"x": x[key], "w": w[key], "g": g[key]} for key in x}
        return output, grads[0] if single else tuple(grads), seen

    def value_and_grad(
        self, params: Any, state: State, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, State]:
        """(value, gradients, the next state): `grads` and `update` of a step of one microbatch."""
        value, grads, seen = self.grads(params, state, *args, **kwargs)
        return value, grads, self.update(state, seen)

    def merge(self, *seen: Any) -> Any:
        """What several microbatches or shards saw, by maximum."""
        return merged(*seen)

    def update(self, state: State, seen: Any) -> State:
        """The next state, once per optimizer step. An amax that is not finite is left out."""
        return updated(state, seen)

    def explain(self, params: Any, *args: Any, **kwargs: Any) -> Explanation:
        """What runs how, per use of a parameter that a matmul takes; nothing is computed."""
        leaves, tree = _flatten(params, args, kwargs)
        arrays = [i for i, (_, v) in enumerate(leaves) if tracing.is_array(v)]
        lines: dict[Any, Line] = {}
        keep = []

        def record(box: Weight, eqn: _compat.JaxprEqn, how: str) -> None:
            line = Line(box.path, eqn.primitive.name, box.value.shape, self.recipe.name, how)
            lines.setdefault((id(eqn), line), line)

        def run(values: list[Any]) -> Any:
            full = [v for _, v in leaves]
            for i, v in zip(arrays, values, strict=True):
                full[i] = v
            (dense, *inner), kw = jax.tree.unflatten(tree, full)
            start = self.init(dense, *inner, **kw)
            prepared = self.prepare(dense, start)
            inner = (dense, *inner)
            return tracing.arrays_of(
                _run(self, prepared, start, _seen(start), inner, kw, record, keep)[0]
            )

        jax.eval_shape(run, [leaves[i][1] for i in arrays])
        return Explanation(tuple(lines.values()))


def fp8(
    loss_fn: Callable[..., Any],
    recipe: Recipe | str = "current",
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
) -> FP8:
    """`loss_fn` with every matmul that takes a parameter in low precision, gradients included.

    A matmul y = x @ w becomes three: y = x @ w, dx = g @ w^T and dw = x^T @ g, each on operands
    cast as the recipe says, and summed in float32. The model is not changed; parameters stay in
    their dtype and are cast once per call, outside of loops and rematerialization. What else the
    model does with a parameter, or a matmul inside its own `custom_vjp`, runs as it is.

    Args:
      loss_fn: `(params, *args, **kwargs) -> loss`; with `has_aux`, `(loss, aux)`.
      recipe: a `Recipe` or a name: "current", "delayed", "rowwise",
        "rowwise_high_precision_wgrad", "block", "mxfp8", "nvfp4" or "int8".
      has_aux, argnums: as for `jax.value_and_grad`.

    Returns:
      An `FP8`, whose methods take the explicit state that its `init` returns.

    Raises:
      ValueError: if the recipe is unknown, or a state is that of another model or recipe.

    *Deviations*: until an amax was seen, delayed scales are 1, as in TransformerEngine; call
    `grads` and `update` on the first batch before the first step to start from real ones. Under a
    delayed scale Inf saturates; NaN never does. The noise of stochastic rounding depends on the
    step and on the count of uses before it, so calls of `grads` with one state share it.

    Example:
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)
      >>> params = {"up": jnp.ones((8, 16)) / 8, "down": jnp.ones((16, 4)) / 16}
      >>> x, y = jnp.ones((2, 8)), jnp.zeros((2, 4))
      >>> low = qjax.training.fp8(loss_fn, "rowwise")
      >>> state = low.init(params, x, y)
      >>> loss, grads, state = jax.jit(low.value_and_grad)(params, state, x, y)
      >>> print(low.explain(params, x, y))
      path  primitive    weight  format   how
      up    dot_general  8x16    rowwise  rowwise
      down  dot_general  16x4    rowwise  dense: kept: the last matmul
    """
    return FP8(loss_fn, Recipe.of(recipe), has_aux, argnums)


def _is_cast(leaf: Any) -> bool:
    return isinstance(leaf, CastParam)


def _dense(prepared: Any) -> Any:
    return jax.tree.map(lambda v: v.value if _is_cast(v) else v, prepared, is_leaf=_is_cast)


def _flatten(params: Any, args: tuple, kwargs: dict) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(((params, *args), kwargs))


def _found(
    low: FP8, jaxpr: Any, leaves: Sequence[tuple[Any, Any]], params: Any
) -> tuple[tuple[Use, ...], dict[tuple[int, str], Use]]:
    """What becomes of each use, in program order, and by equation and path."""
    count = len(jax.tree.leaves(params))
    arrays = [(i, p, v) for i, (p, v) in enumerate(leaves) if tracing.is_array(v)]
    float_param = lambda i, v: i < count and jnp.issubdtype(v.dtype, jnp.floating)
    paths = [tracing.param_path(p[2:]) if float_param(i, v) else None for i, p, v in arrays]
    found = sites.walk(jaxpr, [v for _, _, v in arrays], paths)
    keys, seen = {}, {}
    for at, site in found.items():
        seen[site.path] = seen.get(site.path, 0) + 1
        keys[at] = site.path if seen[site.path] == 1 else f"{site.path}#{seen[site.path]}"
    shapes = {p: tuple(v.shape) for p, (_, _, v) in zip(paths, arrays, strict=True) if p}
    uses = plan({keys[at]: site for at, site in found.items()}, shapes, low.recipe)
    return uses, dict(zip(found, uses, strict=True))


def _seen(start: State) -> dict[str, jax.Array]:
    return {key: jnp.zeros(by["x"].shape[1:], jnp.float32) for key, by in start.history.items()}


def _cast_param(leaf: Any, uses: Sequence[Use], amax: Any) -> CastParam:
    casts, tops = {}, {}
    fixed = jax.lax.stop_gradient(leaf)
    for use in uses:
        assert use.recipe is not None
        site = use.site
        whole = tuple(
            a
            for a in range(leaf.ndim)
            if a in (*site.contract_axes, *site.free_axes, *site.batch_axes)
            and a not in site.stacked_axes
        )
        known = amax.get(use.key)
        given = None if known is None else _on_axes(known["w"], site.stacked_axes, leaf.ndim)
        hows = (use.recipe.output[1], use.recipe.input_grad[1])
        axes = (site.contract_axes, site.free_axes)
        pair = casting.cast_both(fixed, hows, axes, whole, given)
        casts[use.key] = tuple(q if isinstance(q, casting.QTensor) else None for q in pair)
        if use.recipe.delayed:
            tops[use.key] = _amax(fixed, site.stacked_axes)
    return CastParam(leaf, casts, tops)


def _amax(leaf: jax.Array, stacked: Sequence[int]) -> jax.Array:
    """The largest magnitude of each layer, float32 with the stacked axes in their order."""
    block = [1 if a in stacked else max(n, 1) for a, n in enumerate(leaf.shape)]
    top = casting.largest(leaf, block)
    return top.transpose((*stacked, *(a for a in range(leaf.ndim) if a not in stacked))).reshape(
        [leaf.shape[a] for a in stacked]
    )


def _on_axes(values: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """One value per index of some axes of an array, to broadcast against it."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    turned = values.transpose(order)
    return turned.reshape([values.shape[axes.index(a)] if a in axes else 1 for a in range(ndim)])


def _run(
    low: FP8,
    prepared: Any,
    start: State,
    seen: dict[str, jax.Array],
    args: tuple,
    kwargs: dict,
    record: Record = lambda box, eqn, how: None,
    keep: list | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """What the loss function returns on `args`, the dense parameters first, and what was seen."""
    params = args[0]
    leaves, tree = _flatten(params, args[1:], kwargs)
    traced = tracing.trace(low.loss_fn, [v for _, v in leaves], tree, lambda v: v)
    if keep is not None:
        keep.append(traced.jaxpr)
    uses, at = _found(low, traced.jaxpr, leaves, params)
    if uses != start.uses:
        raise ValueError(_mismatch(uses, start.uses))
    casts = iter(jax.tree.leaves(prepared, is_leaf=_is_cast))
    boxes, count, used = [], len(jax.tree.leaves(params)), {u.site.path for u in uses}
    for i, (path, value) in enumerate(leaves):
        held = next(casts) if i < count else None
        name = tracing.param_path(path[2:])
        if isinstance(held, CastParam):
            value = Weight(value, held.casts, (), name)
        elif name in used and held is not None:
            value = Weight(value, {}, (), name)
        if tracing.is_array(value) or isinstance(value, Weight):
            boxes.append(value)
    thread = threading(start, seen)
    outputs = interpret(table(at, thread, record), traced.jaxpr, boxes)
    values = [v.value if isinstance(v, Weight) else v for v in outputs]
    return traced.rebuild(values), thread.value["seen"]


def _mismatch(found: Sequence[Use], held: Sequence[Use]) -> str:
    for a, b in zip(found, held, strict=False):
        if a != b:
            return (
                f"the state is of another model or recipe: it has {b.key} of shape {b.shape} in "
                f"{b.recipe.name if b.recipe else 'full precision'}, the loss function {a.key} of "
                f"shape {a.shape} in {a.recipe.name if a.recipe else 'full precision'}; make one "
                "with init"
            )
    return (
        f"the state is of another model: it has {len(held)} uses of parameters, the loss function "
        f"{len(found)}; make one with init"
    )
