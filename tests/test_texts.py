"""The texts shipped for the experiments are the documented bytes and share nothing."""

import hashlib
import re
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "experiments" / "data"
PARTS = ("moby_dick_calibration.txt", "moby_dick_evaluation.txt")


def test_the_texts_are_what_their_readme_says():
    rows = re.findall(
        r"^\| `(\S+\.txt)` \|[^|]*\| ([\d,]+) \| `(\w{64})` \|$",
        (DATA / "README.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(name for name, _, _ in rows) == sorted((*PARTS, "moby_dick_rest.txt"))
    for name, size, digest in rows:
        held = (DATA / name).read_bytes()
        assert len(held) == int(size.replace(",", ""))
        assert hashlib.sha256(held).hexdigest() == digest


def test_calibration_and_evaluation_share_no_paragraph():
    calibration, evaluation = (
        {line for line in (DATA / name).read_text().splitlines() if line} for name in PARTS
    )
    assert not calibration & evaluation
