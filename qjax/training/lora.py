"""LoRA: low-rank adapters beside frozen weights, quantized or not, of an unmodified model."""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax import _compat, run, tracing
from qjax.interpret import Decline, Table, Thread, interpret
from qjax.products import is_rows_by_experts
from qjax.qtensor import dequantize, is_qtensor
from qjax.recipe import Recipe
from qjax.recipes import ROUTER
from qjax.sites import Site
from qjax.spec import Spec
from qjax.transform import quantize_params

_MATMULS = ("dot_general", "ragged_dot_general")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to one weight: alpha / rank * a @ b, in the weight's own axes.

    Attributes:
      a: float32 `[*lead, *contracted, rank]`; `lead` are the weight's leading axes of stacked
        layers and of experts.
      b: float32 `[*lead, rank, *free]`.
      alpha: how strong it is, at any rank.
      contracted: the contracted axes of the weight, rising, counted from its end (negative).
    """

    a: Any
    b: Any
    alpha: float = dataclasses.field(metadata={"static": True})
    contracted: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def lead(self) -> int:
        """How many leading axes the weight has."""
        return self.a.ndim - 1 - len(self.contracted)

    def delta(self) -> jax.Array:
        """What the weight plus this adapter is more than the weight, float32."""
        lead, count = self.lead, len(self.contracted)
        batch = tuple(range(lead))
        numbers = (((self.a.ndim - 1,), (lead,)), (batch, batch))
        product = lax.dot_general(self.a, self.b, numbers, preferred_element_type=jnp.float32)
        places = tuple(a + product.ndim for a in self.contracted)
        return self.scaling * jnp.moveaxis(product, range(lead, lead + count), places)


Adapters = Mapping[str, Adapter]


def lora_init(
    key: jax.Array,
    params: Any,
    sites: Mapping[str, tuple[Site, ...]],
    rank: int,
    alpha: float | None = None,
    targets: str = ".*",
) -> dict[str, Adapter]:
    """Adapters that change nothing yet: a uniform in +-1/sqrt(inputs), b zero (Hu et al.).

    Args:
      key: of a.
      params: the parameters, QTensors included; only their shapes matter.
      sites: of `qjax.find_sites(fn, params, ...)`, before or after quantization.
      rank: of each adapter.
      alpha: adapters are scaled by alpha / rank; `rank` if None.
      targets: a regular expression on whole paths: of the weights that a matmul takes, all of those
        if left out, but for tables that are looked up as well and for routers.

    Returns:
      By path, an Adapter: the tree to differentiate, and to give to optax.

    Raises:
      ValueError: if `targets` matches no such weight, or the rank is not between 1 and the
        dimensions of each.

    Source: arXiv:2106.09685, initialized as PEFT does.

    Example:
      >>> fn = lambda params, x: x @ params["w"]
      >>> params, x = {"w": qjax.quantize(jnp.ones((64, 32)), "nf4_g64", axis=0)}, jnp.ones((2, 64))
      >>> sites = qjax.find_sites(fn, {"w": jnp.ones((64, 32))}, x)
      >>> adapters = qjax.training.lora_init(jax.random.key(0), params, sites, rank=4)
      >>> jax.tree.map(jnp.shape, adapters["w"].b)
      (4, 32)
      >>> y = qjax.training.lora(fn)(params, adapters, x)
      >>> bool(jnp.all(y == qjax.quantized(fn)(params, x)))
      True
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    shapes = {tracing.param_path(p): tuple(v.shape) for p, v in leaves if hasattr(v, "shape")}
    found = {}
    for i, (path, site) in enumerate(_targets(sites, targets).items()):
        contracted, free, lead = _axes(path, site, len(shapes[path]))
        inputs = math.prod(shapes[path][a] for a in contracted)
        outputs = math.prod(shapes[path][a] for a in free)
        if not 1 <= rank <= min(inputs, outputs):
            raise ValueError(
                f"{path}: a rank of {rank} does not fit a weight of {inputs} inputs and {outputs} "
                f"outputs; take 1 to {min(inputs, outputs)}"
            )
        front = shapes[path][:lead]
        bound = 1 / math.sqrt(inputs)
        shape = (*front, *(shapes[path][a] for a in contracted), rank)
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        b = jnp.zeros((*front, rank, *(shapes[path][a] for a in free)), jnp.float32)
        ends = tuple(axis - len(shapes[path]) for axis in contracted)
        found[path] = Adapter(a, b, float(rank if alpha is None else alpha), ends)
    return found


