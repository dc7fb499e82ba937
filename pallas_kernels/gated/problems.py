"""The problems that tests and benchmarks iterate."""

from pallas_kernels.gated.problem import Problem

PROBLEMS = (Problem(1, 14336, "silu"), Problem(8, 14336, "silu"), Problem(3, 384, "gelu_tanh"))
