"""quantize_params: a parameter pytree in, a quantized one out; report: what became of every parameter."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.qtensor import QTensor, dequantize, is_qtensor
from qjax.quantizing import quantize
from qjax.recipe import Recipe, Rule
from qjax.sites import Site
from qjax.sizes import nbytes
from qjax.spec import Spec

Sites = Mapping[str, tuple[Site, ...]]


class Decision(NamedTuple):
    """What a recipe decides for one parameter: the Spec and axes to quantize it with, or why it is kept."""

    spec: Spec | None
    axis: tuple[int, ...] = ()
    batch_axis: tuple[int, ...] = ()
    kept: str = ""


def quantize_params(params: Any, recipe: Recipe | Spec | str, sites: Sites | None = None) -> Any:
    """The parameter pytree with every weight that `recipe` names replaced by a QTensor.

    Pure: pytree in, pytree of the same structure out. What is not quantized is handed on as it is, and `report` lists
    why.

    Args:
      params: a pytree of arrays. QTensors in it are kept.
      recipe: a Recipe, or a Spec or spec string for every weight that a matmul uses (tables that are looked up are kept).
      sites: what `find_sites` returned for these parameters: it tells which axes are contracted. Without it each rule
        that quantizes must give `axis`.

    Returns:
      The quantized pytree, ready for `quantized(fn)`.

    Raises:
      ValueError: naming the path, if a weight at a site is matched by no rule, a rule matches nothing, `sites` and `params`
        disagree, the contracted axis is ambiguous, or a weight holds NaN or Inf.

    Example:
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
      >>> sites = qjax.find_sites(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((2, 8)))
      >>> qjax.quantize_params(params, "int8", sites)["w"]
      QTensor(int8, shape=(8, 4), block=(8, 1), dtype=float32)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    paths = [param_path(p) for p, _ in leaves]
    decisions = decide(dict(zip(paths, (v for _, v in leaves), strict=True)), Recipe.of(recipe), sites)
    return jax.tree.unflatten(tree, [_apply(path, v, decisions[path]) for path, (_, v) in zip(paths, leaves, strict=True)])


