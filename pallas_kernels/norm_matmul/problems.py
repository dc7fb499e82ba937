"""The problems that tests and benchmarks iterate."""

from pallas_kernels.norm_matmul.problem import Problem
from pallas_kernels.quantized_matmul.problem import Weight
from pallas_kernels.quantized_matmul.problems import NF4

INT4 = Weight(512, 96, 128, "int4", "bfloat16")
INT8 = Weight(1032, 40, 1032, "int8")
SMALL = (
    Problem(3, 1e-5, tuple(INT4._replace(n=n) for n in (96, 32, 32)), "hopper4"),
    Problem(1, 1e-6, (INT4._replace(n=72),) * 2, "hopper4", gate="silu"),
    Problem(8, 1e-5, (INT8,), "hopper8"),
    Problem(1, 1e-5, (INT8,) * 2, "hopper8", gate="gelu_tanh"),
    Problem(8, 1e-5, (Weight(1032, 64, 64, "uint4", values=NF4),) * 2, "hopper4", gate="silu"),
    Problem(3, 1e-5, (Weight(1000, 48, 32, "uint4", "bfloat16", zero="uint4"),), "hopper4"),
    Problem(16, 1e-5, (Weight(520, 24, 64, "uint4", "float16", offset="float16"),), "hopper4"),
    Problem(16, 1e-5, (Weight(1040, 64, 1040, "float8_e4m3fn"),) * 2, "hopper8", gate="silu"),
)
