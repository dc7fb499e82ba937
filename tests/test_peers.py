"""The algorithms beside the peers', in an environment of their own: experiments/compare_ptq.py."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "experiments" / "compare_ptq.py"


@pytest.mark.slow
@pytest.mark.skipif(
    "PEERS" not in os.environ,
    reason="needs the peers: experiments/compare_ptq.py says how to install them; set PEERS",
)
def test_no_algorithm_is_worse_than_its_peers():
    run = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)},
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    # two of GPTQ, one of AWQ, three of HQQ, one of LLM.int8()
    assert len(re.findall(r"\bmet\b", run.stdout)) == 7