def loftq(
    params: Any,
    recipe: Recipe | Spec | str,
    sites: Mapping[str, tuple[Site, ...]],
    rank: int,
    alpha: float | None = None,
    targets: str = ".*",
    iterations: int = 5,
) -> tuple[Any, dict[str, Adapter]]:
    """Quantized parameters, and adapters that begin with what rounding took away.

    From a @ b = 0, `iterations` times: Q = quantize(W - a @ b), then a @ b = the best approximation
    of W - Q of the rank, by singular values (LoftQ, arXiv:2310.08659, algorithm 1).

    Args:
      params: the parameters in floating point.
      recipe: as for `qjax.quantize_params`.
      sites, rank, alpha, targets: as for `lora_init`.
      iterations: 1 leaves the codes as they would be without adapters.

    Returns:
      (quantized parameters, adapters by path).

    Example:
      >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> sites = qjax.find_sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 64)))
      >>> q, adapters = qjax.training.loftq(params, "int3_g32", sites, rank=16)
      >>> error = lambda tree: float(jnp.linalg.norm(tree["w"] - params["w"]))
      >>> before = error({"w": qjax.dequantize(qjax.quantize(params["w"], "int3_g32", 0))})
      >>> error(qjax.training.lora_merge(q, adapters)) < 0.6 * before
      True
    """
    adapters = lora_init(jax.random.key(0), params, sites, rank, alpha, targets)
    adapters = {p: dataclasses.replace(v, a=jnp.zeros_like(v.a)) for p, v in adapters.items()}
    qparams = params
    for _ in range(iterations):
        qparams = quantize_params(_shifted(params, adapters, -1), recipe, sites)
        rest = dict(_named(jax.tree.map(_rest, params, qparams, is_leaf=is_qtensor)))
        adapters = {path: _nearest(rest[path], v) for path, v in adapters.items()}
    return qparams, adapters


