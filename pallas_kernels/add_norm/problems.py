"""The problems that tests and benchmarks iterate."""

from pallas_kernels.add_norm.problem import Problem

PROBLEMS = tuple(Problem(m, n, 1e-5) for m, n in ((1, 4096), (8, 4096), (3, 384)))
