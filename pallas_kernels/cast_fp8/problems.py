"""The casts that tests and benchmarks iterate."""

from pallas_kernels.cast_fp8.problem import Problem

SCALES = ("block", "tile", "given")
ALONE = ("block", "row", "given")  # of codes as they lie
SHAPES = ((16384, 8192), (8192, 28672))  # activations, a weight


def _of(rows: int, columns: int) -> tuple[Problem, ...]:
    both = tuple(Problem(rows, columns, scales) for scales in SCALES)
    return both + tuple(Problem(rows, columns, scales, turned=False) for scales in ALONE)


SMALL = _of(256, 512)
LARGE = _of(*SHAPES[0]) + _of(*SHAPES[1])
