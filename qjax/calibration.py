"""calibrate: runs a model on batches and collects what algorithms want to know of its inputs."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax import tracing
from qjax.algorithms.base import Stats
from qjax.observing import Observer
from qjax.qtensor import is_qtensor
from qjax.recipe import Recipe
from qjax.run import quantized
from qjax.sites import find_sites
from qjax.spec import Spec
from qjax.statistics import add, empty, finished, merged
from qjax.token_masks import Mask
from qjax.transform import decide


class Args:
    """The arguments of one batch after the parameters, where some have names.

    Example:
      >>> qjax.Args(1, train=False)
      Args(1, train=False)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __repr__(self) -> str:
        named = [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"Args({', '.join([*map(repr, self.args), *named])})"

    @classmethod
    def of(cls, batch: Any) -> "Args":
        """A batch as Args: a tuple holds positional arguments, anything else is the only one."""
        if isinstance(batch, Args):
            return batch
        return cls(*batch) if type(batch) is tuple else cls(batch)


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe | Spec | str,
    *,
    mask: Callable[..., Any] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Stats]:
    """Collects, for each weight whose algorithm asks for it, statistics of its input.

    The unmodified model runs on each batch, in one jitted function per shape of batch; of the input
    x `[tokens, in]` of a weight only what `recipe` needs is kept, in float32:

        hessian = sum x^T x    mean_abs = mean |x|    max_abs = max |x|    second_moment = mean x^2

    Axes that the weight has and its input shares, layers of a scan and experts, stand in front.
    A weight that is used several times has the tokens of all uses. Weights with the same input (q,
    k and v) have the same Stats object. The model is float: `quantize_sequential` collects from
    activations of the quantized part instead. QTensors in `params` run on their codes.

    Args:
      fn: any function of pytrees, such as `model.apply`.
      params: its first argument.
      batches: each is a tuple of the other positional arguments, a single one, or `qjax.Args(...)`.
        Batches of the same shapes share one compilation. Under a mesh with Auto axes they may be
        sharded over tokens.
      recipe: which weights get which algorithm, as for `quantize_params`.
      mask: `mask(*args)` of a batch -> bool array, True for tokens that count, such as
        `lambda tokens: tokens != pad`. It belongs to every array argument whose leading axes are of
        its shape, and follows the data from there: elementwise and structural operations, lookups,
        matmuls and experts carry it; what a sum over tokens makes counts if any of them does; a
        loop's carry keeps the mask that it had at the start; sorting tokens, which mixes them,
        drops it. An operation that is not known keeps it on leading axes of equal length.
      progress: hands on the batches, and may show how far it is, such as `rich.progress.track`.

    Returns:
      Stats by path. They add up over batches: see `merge_stats`.

    Raises:
      ValueError: if there are no batches, a batch does not fit the function, no rule needs
        statistics, or a mask has another shape than any argument.

    Example:
      >>> params = {"w": jnp.ones((4, 2))}
      >>> recipe = qjax.Recipe(qjax.Rule("w", "int8", qjax.gptq()))
      >>> batches = [jnp.eye(4)[:3], jnp.eye(4)[:1]]
      >>> stats = qjax.calibrate(lambda p, x: x @ p["w"], params, batches, recipe)
      >>> jnp.diag(stats["w"].hessian).tolist(), float(stats["w"].count)
      ([2.0, 1.0, 1.0, 0.0], 4.0)
    """
    recipe, steps = Recipe.of(recipe), {}
    totals: dict[str, Stats] | None = None
    shared: dict[str, str] = {}
    for batch in progress(batches):
        call = Call.of(fn, params, batch, mask)
        if call.key not in steps:
            steps[call.key] = _step(call, recipe)
        step, aliases, shapes = steps[call.key]
        if totals is None:
            totals, shared = empty(shapes), aliases
        elif _shapes(totals) != _shapes(shapes):
            raise ValueError(
                "batches of different shapes use the weights differently, so their statistics do "
                "not add up; give batches with the same structure and Python values"
            )
        totals = step(totals, call.params, call.arrays)
    if totals is None:
        raise ValueError("calibrate: there are no batches; give at least one")
    done = {name: finished(total) for name, total in totals.items()}
    return {path: done[name] for path, name in shared.items()}


