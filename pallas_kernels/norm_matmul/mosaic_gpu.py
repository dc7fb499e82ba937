"""Hopper through Pallas Mosaic GPU: one launch of the kernel of `quantized_matmul`, m <= 16."""

import jax

from pallas_kernels import hopper
from pallas_kernels.frame import Device
from pallas_kernels.norm_matmul.problem import Problem
from pallas_kernels.quantized_matmul import hopper_layout
from pallas_kernels.quantized_matmul import mosaic_gpu as products
from pallas_kernels.quantized_matmul.problem import Problem as Product


def supports(problem: Problem, device: Device) -> str | None:
    """bfloat16, m <= 16, weights that are alike and lie for Hopper, on one H100 or H200."""
    reason = hopper.missing_alone(device) or products.unfit(problem.products[0], device)
    if reason is not None:
        return reason
    if not 0 < problem.rows <= products.MAX_ROWS:
        return f"x has {problem.rows} rows, it takes 1 to {products.MAX_ROWS}"
    if problem.weights[0].k % 8:
        return f"k = {problem.weights[0].k} is no multiple of 8, so rows of x are not aligned"
    unit = 1 if len(problem.weights) == 1 or problem.gate is not None else hopper_layout.ROWS
    reason = products.unlike(problem.products, unit)
    if reason is not None:
        return reason
    one = whole(problem)
    cuts = products.configs(one.m, one.weight, norm=True, gate=one.gate is not None)
    if next(cuts, None) is None:
        return f"no block of the chip takes all of k = {one.weight.k} of {one.m} rows"
    return None


def run(
    x: jax.Array, y: jax.Array, scale: jax.Array, *leaves: jax.Array, problem: Problem
) -> tuple[jax.Array, list[jax.Array]]:
    """See `op.norm_matmul`; `leaves` are as in `Problem.arrays`."""
    one, gate = whole(problem), problem.gate is not None
    kind = Device.default().kind
    config = products.choose_config(one.m, one.weight, kind, norm=True, gate=gate)
    assert config is not None, "supports() found one"
    channels = tuple(w.n for w in problem.weights)
    arrays = problem.arrays(leaves)
    total, *results = products.launch(one, config, channels, (x, y, scale), arrays)
    return total, results


def whole(problem: Problem) -> Product:
    """That of the weights side by side; of a gate and what it multiplies: tiles in turn."""
    one = products.whole_problem(problem.products)
    if problem.gate is not None:
        tiles = -(-problem.weights[0].n // hopper_layout.ROWS)
        one = one._replace(weight=one.weight._replace(n=2 * tiles * hopper_layout.ROWS))
    return one._replace(norm=problem.epsilon, gate=problem.gate)
