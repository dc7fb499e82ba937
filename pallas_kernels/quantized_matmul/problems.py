"""The products that tests, benchmarks and the tuner iterate."""

from pallas_kernels.quantized_matmul.problem import Weight

# A codebook of sixteen values that no formula gives: NF4's (arXiv:2305.14314).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# name -> weight. Small ones for tests: whole and ragged groups, whole and odd n, every kind of
# code, scale, zero and offset.
WEIGHTS = {
    "int4_g128": Weight(512, 96, 128, "int4", "bfloat16"),
    "int4_ragged": Weight(500, 37, 128, "int4", "bfloat16"),
    "int4_g32": Weight(96, 24, 32, "int4", "float32"),
    "int4_channel": Weight(384, 40, 384, "int4"),
    "int4_odd_channel": Weight(77, 5, 77, "int4"),
    "int4_long_groups": Weight(768, 24, 384, "int4", "float16"),
    "uint4_zeros": Weight(256, 64, 64, "uint4", "float16", zero="uint4"),
    "uint4_offsets": Weight(256, 24, 32, "uint4", "float16", offset="float16"),
    "nf4": Weight(256, 64, 64, "uint4", values=NF4),
    "int8_channel": Weight(512, 96, 512, "int8"),
    "int8_g32": Weight(256, 40, 32, "int8", "float16"),
    "uint8_zeros": Weight(250, 24, 32, "uint8", "float32", zero="float32"),
    "fp8_channel": Weight(256, 40, 256, "float8_e4m3fn"),
    "one_column": Weight(64, 1, 32, "int4"),
}
ROWS = (1, 3, 16, 65)  # m

# name -> weight, of 7B-class models and of SmolLM2-135M, for benchmarks and the tuner.
LARGE = {
    "int4_g128": Weight(4096, 11008, 128, "int4", "bfloat16"),
    "nf4_g64": Weight(4096, 11008, 64, "uint4", values=NF4),
    "int8": Weight(4096, 11008, 4096, "int8"),
    "int4_g64 small": Weight(1536, 576, 64, "int4", "bfloat16"),
}
