"""quantize_params: a parameter pytree in, a quantized one out."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.algorithms.base import Algorithm, Stats
from qjax.qtensor import dequantize, is_qtensor
from qjax.quantizing import quantize
from qjax.recipe import Recipe, Rule
from qjax.sites import Site
from qjax.solving import MIN_TOKENS, Solved, Task, solve
from qjax.spec import Spec
from qjax.tracing import param_path

Sites = Mapping[str, tuple[Site, ...]]


class Decision(NamedTuple):
    """What a recipe decides for a parameter: Spec, axes and algorithm, or why it is kept."""

    spec: Spec | None
    axis: tuple[int, ...] = ()
    batch_axis: tuple[int, ...] = ()
    kept: str = ""
    algorithm: Algorithm | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The fields of Stats that its algorithm reads."""
        return frozenset() if self.algorithm is None else self.algorithm.needs


def quantize_params(
    params: Any,
    recipe: Recipe | Spec | str,
    sites: Sites | None = None,
    stats: Mapping[str, Stats] | None = None,
    *,
    min_tokens: int = MIN_TOKENS,
    log: Callable[[Solved], None] | None = None,
) -> Any:
    """The parameter pytree with every weight that `recipe` names replaced by a QTensor.

    Pure: pytree in, pytree of the same structure out. What is not quantized is handed on as it is,
    and `report` lists why.

    Args:
      params: a pytree of arrays. QTensors in it are kept.
      recipe: a Recipe, or a Spec or spec string for every weight that a matmul uses (tables that
        are looked up are kept).
      sites: what `find_sites` returned for these parameters: it tells which axes are contracted.
        Without it each rule that quantizes must give `axis`.
      stats: what `calibrate` returned, for the algorithms that need it.
      min_tokens: an expert that saw fewer tokens is treated as if its input were white noise
        (hessian I, moments 1, the largest max_abs of all experts), which means round-to-nearest.
      log: called with what each algorithm did to each weight.

    Returns:
      The quantized pytree, ready for `quantized(fn)`.

    Raises:
      ValueError: naming the path, if a weight at a site is matched by no rule, a rule matches
        nothing, `sites` and `params` disagree, the contracted axis is ambiguous, a weight holds
        NaN or Inf, or an algorithm needs statistics that are missing, empty or not finite.

    Example:
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
      >>> sites = qjax.find_sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 8)))
      >>> qjax.quantize_params(params, "int8", sites)["w"]
      QTensor(int8, shape=(8, 4), block=(8, 1), dtype=float32)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    named = {param_path(p): v for p, v in leaves}
    decisions = decide(named, Recipe.of(recipe), sites)
    done = apply_decisions(named, decisions, sites, stats, min_tokens, log)
    return jax.tree.unflatten(tree, list(done.values()))


def apply_decisions(
    named: Mapping[str, Any],
    decisions: Mapping[str, Decision],
    sites: Sites | None,
    stats: Mapping[str, Stats] | None,
    min_tokens: int,
    log: Callable[[Solved], None] | None,
) -> dict[str, Any]:
    """What becomes of the named parameters, by path."""
    tasks = [
        _task(path, value, decisions[path], sites, stats)
        for path, value in named.items()
        if decisions[path].algorithm is not None
    ]
    solved = solve(tasks, min_tokens, log)
    return {
        path: solved[path] if path in solved else _apply(path, value, decisions[path])
        for path, value in named.items()
    }


def requantize_params(
    params: Any,
    recipe: Recipe | Spec | str,
    sites: Sites | None = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    log: Callable[[Solved], None] | None = None,
) -> tuple[Any, dict[str, Decision]]:
    """`quantize_params` where QTensors are quantized anew: the weights of a file held in codes.

    One weight after the other is dequantized, so that no float copy of all of them is made; codes
    that the recipe keeps stay as they are.

    Args:
      params: a pytree of arrays and QTensors.
      recipe, sites: as for `quantize_params`.
      progress: hands on the weights one by one, and may show how far it is.
      log: called with what an algorithm did to each weight.

    Returns:
      The quantized pytree, and by path what was decided.

    Raises:
      ValueError: as `quantize_params`.

    Example:
      >>> params = {"w": qjax.quantize(jnp.ones((8, 4)), "int8", axis=0)}
      >>> recipe = qjax.Recipe(qjax.Rule("w", "int4", axis=0))
      >>> requantize_params(params, recipe)[0]["w"].format
      'int4'
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    named = {param_path(p): leaf for p, leaf in leaves}
    dense = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_qtensor(leaf) else leaf
        for path, leaf in named.items()
    }
    decisions = decide(dense, Recipe.of(recipe), sites)

    def one(path: str, leaf: Any) -> Any:
        decision = decisions[path]
        again = decision.spec is not None and is_qtensor(leaf)
        value = dequantize(leaf) if again else leaf
        if decision.algorithm is None:
            return _apply(path, value, decision)
        return solve([_task(path, value, decision, None, None)], MIN_TOKENS, log)[path]

    done = [one(path, leaf) for path, leaf in progress(list(named.items()))]
    return jax.tree.unflatten(tree, done), decisions


