"""The problems that tests and benchmarks iterate."""

from pallas_kernels.amax.problem import Problem

SMALL = (Problem(256, 384),)
LARGE = (Problem(16384, 8192), Problem(8192, 28672))  # activations, a weight