def lora(fn: Callable[..., Any], dropout: float = 0.0) -> Callable[..., Any]:
    """`fn` with adapters: `(params, adapters, *args, dropout_key=None, **kwargs)`.

    Where a matmul takes a weight w that has an adapter, y = x @ w + scaling * (drop(x) @ a) @ b;
    x @ w runs as `qjax.quantized` runs it. QTensors get no gradient; adapters do, and so do plain
    arrays that are differentiated. A weight that the model uses in another way (transposed, sliced,
    looked up) is opened, as w + scaling * a @ b, without dropout.

    Args:
      fn: any function of `(params, *args, **kwargs)`, not modified.
      dropout: the share of the adapter's inputs that is set to zero, the others divided by
        1 - dropout; only in calls that give a `dropout_key`.

    Raises:
      ValueError: naming the path, if an adapter is of no parameter, or does not fit its shape.

    Example: see `lora_init`.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, is {dropout}")

    @functools.wraps(fn)
    def call(
        params: Any, adapters: Adapters, *args: Any, dropout_key: Any = None, **kwargs: Any
    ) -> Any:
        named = _named((params, *args), is_leaf=is_qtensor, skip=1)
        known = dict(_named(params))
        _check(known, adapters)
        leaves, tree = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_qtensor)
        count = len(known)
        paths = [p for p, _ in named]
        traced = tracing.trace(fn, leaves, tree, run.dense_leaf)
        boxes = []
        for i, v in enumerate(leaves):
            if not (tracing.is_array(v) or is_qtensor(v)):
                continue
            held = run.Box(lax.stop_gradient(v), None) if is_qtensor(v) else v
            adapter = adapters.get(paths[i]) if i < count else None
            boxes.append(held if adapter is None else _Adapted(held, adapter))
        drop = _Drop(dropout, dropout_key) if dropout and dropout_key is not None else None
        thread = Thread(jnp.zeros((), jnp.uint32), lambda v, n: (v, False), lambda v: v)
        outputs = interpret(_table(drop, thread if drop else None), traced.jaxpr, boxes)
        close = lambda v: _opened(v) if isinstance(v, (_Adapted, run.Box)) else v
        return traced.rebuild([close(v) for v in outputs])

    return call


def lora_merge(params: Any, adapters: Adapters) -> Any:
    """The parameters in floating point with each adapter added to its weight.

    w + scaling * a @ b in float32, rounded to the dtype of w; a QTensor is dequantized. Give the
    result to `qjax.quantize_params` to quantize it anew. Parameters without an adapter stay as they
    are, QTensors included.

    Raises:
      ValueError: naming the path, if an adapter is of no parameter, or does not fit its shape.
    """
    _check(dict(_named(params)), adapters)
    return _shifted(params, adapters, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Adapted:
    """A weight (an array, or a Box) on its way through a jaxpr with its adapter."""

    held: Any
    adapter: Adapter


@dataclasses.dataclass(frozen=True)
class _Drop:
    rate: float
    key: Any


def _opened(v: Any) -> jax.Array:
    if isinstance(v, run.Box):
        return dequantize(v.tensor)
    if isinstance(v, _Adapted):
        w = _opened(v.held)
        return (w.astype(jnp.float32) + v.adapter.delta()).astype(w.dtype)
    return v


def _table(drop: _Drop | None, thread: Thread | None) -> Table:
    base = run.run_table(None)

    def slice_leading(v: Any) -> Any:
        if isinstance(v, run.Box):
            return base.slice_leading(v)
        cut = base.slice_leading(v.held) if isinstance(v.held, run.Box) else v.held
        return None if cut is None or not v.adapter.lead else dataclasses.replace(v, held=cut)

    def shard(v: Any, spec: Any, mesh: Any) -> Any:
        return base.shard(v, spec, mesh) if isinstance(v, run.Box) else None

    def rule(name: str, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
        found = [v for v in inputs if isinstance(v, _Adapted)]
        if not found:
            return _frozen(base, eqn, inputs)
        if len(found) > 1 or name not in _RULES:
            return Decline(f"{name} has no rule for a weight with an adapter")
        ys = _base_rule(base, eqn, [v.held if isinstance(v, _Adapted) else v for v in inputs])
        return _RULES[name](eqn, inputs, found[0], ys, functools.partial(_dropped, drop, thread))

    names = {*base.rules, *_RULES}
    rules = {name: functools.partial(rule, name) for name in names}
    is_box = lambda v: isinstance(v, (run.Box, _Adapted))
    open_box = lambda v, eqn, reason: _opened(v)
    return Table(is_box, rules, open_box, slice_leading, shard, thread=thread)


def _base_rule(base: Table, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any]:
    """What the equation gives on the weight alone."""
    if any(isinstance(v, run.Box) for v in inputs):
        ys = _frozen(base, eqn, inputs)
        if not isinstance(ys, Decline):
            return ys
    return _compat.bind(eqn, [_opened(v) for v in inputs])


class _Declined(Exception):
    pass


def _frozen(base: Table, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    """What a rule gives on quantized weights, which the backward pass opens once more.

    The gradient to x needs the weight in floating point. Kept from the forward pass, a model's
    weights are all held at once, in the memory that their codes were to save.
    """
    name = eqn.primitive.name
    if name not in base.rules:
        return Decline("no rule")
    if name not in _MATMULS:
        return base.rules[name](eqn, inputs)

    def product(*inputs: Any) -> list[Any]:
        ys = base.rules[name](eqn, list(inputs))
        if isinstance(ys, Decline):
            raise _Declined(ys)
        return ys

    try:
        return jax.checkpoint(product)(*inputs)
    except _Declined as why:
        return why.args[0]


def _dropped(drop: _Drop | None, thread: Thread | None, x: jax.Array) -> jax.Array:
    """X with some of its elements set to zero; every use has a mask of its own."""
    if drop is None or thread is None:
        return x
    key = jax.random.fold_in(drop.key, thread.value)
    for axis in _compat.varying_axes(x):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    thread.value = thread.value + jnp.ones((), jnp.uint32)
    kept = jax.random.bernoulli(key, 1 - drop.rate, x.shape)
    return jnp.where(kept, x / (1 - drop.rate), jnp.zeros((), x.dtype))


Dropped = Callable[[jax.Array], jax.Array]


def _converted(
    eqn: _compat.JaxprEqn, inputs: list[Any], box: _Adapted, ys: list[Any], dropped: Dropped
) -> list[Any] | Decline:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return Decline("it is converted to integers")
    return [dataclasses.replace(box, held=ys[0])]


def _dot_general(
    eqn: _compat.JaxprEqn, inputs: list[Any], box: _Adapted, ys: list[Any], dropped: Dropped
) -> list[Any] | Decline:
    side = 0 if inputs[0] is box else 1
    x, adapter = inputs[1 - side], box.adapter
    if isinstance(x, run.Box) or not jnp.issubdtype(x.dtype, jnp.floating):
        return Decline("the other operand is no floating-point array")
    (contracts, batches) = eqn.params["dimension_numbers"]
    wc, xc, wb, xb = contracts[side], contracts[1 - side], batches[side], batches[1 - side]
    lead, ndim = adapter.lead, adapter.a.ndim + adapter.b.ndim - 2 - adapter.lead
    mine = tuple(a + ndim for a in adapter.contracted)
    if sorted(wc) != list(mine) or sorted(wb) != list(range(lead)):
        return Decline("the matmul contracts other axes than the adapter")
    a, b = (v.astype(x.dtype) for v in (adapter.a, adapter.b))
    numbers = ((xc, tuple(lead + mine.index(axis) for axis in wc)), (xb, wb))
    inner = lax.dot_general(dropped(x), a, numbers)
    numbers = (((inner.ndim - 1,), (lead,)), (tuple(range(lead)), wb))
    more = lax.dot_general(inner, b, numbers, preferred_element_type=jnp.float32)
    if side == 0:  # the weight's axes come first
        free = b.ndim - lead - 1
        more = jnp.moveaxis(more, range(more.ndim - free, more.ndim), range(lead, lead + free))
    return [ys[0] + (adapter.scaling * more).astype(ys[0].dtype)]


def _ragged_dot(
    eqn: _compat.JaxprEqn, inputs: list[Any], box: _Adapted, ys: list[Any], dropped: Dropped
) -> list[Any] | Decline:
    x, w, sizes = inputs
    if w is not box or not is_rows_by_experts(eqn.params):
        return Decline("it is not the experts of a ragged dot of rows by experts")
    a, b = (v.astype(x.dtype) for v in (box.adapter.a, box.adapter.b))
    inner = lax.ragged_dot(dropped(x), a, sizes)
    more = lax.ragged_dot(inner, b, sizes, preferred_element_type=jnp.float32)
    return [ys[0] + (box.adapter.scaling * more).astype(ys[0].dtype)]


_RULES = {
    "convert_element_type": _converted,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
}


def _targets(sites: Mapping[str, tuple[Site, ...]], targets: str) -> dict[str, Site]:
    found = {}
    for path, uses in sites.items():
        matmuls = [s for s in uses if s.primitive in _MATMULS]
        plain = len(matmuls) == len(uses) and not re.fullmatch(ROUTER, path)
        if matmuls and re.fullmatch(targets, path) and (plain or targets != ".*"):
            found[path] = matmuls[0]
    if not found:
        near = difflib.get_close_matches(targets, list(sites), n=3, cutoff=0.3)
        hint = f" (close: {', '.join(near)})" if near else ""
        raise ValueError(f"targets={targets!r} matches no weight that a matmul takes{hint}")
    return found


def _axes(path: str, site: Site, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(contracted, free, how many leading) axes of a weight."""
    front = sorted((*site.stacked_axes, *site.batch_axes))
    contracted = tuple(sorted(site.contract_axes))
    if front != list(range(len(front))) or not contracted:
        raise ValueError(
            f"{path}: axes {front} are stacked or run in parallel; an adapter needs them to lead, "
            "and a contracted one; leave the weight out of `targets`"
        )
    free = tuple(a for a in range(ndim) if a not in front and a not in contracted)
    return contracted, free, len(front)