def decide(params: Mapping[str, Any], recipe: Recipe, sites: Sites | None) -> dict[str, Decision]:
    """What `recipe` does with every parameter; raises where it leaves anything open."""
    used = sites or {}
    for path in used:
        if path not in params:
            raise ValueError(
                f"sites name {path!r}, which is not in the parameters{_close(path, params)}; "
                "give find_sites and quantize_params the same tree"
            )
    for rule in recipe.rules:
        if not rule.optional and not any(rule.matches(path, used.get(path, ())) for path in params):
            near = _close(_literal(rule.pattern), params)
            raise ValueError(
                f"rule {rule.pattern!r} matches no parameter{near}; "
                "mark it optional=True if that is meant"
            )
    return {path: _decide_one(path, value, recipe, sites) for path, value in params.items()}


def _literal(pattern: str) -> str:
    """A pattern without its operators, for comparing it with paths."""
    return "".join(c for c in pattern if c.isalnum() or c in "/_-")


def _decide_one(path: str, value: Any, recipe: Recipe, sites: Sites | None) -> Decision:
    if is_qtensor(value):
        return Decision(None, kept="already quantized")
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        return Decision(None, kept="not a floating-point array")
    uses = (sites or {}).get(path, ())
    rule = recipe.rule_for(path, uses)
    if sites is not None and not uses:
        return Decision(None, kept="no matmul and no lookup takes it directly")
    if rule is None:
        if sites is None:
            return Decision(None, kept="no rule matches it")
        raise ValueError(
            f"{path}: shape {tuple(value.shape)} is used by {uses[0].primitive}, but no rule "
            f"matches it; add Rule({path!r}, None) to leave it as it is"
        )
    if rule.spec is None:
        condition = (
            "" if rule.where is None else f" where {getattr(rule.where, '__name__', 'it says')}"
        )
        return Decision(None, kept=f"rule {rule.pattern!r}{condition} keeps it")
    assert isinstance(rule.spec, Spec)
    axis, batch = _axes(path, value, rule, uses)
    if not axis:
        return Decision(None, kept="its matmul contracts no axis of it")
    return Decision(rule.spec, axis, batch, algorithm=rule.algorithm)


def _axes(
    path: str, value: Any, rule: Rule, uses: Sequence[Site]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(contracted, batch) axes: matmuls decide; of a table that is only looked up, its rows."""
    dots = [site for site in uses if site.primitive != "gather"]
    stacked = {a for site in uses for a in site.stacked_axes}
    batch = tuple(sorted(stacked | {a for site in dots for a in site.batch_axes}))
    if rule.axis is not None:
        axis = (rule.axis,) if isinstance(rule.axis, int) else tuple(rule.axis)
        axis = tuple(a % value.ndim for a in axis)
        return axis, tuple(a for a in batch if a not in axis)
    if not uses:
        raise ValueError(
            f"{path}: shape {tuple(value.shape)} has no site that tells its contracted axis; "
            "give sites, or the rule an axis"
        )
    choices = sorted({site.contract_axes for site in dots}) or sorted(
        {site.free_axes[-1:] for site in uses}
    )
    if len(choices) > 1:
        raise ValueError(
            f"{path}: shape {tuple(value.shape)} is contracted over axes "
            f"{' and '.join(map(str, choices))} in different places; "
            "give its rule the axis along which scales are to be shared"
        )
    return choices[0], batch


def _task(
    path: str,
    value: Any,
    decision: Decision,
    sites: Sites | None,
    stats: Mapping[str, Stats] | None,
) -> Task:
    spec, algorithm = decision.spec, decision.algorithm
    assert spec is not None
    assert algorithm is not None
    uses = (sites or {}).get(path, ())
    key = tuple(sorted({site.input_key for site in uses if site.primitive != "gather"})) or None
    found = None if stats is None else stats.get(path)
    value = jnp.asarray(value)
    return Task(path, value, spec, decision.axis, decision.batch_axis, algorithm, found, key)


def _apply(path: str, value: Any, decision: Decision) -> Any:
    if decision.spec is None:
        return value
    try:
        return quantize(value, decision.spec, decision.axis, batch_axis=decision.batch_axis)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _close(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f" (close: {', '.join(near)})" if near else ""
