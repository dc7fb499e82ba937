"""experiments/decode.py, tiny, on a CPU: every row is measured, a failure is its row's alone."""

import importlib.util
import json
import pathlib

import pytest

FILE = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "decode.py"


@pytest.fixture(scope="module")
def decode():
    spec = importlib.util.spec_from_file_location("decode", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_a_tiny_model(decode, tmp_path, monkeypatch):
    monkeypatch.setitem(decode.FORMATS, "nf4", "no such spec")
    monkeypatch.setattr(decode, "NEW", 4)
    out = tmp_path / "rows.json"
    argv = ["--preset", "tiny", "--layers", "1", "--batches", "1", "--out", str(out)]
    decode.main([*argv, "--formats", "bf16", "nf4", "int4_g128"])
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"bf16", "nf4", "int4_g128"}
    assert "no such spec" in rows["nf4"]["failed"]
    dense, small = rows["bf16"], rows["int4_g128"]
    assert small["launches"] == {"xla_cpu on nibbles": 8}
    # 4 bits and one 16-bit scale to 128 of them, beside 16 bits; keys and values are the same
    cache = 2 * 2 * 32 * 2 * 64
    ratio = (small["read_bytes"] - cache) / (dense["read_bytes"] - cache)
    assert ratio == pytest.approx((4 + 16 / 128) / 16, rel=0.01)  # the norms stay
    assert small["memory_bytes"] < dense["memory_bytes"]
    # one rounding to bfloat16 (2^-9) at each of some ten places in a row, on either side
    assert 0 < small["error"] < 20 * 2**-9
