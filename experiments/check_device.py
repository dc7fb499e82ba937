"""Is every format right on this device? Codes, values and products beside the CPU's.

    python experiments/check_device.py [FORMAT...] [--precision highest]

For every row of `FORMATS`: a weight is quantized on the default device and on the CPU. Some codes
may differ, since XLA divides within two units in the last place on a GPU, so that ties fall either
way: the share of them is printed, and the squared error may not be larger. The CPU's codes are sent
over and decoded there, to the bit; and products with float32 inputs, in a scan over stacked
weights, and with inputs in int8 and FP8, are held against float64. On a machine without an
accelerator it compares the CPU with itself. XLA_FLAGS are printed, since a wrong number may be
theirs: with --xla_gpu_autotune_level=0, jax 0.11.2 multiplies int8 by int8 wrongly on an H200.
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

LAYERS, SHAPE, ROWS = 3, (512, 512), 24
EXACT = {"highest": 1e-5, "default": 2e-3}  # TF32 keeps 10 bits
BOUNDS = {"/int8_token": 0.02, "/fp8_e4m3_token": 0.06}  # of the largest product
MORE_ERROR = 1e-4
MORE_OF_SEARCHES = 5e-4  # of k-quants: an ulp in the weights moves the error of theirs by 2e-4


def different(got: Any, wanted: Any) -> float:
    """The share of elements that differ, over all leaves."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    wide = lambda v: np.asarray(v).astype(np.float64)
    return sum(int(np.sum(wide(a) != wide(b))) for a, b in pairs) / sum(b.size for _, b in pairs)


def squared_error(q: Any, w: np.ndarray) -> float:
    """Of a quantized weight, on the device that holds it."""
    return float(np.square(np.asarray(qjax.dequantize(q)).astype(np.float64) - w).mean())


def scanned(x: jax.Array, stacked: Any) -> jax.Array:
    """The products with every one of the stacked weights."""
    return jax.lax.scan(lambda carry, w: (carry, jnp.matmul(x, w)), None, stacked)[1]


def checks(spec: str, precision: str, cpu: Any, device: Any) -> Iterator[tuple[str, bool]]:
    """(what is shown, whether it is right) of one spec, in the order of the table."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((LAYERS, *SHAPE)).astype(np.float32)
    x = rng.standard_normal((ROWS, SHAPE[0])).astype(np.float32)
    here, there = (jax.device_put(w, d) for d in (cpu, device))
    wanted, got = (qjax.quantize(v, spec, 1) for v in (here, there))
    error = squared_error(wanted, w)
    more = squared_error(got, w) / error - 1
    searched = spec in WHOLE_SPECS and WHOLE_SPECS[spec].scale_method == "ggml"
    bound = MORE_OF_SEARCHES if searched else MORE_ERROR
    yield f"{different(got, wanted):.1e}", more <= bound
    sent = jax.device_put(wanted, device)
    apart = different(qjax.dequantize(sent), qjax.dequantize(wanted))
    yield f"{apart:.1e}", apart == 0
    exact = x.astype(np.float64) @ np.asarray(qjax.dequantize(wanted)).astype(np.float64)

    def wrong(fn: Callable[..., jax.Array], q: Any) -> float:
        y = jax.jit(qjax.quantized(fn))(jax.device_put(x, device), q)
        return float(np.abs(np.asarray(y) - exact).max() / np.abs(exact).max())

    for fn in (jnp.matmul, scanned):
        found = wrong(fn, sent)
        yield f"{found:.1e}", found <= EXACT[precision]
    for suffix, bound in BOUNDS.items():
        act = Activation(qjax.Spec.parse(f"int8{suffix}").activation)
        found = wrong(jnp.matmul, dataclasses.replace(sent, activation=act))
        yield f"{found:.1e}", found <= bound


def main() -> int:
    """Prints a row per format; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=[*FORMATS])
    parser.add_argument("--precision", default="highest", choices=EXACT)
    args = parser.parse_args()
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    flags = os.environ.get("XLA_FLAGS", "")
    print(f"{device.device_kind}, jax {jax.__version__}, XLA_FLAGS={flags!r}, {args.precision}")
    table, wrong = Table(), 0
    columns = ("quantize", "dequantize", "product", "scanned", *(s[1:] for s in BOUNDS))
    for column in ("format", *columns):
        table.add_column(column)
    with jax.default_matmul_precision(args.precision):
        for name in args.formats:
            cells = [name]
            spec = name if name in WHOLE_SPECS else f"{name}_g64"
            try:
                for shown, is_right in checks(spec, args.precision, cpu, device):
                    wrong += not is_right
                    cells.append(shown if is_right else f"{shown} WRONG")
            except jax.errors.JaxRuntimeError as error:  # the compiler's; the other rows go on
                wrong += 1
                cells.append(f"FAILS: {str(error)[:60]}")
            table.add_row(*cells)
    Console(width=120).print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
