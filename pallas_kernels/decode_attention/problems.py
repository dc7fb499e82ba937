"""The problems that tests and benchmarks iterate."""

from pallas_kernels.decode_attention.problem import Problem


def _problem(batch: int, kv_heads: int, groups: int, head_dim: int, length: int) -> Problem:
    return Problem(batch, kv_heads, groups, head_dim, length, head_dim**-0.5)


# problem, the first position that is seen, that of the new token
SMALL = (
    (_problem(1, 8, 4, 128, 2048), 0, 2030),
    (_problem(1, 8, 4, 128, 2048), 0, 0),
    (_problem(1, 8, 4, 128, 2048), 0, 1024),
    (_problem(2, 2, 1, 64, 64), 0, 33),
    (_problem(1, 4, 8, 128, 512), 100, 300),
    (_problem(3, 2, 7, 64, 200), 0, 199),
    (_problem(1, 1, 2, 128, 4096), 0, 4000),
    (_problem(8, 2, 2, 64, 600), 40, 590),
    (_problem(16, 2, 1, 128, 600), 0, 577),
)
LARGE = (
    (_problem(1, 8, 4, 128, 2048), 0, 2047),
    (_problem(8, 8, 4, 128, 2048), 0, 2047),
    (_problem(1, 8, 4, 128, 32768), 0, 32767),
)
