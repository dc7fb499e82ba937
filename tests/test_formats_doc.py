"""docs/formats.md tells the truth about every row of FORMATS, and reported bytes are XLA's."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.formats import FORMATS
from qjax.rounding import SCALE_METHODS
from qjax.sizes import bits_per_weight, nbytes

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "formats.md").read_text()
TABLES = [
    [cell.strip().strip("`") for cell in line.replace("\\|", "/").strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]
ROWS = {row[0]: row for row in TABLES if len(row) == 6}


def test_every_format_has_its_row_in_order():
    assert list(ROWS) == list(FORMATS)


def test_every_scale_method_has_its_row():
    assert {row[0] for row in TABLES if len(row) == 3} >= set(SCALE_METHODS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_true(name):
    _, spec, bits, storage, *_ = ROWS[name]
    assert qjax.Spec.parse(spec).format == name
    held = FORMATS[name].storage
    assert storage == (held if isinstance(held, str) else " + ".join(held))
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    q = jax.eval_shape(lambda w: qjax.quantize(w, spec, 0), w)
    assert f"{bits_per_weight(q):.3f}" == bits
    planned = jax.jit(lambda q: q).lower(q).compile().memory_analysis()
    assert planned is not None
    assert nbytes(q) == pytest.approx(planned.argument_size_in_bytes, rel=0.01)
