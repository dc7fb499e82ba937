"""Low-bit matmul kernels on plain arrays."""