def _named(tree: Any, is_leaf: Any = is_qtensor, skip: int = 0) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tracing.param_path(path[skip:]), v) for path, v in leaves]


def _check(params: Mapping[str, Any], adapters: Adapters) -> None:
    for path, adapter in adapters.items():
        if path not in params:
            near = difflib.get_close_matches(path, list(params), n=3, cutoff=0.3)
            hint = f" (close: {', '.join(near)})" if near else ""
            raise ValueError(f"there is an adapter of {path!r}, but no such parameter{hint}")
        fits = jax.eval_shape(adapter.delta).shape
        if fits != tuple(params[path].shape):
            raise ValueError(
                f"{path}: the adapter is of a weight of shape {fits}, the parameter has "
                f"{tuple(params[path].shape)}"
            )


def _shifted(params: Any, adapters: Adapters, sign: int) -> Any:
    def one(path: Any, w: Any) -> Any:
        adapter = adapters.get(tracing.param_path(path))
        if adapter is None:
            return w
        dense = dequantize(w) if is_qtensor(w) else w
        return (dense.astype(jnp.float32) + sign * adapter.delta()).astype(dense.dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)


def _rest(w: Any, q: Any) -> Any:
    return w.astype(jnp.float32) - dequantize(q).astype(jnp.float32) if is_qtensor(q) else w * 0


def _nearest(rest: jax.Array, like: Adapter) -> Adapter:
    """The adapter of `like`'s shape whose delta is nearest to `rest`."""
    lead, rank = like.lead, like.rank
    places = tuple(a + rest.ndim for a in like.contracted)
    turned = jnp.moveaxis(rest, places, range(lead, lead + len(places)))
    inputs = math.prod(turned.shape[lead : lead + len(places)])
    u, s, v = jnp.linalg.svd(turned.reshape(*turned.shape[:lead], inputs, -1), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a = u[..., :rank] * root[..., None, :]
    b = root[..., :, None] * v[..., :rank, :] / like.scaling
    return dataclasses.replace(like, a=a.reshape(like.a.shape), b=b.reshape(like.b.shape))
