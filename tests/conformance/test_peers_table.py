"""The qjax column of docs/peers.md is what experiments/compare_qwix.py prints today."""

import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("compare", ROOT / "experiments" / "compare_qwix.py")
compare = importlib.util.module_from_spec(SPEC)
sys.modules["compare"] = compare  # where pickle looks its classes up
SPEC.loader.exec_module(compare)
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "peers.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| case", "| ---"))
]


def test_the_table_has_every_case():
    assert [row[0] for row in ROWS] == list(compare.CASES)
    assert [row[1] for row in ROWS] == [case.title for case in compare.CASES.values()]


def words(outcome):
    """An outcome without its numbers, which vary in the last digit between machines."""
    return outcome.partition(": ")[0]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
@pytest.mark.usefixtures("standard_promotion")
def test_the_last_column(row):
    name, _, _, outcome = row
    if outcome.startswith("raises ValueError: "):
        with pytest.raises(ValueError, match=r".") as error:
            compare.CASES[name].qjax()
        assert str(error.value).startswith(outcome.removeprefix("raises ValueError: ")[:100])
    else:
        assert words(compare.CASES[name].qjax()) == words(outcome)
