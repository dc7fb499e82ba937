"""The casts that tests and benchmarks iterate."""

from pallas_kernels.cast_fp8.problem import Problem

SCALES = ("block", "tile", "given")
SMALL = tuple(Problem(256, 384, scales) for scales in SCALES)
LARGE = tuple(
    Problem(*shape, scales)
    for shape in ((16384, 8192), (8192, 28672))  # activations, a weight
    for scales in SCALES
)
