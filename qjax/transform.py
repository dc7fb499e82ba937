"""quantize_params: a parameter pytree in, a quantized one out."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qjax.qtensor import is_qtensor
from qjax.quantizing import quantize
from qjax.recipe import Recipe, Rule
from qjax.sites import Site
from qjax.spec import Spec
from qjax.tracing import param_path

Sites = Mapping[str, tuple[Site, ...]]


class Decision(NamedTuple):
    """What a recipe decides for a parameter: Spec and axes to quantize with, or why it is kept."""

    spec: Spec | None
    axis: tuple[int, ...] = ()
    batch_axis: tuple[int, ...] = ()
    kept: str = ""


def quantize_params(params: Any, recipe: Recipe | Spec | str, sites: Sites | None = None) -> Any:
    """The parameter pytree with every weight that `recipe` names replaced by a QTensor.

    Pure: pytree in, pytree of the same structure out. What is not quantized is handed on as it is,
    and `report` lists why.

    Args:
      params: a pytree of arrays. QTensors in it are kept.
      recipe: a Recipe, or a Spec or spec string for every weight that a matmul uses (tables that
        are looked up are kept).
      sites: what `find_sites` returned for these parameters: it tells which axes are contracted.
        Without it each rule that quantizes must give `axis`.

    Returns:
      The quantized pytree, ready for `quantized(fn)`.

    Raises:
      ValueError: naming the path, if a weight at a site is matched by no rule, a rule matches
        nothing, `sites` and `params` disagree, the contracted axis is ambiguous, or a weight holds
        NaN or Inf.

    Example:
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
      >>> sites = qjax.find_sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 8)))
      >>> qjax.quantize_params(params, "int8", sites)["w"]
      QTensor(int8, shape=(8, 4), block=(8, 1), dtype=float32)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    paths = [param_path(p) for p, _ in leaves]
    decisions = decide(
        dict(zip(paths, (v for _, v in leaves), strict=True)), Recipe.of(recipe), sites
    )
    return jax.tree.unflatten(
        tree, [_apply(path, v, decisions[path]) for path, (_, v) in zip(paths, leaves, strict=True)]
    )


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
    return Decision(rule.spec, axis, batch)


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