class Call:
    """One call of a function: its arrays, and what is static."""

    def __init__(self, fn: Any, params: Any, args: Args, mask: Any) -> None:
        leaves, self.tree = jax.tree.flatten((args.args, args.kwargs))
        self._dynamic = tuple(tracing.is_array(v) for v in leaves)
        self.arrays = [v for v, d in zip(leaves, self._dynamic, strict=True) if d]
        self._static = tuple(None if d else v for v, d in zip(leaves, self._dynamic, strict=True))
        self.fn, self.params, self._mask = fn, params, mask

    @classmethod
    def of(cls, fn: Any, params: Any, batch: Any, mask: Any) -> "Call":
        return cls(fn, params, Args.of(batch), mask)

    @property
    def key(self) -> Any:
        """Equal for calls that trace alike."""
        shapes = tuple((v.shape, str(v.dtype)) for v in self.arrays)
        return self.tree, self._static, shapes

    def arguments(self, arrays: list[Any]) -> tuple[tuple, dict]:
        """The positional and keyword arguments, with these arrays."""
        rest = iter(arrays)
        pairs = zip(self._dynamic, self._static, strict=True)
        leaves = [next(rest) if d else v for d, v in pairs]
        return jax.tree.unflatten(self.tree, leaves)

    def masks(self, arrays: list[Any]) -> list[Mask]:
        """The mask of each array: what `mask` returns, on every array that begins with its axes."""
        if self._mask is None:
            return [None] * len(arrays)
        args, kwargs = self.arguments(arrays)
        keep = jnp.asarray(self._mask(*args, **kwargs))
        fits = [v.shape[: keep.ndim] == keep.shape for v in arrays]
        if keep.dtype != jnp.bool_ or not any(fits):
            raise ValueError(
                f"the mask is {keep.dtype} of shape {keep.shape}; it must be bool, of the leading "
                f"axes of an argument; their shapes are {[v.shape for v in arrays]}"
            )
        return [
            keep.reshape(*keep.shape, *(1,) * (v.ndim - keep.ndim)) if fit else None
            for v, fit in zip(arrays, fits, strict=True)
        ]

    @functools.cached_property
    def sites(self) -> dict[str, Any]:
        """`find_sites` of the function: QTensors in the parameters are none."""
        args, kwargs = self.arguments(self.arrays)
        shape = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if hasattr(v, "dtype") else v
        dense = jax.tree.map(shape, self.params, is_leaf=is_qtensor)
        try:
            return find_sites(self.fn, dense, *args, **kwargs)
        except (TypeError, ValueError) as error:
            shapes = [f"{v.dtype}{list(v.shape)}" for v in self.arrays]
            raise ValueError(
                f"the function does not take a batch of {', '.join(shapes)}: {error}; a batch is a "
                "tuple of the arguments after params, a single one, or qjax.Args(...)"
            ) from error

    def trace(self) -> Any:
        """The jaxpr on (arrays of the parameters, arrays of the batch)."""
        args, kwargs = self.arguments(self.arrays)
        leaves, tree = jax.tree.flatten(((self.params, *args), kwargs))
        return tracing.trace(quantized(self.fn), leaves, tree, lambda v: v).jaxpr


def wanted(call: Call, recipe: Recipe) -> dict[str, Any]:
    """By path, the decision for each parameter whose algorithm needs statistics."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(call.params, is_leaf=is_qtensor)
    named = {tracing.param_path(p): v for p, v in leaves}
    decisions = decide(named, recipe, call.sites)
    found = {path: d for path, d in decisions.items() if d.needs}
    if not found:
        raise ValueError(
            "no rule of the recipe has an algorithm that needs statistics and matches a weight; "
            "quantize_params(params, recipe, sites) needs no calibration"
        )
    return found


def _step(call: Call, recipe: Recipe) -> tuple[Callable[..., Any], dict[str, str], Any]:
    """(totals, params, arrays) -> totals, jitted; which total each path has; their shapes."""
    needs = {path: d.needs for path, d in wanted(call, recipe).items()}
    jaxpr, aliases = call.trace(), {}

    def observe(params: Any, arrays: list[Any]) -> dict[str, Stats]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        named = [(tracing.param_path(p), v) for p, v in leaves if tracing.is_array(v)]
        observer = Observer(needs, {path: v.shape for path, v in named})
        values = [observer.tagged(path, v) for path, v in named]
        masks: list[Mask] = [None] * len(values)
        observer.run(jaxpr, [*values, *arrays], [*masks, *call.masks(arrays)])
        found, names = observer.totals(), {}
        for path, total in found.items():
            aliases[path] = names.setdefault(id(total), path)
        return {name: found[name] for name in dict.fromkeys(aliases.values())}

    shapes = jax.eval_shape(observe, call.params, call.arrays)
    missing = [path for path in needs if path not in aliases]
    if missing:
        raise ValueError(
            f"{missing[0]}: no matmul that can be observed uses it, so there are no statistics for "
            "its algorithm; give it a Rule without one"
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(totals: Any, params: Any, arrays: list[Any]) -> Any:
        seen = observe(params, arrays)
        return {name: add(totals[name], seen[name]) for name in totals}

    return step, dict(aliases), shapes


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [v.shape for v in jax.tree.leaves(tree)]


def merge_stats(a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    """The Stats of the batches of both, as if they had been seen in one run.

    Raises:
      ValueError: if they are of different parameters.

    Example:
      >>> one = {"w": qjax.Stats(max_abs=jnp.array([1.0, 5.0]), count=jnp.array(2.0))}
      >>> two = {"w": qjax.Stats(max_abs=jnp.array([3.0, 4.0]), count=jnp.array(1.0))}
      >>> both = merge_stats(one, two)["w"]
      >>> both.max_abs.tolist(), float(both.count)
      ([3.0, 5.0], 3.0)
    """
    odd = sorted(a.keys() ^ b.keys())
    if odd:
        raise ValueError(
            f"{odd[0]}: only one of the two has Stats of it; merge those of one recipe"
        )
    made: dict[tuple[int, int], Stats] = {}
    for path in a:
        pair = (id(a[path]), id(b[path]))
        if pair not in made:
            made[pair] = merged(a[path], b[path])
    return {path: made[id(a[path]), id(b[path])] for path in a}
