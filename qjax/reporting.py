"""report: what became of every parameter, and what it costs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.prepared import Prepared, why_not
from qjax.qtensor import QTensor, dequantize, is_qtensor
from qjax.recipe import Recipe
from qjax.sizes import nbytes
from qjax.spec import Spec
from qjax.tracing import param_path
from qjax.transform import Sites, decide


class Row(NamedTuple):
    """One parameter in a report: sizes in bytes, `sqnr` in dB, `note` why it was kept."""

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
            shape, bits = "x".join(map(str, r.shape)), f"{r.bits_per_weight:.3f}"
            table.append((r.path, shape, r.format, bits, f"{r.nbytes:,}", sqnr, r.note))
        table.append(("total", "", "", f"{self.bits_per_weight:.3f}", f"{self.nbytes:,}", "", ""))
        widths = [max(len(row[i]) for row in table) for i in range(7)]
        right = {3, 4, 5}
        return "\n".join(
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )


def report(
    qparams: Any,
    params: Any = None,
    recipe: Recipe | Spec | str | None = None,
    sites: Sites | None = None,
) -> Report:
    """Format, bits per weight and bytes of every parameter.

    Args:
      qparams: what `quantize_params` returned.
      params: the parameters that it was given, for the signal-to-quantization-noise ratio,
        SQNR = 10 log10(sum w^2 / sum (w - w_q)^2) in dB.
      recipe, sites: what it was given, for the reason why each parameter that is not quantized was
        kept. In a prepared tree every QTensor is listed with the reason why it was not prepared.

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
    some_prepared = any(isinstance(v, Prepared) for v in named.values())
    decisions = None if recipe is None else decide(originals or named, Recipe.of(recipe), sites)
    rows = []
    for path, value in named.items():
        if is_qtensor(value):
            value.check(path)
        kept = decisions[path].kept if decisions is not None and not is_qtensor(value) else ""
        if some_prepared and isinstance(value, QTensor):
            kept = f"not prepared: {why_not(value, (sites or {}).get(path, ()))}"
        sqnr = (
            _sqnr(originals[path], value) if originals is not None and is_qtensor(value) else None
        )
        shape = tuple(np.shape(value)) if not is_qtensor(value) else value.shape
        size = nbytes(value) if is_qtensor(value) or hasattr(value, "dtype") else 0
        bits = 8 * size / max(int(np.prod(shape)), 1)
        rows.append(Row(path, shape, _format(value), bits, size, sqnr, kept))
    return Report(tuple(rows))


def _named(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {param_path(p): v for p, v in leaves}


def _format(value: Any) -> str:
    if isinstance(value, Prepared):
        return f"{value.format} [{','.join(map(str, value.block))}] in {value.layout}"
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
