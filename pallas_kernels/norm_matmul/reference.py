"""The definition: that of `add_norm`, of the products, and of `gated`."""

import jax

from pallas_kernels.add_norm import reference as norm
from pallas_kernels.add_norm.problem import Problem as Norm
from pallas_kernels.frame import Device
from pallas_kernels.gated import reference as gated
from pallas_kernels.gated.problem import Problem as Gated
from pallas_kernels.norm_matmul.problem import Problem
from pallas_kernels.quantized_matmul import reference as product


def supports(problem: Problem, device: Device) -> str | None:
    """Everything."""
    return None


def run(
    x: jax.Array, y: jax.Array, scale: jax.Array, *leaves: jax.Array, problem: Problem
) -> tuple[jax.Array, list[jax.Array]]:
    """See `op.norm_matmul`; `leaves` are as in `Problem.arrays`."""
    p = problem
    of_sum = Norm(p.rows, x.shape[1], p.epsilon, p.x)
    total, normed = norm.run(x, y, scale, problem=of_sum)
    pairs = zip(p.arrays(leaves), p.products, strict=True)
    results = [product.run(normed, arrays, each) for arrays, each in pairs]
    if p.gate is not None:
        of_gate = Gated(p.rows, p.weights[0].n, p.gate, p.out)
        results = [gated.run(*results, problem=of_gate)]
    return total, results