def param_path(path: Sequence[Any]) -> str:
    """The name of a parameter: its keys joined by "/", without a trailing "/value"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/").removesuffix("/value")


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
            near = _close(re_literal(rule.pattern), params)
            raise ValueError(f"rule {rule.pattern!r} matches no parameter{near}; mark it optional=True if that is meant")
    return {path: _decide_one(path, value, recipe, sites) for path, value in params.items()}


def re_literal(pattern: str) -> str:
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
        return Decision(None, kept="no matmul and no lookup uses it")
    if rule is None:
        if sites is None:
            return Decision(None, kept="no rule matches it")
        raise ValueError(
            f"{path}: shape {tuple(value.shape)} is used by {uses[0].primitive}, but no rule matches it; "
            f"add Rule({path!r}, None) to leave it as it is"
        )
    if rule.spec is None:
        return Decision(None, kept=f"rule {rule.pattern!r} keeps it" + (" (looked up)" if rule.where is not None else ""))
    assert isinstance(rule.spec, Spec)
    axis, batch = _axes(path, value, rule, uses)
    return Decision(rule.spec, axis, batch) if axis else Decision(None, kept="its matmul contracts no axis of it")


def _axes(path: str, value: Any, rule: Rule, uses: Sequence[Site]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(contracted, batch) axes: a matmul decides over a lookup, whose rows are then the contracted axis."""
    dots = [site for site in uses if site.primitive != "gather"]
    stacked = {a for site in uses for a in site.stacked_axes}
    batch = tuple(sorted(stacked | {a for site in dots for a in site.batch_axes}))
    if rule.axis is not None:
        axis = (rule.axis,) if isinstance(rule.axis, int) else tuple(rule.axis)
        axis = tuple(a % value.ndim for a in axis)
        return axis, tuple(a for a in batch if a not in axis)
    if not uses:
        raise ValueError(f"{path}: shape {tuple(value.shape)} has no site that tells its contracted axis; give sites, or the rule an axis")
    choices = sorted({site.contract_axes for site in dots}) or sorted({site.free_axes[-1:] for site in uses})
    if len(choices) > 1:
        raise ValueError(
            f"{path}: shape {tuple(value.shape)} is contracted over axes {' and '.join(map(str, choices))} in different places; "
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


class Row(NamedTuple):
    """One parameter in a report; sizes in bytes, `sqnr` in dB, `note` says why a parameter was kept."""

    path: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    nbytes: int
    sqnr: float | None
    note: str


class Report(NamedTuple):
    """What `report` returns; `str` prints a table with totals."""

    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over all parameters, quantized or not."""
        return 8 * self.nbytes / max(sum(int(np.prod(r.shape)) for r in self.rows), 1)

    def __str__(self) -> str:
        table = [("path", "shape", "format", "bits/w", "bytes", "SQNR dB", "note")]
        for r in self.rows:
            sqnr = "" if r.sqnr is None else f"{r.sqnr:.1f}"
            table.append((r.path, "x".join(map(str, r.shape)), r.format, f"{r.bits_per_weight:.3f}", f"{r.nbytes:,}", sqnr, r.note))
        table.append(("total", "", "", f"{self.bits_per_weight:.3f}", f"{self.nbytes:,}", "", ""))
        widths = [max(len(row[i]) for row in table) for i in range(7)]
        right = {3, 4, 5}
        return "\n".join(
            "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in table
        )


def report(qparams: Any, params: Any = None, recipe: Recipe | Spec | str | None = None, sites: Sites | None = None) -> Report:
    """Format, bits per weight and bytes of every parameter.

    Args:
      qparams: what `quantize_params` returned.
      params: the parameters that it was given, for the signal-to-quantization-noise ratio, SQNR = 10 log10(sum w^2 / sum (w - w_q)^2) in dB.
      recipe, sites: what it was given, for the reason why each parameter that is not quantized was kept.

    Returns:
      A Report; print it, or read its rows.

    Raises:
      ValueError: if `params` has other paths than `qparams`.

    Example:
      >>> print(qjax.report({"w": qjax.quantize(jnp.ones((128, 8)), "int8", axis=0)}))
      path   shape  format        bits/w  bytes  SQNR dB  note
      w      128x8  int8 [128,1]   8.250  1,056
      total                        8.250  1,056
    """
    named = _named(qparams)
    originals = None if params is None else _named(params)
    if originals is not None and originals.keys() != named.keys():
        odd = sorted(originals.keys() ^ named.keys())[0]
        raise ValueError(f"params and qparams are different trees: {odd!r} is in one only")
    decisions = None if recipe is None else decide(originals or named, Recipe.of(recipe), sites)
    rows = []
    for path, value in named.items():
        kept = decisions[path].kept if decisions is not None and not is_qtensor(value) else ""
        sqnr = _sqnr(originals[path], value) if originals is not None and is_qtensor(value) else None
        shape = tuple(np.shape(value)) if not is_qtensor(value) else value.shape
        size = nbytes(value) if is_qtensor(value) or hasattr(value, "dtype") else 0
        rows.append(Row(path, shape, _format(value), 8 * size / max(int(np.prod(shape)), 1), size, sqnr, kept))
    return Report(tuple(rows))


def _named(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {param_path(p): v for p, v in leaves}


def _format(value: Any) -> str:
    if isinstance(value, QTensor):
        return f"{value.format} [{','.join(map(str, value.block))}]"
    return str(getattr(value, "dtype", type(value).__name__))


def _sqnr(w: Any, q: QTensor) -> float:
    if is_qtensor(w):
        w = dequantize(w)
    return float(_decibel(w, q))


@jax.jit
def _decibel(w: jax.Array, q: QTensor) -> jax.Array:
    w = w.astype(jnp.float32)
    noise = jnp.sum(jnp.square(w - dequantize(q).astype(jnp.float32)))
    return 10 * (jnp.log10(jnp.sum(jnp.square(w))) - jnp.log10(noise))
