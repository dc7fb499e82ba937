"""Is every format right on this device? Codes, values and products beside the CPU's.

    python experiments/check_device.py [FORMAT...] [--precision highest]

For every row of `FORMATS`: a weight is quantized on the default device and on the CPU, codes and
scales must be the same numbers; the CPU's codes are sent over and decoded there; and a product with
float32 inputs, and with inputs in int8 and FP8 where the format allows it, is held against float64.
On a machine without an accelerator it compares the CPU with itself. XLA_FLAGS are printed, since a
wrong number may be theirs.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import qjax
from qjax.activation import Activation
from qjax.formats import FORMATS
from qjax.spec import WHOLE_SPECS

SHAPE, ROWS = (512, 384), 24
BOUNDS = {"": 1e-4, "/int8_token": 0.02, "/fp8_e4m3_token": 0.06}  # of the largest product


def different(got: Any, wanted: Any) -> int:
    """How many elements differ, over all leaves."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    wide = lambda v: np.asarray(v).astype(np.float64)
    return sum(int(np.sum(wide(a) != wide(b))) for a, b in pairs)


def checks(spec: str, cpu: Any, device: Any) -> Iterator[tuple[Callable[[], float], float]]:
    """(how wrong it is, how wrong it may be) of one spec, in the order of the table."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(SHAPE).astype(np.float32)
    x = rng.standard_normal((ROWS, SHAPE[0])).astype(np.float32)
    here, there = jax.device_put(w, cpu), jax.device_put(w, device)
    q = qjax.quantize(here, spec, 0)
    sent = jax.device_put(q, device)
    exact = x.astype(np.float64) @ np.asarray(qjax.dequantize(q)).astype(np.float64)

    def product(suffix: str) -> float:
        act = None if not suffix else qjax.Spec.parse(f"int8{suffix}").activation
        held = dataclasses.replace(sent, activation=None if act is None else Activation(act))
        y = jax.jit(qjax.quantized(jnp.matmul))(jax.device_put(x, device), held)
        return float(np.abs(np.asarray(y) - exact).max() / np.abs(exact).max())

    yield lambda: different(qjax.quantize(there, spec, 0), q), 0
    yield lambda: different(qjax.dequantize(sent), qjax.dequantize(q)), 0
    for suffix, bound in BOUNDS.items():
        yield lambda s=suffix: product(s), bound


def main() -> int:
    """Prints a row per format; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=[*FORMATS])
    parser.add_argument("--precision", default="highest", help="jax_default_matmul_precision")
    args = parser.parse_args()
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    flags = os.environ.get("XLA_FLAGS", "")
    print(f"{device.device_kind}, jax {jax.__version__}, XLA_FLAGS={flags!r}, {args.precision}")
    table, wrong = Table(), 0
    for column in ("format", "quantize", "dequantize", "product", "int8_token", "fp8_e4m3_token"):
        table.add_column(column)
    with jax.default_matmul_precision(args.precision):
        for name in args.formats:
            cells = [name]
            spec = name if name in WHOLE_SPECS else f"{name}_g64"
            for how, bound in checks(spec, cpu, device):
                found = how()
                wrong += not found <= bound
                cells.append(f"{found:.3g}" + ("" if found <= bound else " WRONG"))
            table.add_row(*cells)
    Console(width=120).print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
