"""Helpers shared by tests: quantized trees and their dense twins."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import qjax


def slow(*values: Any) -> Any:
    """A parameter of a test that only `make test-slow` runs: others cover most of it."""
    return pytest.param(*values, marks=pytest.mark.slow)


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
