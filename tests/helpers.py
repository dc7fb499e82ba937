"""Helpers shared by tests: quantized trees and their dense twins."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import qjax
from qjax import _compat

MOSAIC = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
needs_mosaic = pytest.mark.skipif(not MOSAIC, reason="the kernels need jax 0.11 or newer")


def slow(*values: Any) -> Any:
    """A parameter of a test that only `make test-slow` runs: others cover most of it."""
    return pytest.param(*values, marks=pytest.mark.slow)


def few(values: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """Parameters of which the default suite runs `kept`, one for each branch of what is tested."""
    assert all(v in values for v in kept)
    return [v if v in kept else slow(v) for v in values]


def dense(qparams: Any) -> Any:
    """Every QTensor of a tree dequantized."""
    return jax.tree.map(
        lambda v: qjax.dequantize(v) if qjax.is_qtensor(v) else v, qparams, is_leaf=qjax.is_qtensor
    )


def relative_error(got: Any, wanted: Any) -> float:
    """Largest difference over the largest magnitude, over all leaves."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    errors = []
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        errors.append(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    return max(errors)


def dequantized_uses(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The uses that `explain` reports as dequantized, with their reasons."""
    return [
        f"{u.path}: {u.how}"
        for u in qjax.explain(fn, *args).uses
        if u.how.startswith("deq") and "graph" not in u.how
    ]


def all_codes(fmt: Any) -> np.ndarray:
    """Every code that stands for a finite number and that an encoder gives, joined."""
    if isinstance(fmt.storage, str) and fmt.storage.startswith("float"):
        codes = np.arange(1 << fmt.bits, dtype=np.uint8).view(fmt.storage)
        return codes[np.isfinite(codes.astype(np.float32))]
    if fmt.storage in ("int2", "int4", "int8"):
        return np.arange(-(1 << fmt.bits - 1), 1 << fmt.bits - 1, dtype=np.int8)
    codes = np.arange(3 if fmt.name in ("tq1_0", "tq2_0") else 1 << fmt.bits, dtype=np.uint8)
    return np.delete(codes, 8) if fmt.name == "fp4_bnb" else codes  # its second zero


MOVES = {"reshape", "broadcast_in_dim", "transpose", "squeeze", "copy", "slice", "expand_dims"}


def without_round_trips(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as XLA for a GPU compiles it: float32 cast to a narrower float and back is not cast."""

    def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """On pairs: a value, and the float32 that it was cast from, or None."""
        pairs = [*((c, None) for c in consts), *args]
        held: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], pairs, strict=True))
        read = lambda v: (v.val, None) if isinstance(v, Literal) else held[v]
        for eqn in jaxpr.eqns:
            inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
            if name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                outputs = evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                values = [v for v, _ in inputs]
                outputs = [(v, None) for v in _compat.bind(eqn, values)]
                (value, _), *_ = outputs
                source = inputs[0][1] if inputs else None
                if name == "convert_element_type" and jnp.issubdtype(value.dtype, jnp.floating):
                    if source is not None and value.dtype == jnp.float32:
                        outputs = [(source, None)]
                    elif values[0].dtype == jnp.float32 and value.dtype.itemsize < 4:
                        outputs = [(value, values[0])]
                elif name in MOVES and source is not None:
                    outputs = [(value, _compat.bind(eqn, [source, *values[1:]])[0])]
            held.update(zip(eqn.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        flat = [(v, None) for v in jax.tree.leaves(args)]
        out = [v for v, _ in evaluate(closed.jaxpr, closed.consts, flat)]
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run
