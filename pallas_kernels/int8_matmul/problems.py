"""The products that tests and benchmarks iterate."""

from pallas_kernels.int8_matmul.problem import Problem
from pallas_kernels.quantized_matmul.problem import Weight


def _of(m: int, k: int, n: int, outliers: int = 0, out: str = "bfloat16") -> Problem:
    return Problem(m, Weight(k, n, k, "int8"), "hopper8", outliers, out)


# Rows, k and channels that no tile divides; second operands of a part of a load, and of several.
SMALL = (
    _of(40, 256, 256),
    _of(65, 400, 136, 7),
    _of(300, 1168, 392, 130, "float32"),
    _of(17, 40, 8, 3),
)
# Tiles of 256 rows, more of them than multiprocessors.
TALL = (
    _of(4001, 400, 2184, 7),
    _of(2100, 520, 2056, 70, "float32"),
    _of(4096, 1024, 2304),
)
LARGE = tuple(
    _of(m, k, n)
    for k, n in ((4096, 4096), (8192, 8192), (4096, 28672))
    for m in (128, 256, 1024, 4096, 16384)
)
