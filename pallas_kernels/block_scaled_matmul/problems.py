"""The products that tests and benchmarks iterate."""

from pallas_kernels.block_scaled_matmul.problem import Problem

# name -> problem. Small ones for tests, with rows and columns that no tile divides, and
# tiles of two widths.
SMALL = {
    "tiles": Problem(256, 256, 256, False, "bfloat16"),
    "rows": Problem(128, 384, 512, True, "float32"),
    "uneven": Problem(384, 640, 384, False, "float32"),
    "two phases": Problem(4096, 1792, 256, False, "bfloat16"),
    "many rows": Problem(4096, 1792, 256, True, "bfloat16"),
}

# m, n, k of large ones: outputs and gradients of inputs; the last two of a weight, where k are the
# tokens.
LARGE = (
    Problem(4096, 7168, 16384, False, "bfloat16"),
    Problem(8192, 8192, 8192, False, "bfloat16"),
    Problem(4096, 4096, 4096, False, "bfloat16"),
    Problem(16384, 4096, 4096, False, "bfloat16"),
    Problem(16384, 28672, 8192, False, "bfloat16"),
    Problem(8192, 8192, 16384, True, "bfloat16"),
    Problem(8192, 28672, 16384, True, "bfloat16"),
)
