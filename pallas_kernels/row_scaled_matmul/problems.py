"""The products that tests and benchmarks iterate."""

from pallas_kernels.row_scaled_matmul.problem import Problem

# A small one for tests, whose rows no tile divides.
SMALL = (Problem(384, 256, 640, "float32"),)

# Gradients of weights, where k are the tokens.
LARGE = (
    Problem(8192, 8192, 16384, "bfloat16"),
    Problem(1024, 8192, 16384, "bfloat16"),
    Problem(8192, 28672, 16384, "bfloat16"),
    Problem(28672, 8192, 16384, "bfloat16"),
)
