"""The peers' side of `ptq_cost.py`: torch only, run by an interpreter that has the peers.

python experiments/peers_cost.py PROBLEM.npz RESULT.json RUNS
"""

import json
import statistics
import sys
import time

import numpy as np
import peers_ptq
import torch
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

SMALL, LARGE = 1024, 4096


def median(call):
    """The median of some calls after one that is not counted; `call` returns seconds."""
    return statistics.median([call() for _ in range(int(sys.argv[3]) + 1)][1:])


def hessian(x):
    """Seconds of llm-compressor to add one batch to a Hessian."""
    linear = torch.nn.Linear(x.shape[1], 8, bias=False)
    total, count = make_empty_hessian(linear), torch.zeros(1)
    batch = torch.from_numpy(x)

    def once():
        start = time.perf_counter()
        accumulate_hessian(batch, linear, total, count)
        return time.perf_counter() - start

    return median(once)


def main():
    """Measures and writes {peer: {name: seconds}}."""
    given = dict(np.load(sys.argv[1]))
    x, w = given["x"], given["w"]
    found = {"llm-compressor": {f"hessian {LARGE}": hessian(x)}, "gptqmodel": {}}
    for size in (SMALL, LARGE):
        rows, weight = x[:, :size].copy(), w[:size, :size].copy()
        scale = np.abs(weight).reshape(-1, peers_ptq.GROUP, size).max(1) / np.float32(7.5)
        problem = {"x": rows, "w": weight, "hessian": rows.T @ rows, "scale": scale}
        solve = f"solve {size}"
        found["llm-compressor"][solve] = median(
            lambda p=problem: peers_ptq.llm_compressor(p, None)[1]
        )
        found["gptqmodel"][solve] = median(lambda p=problem: peers_ptq.gptqmodel(p, False)[1])
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
