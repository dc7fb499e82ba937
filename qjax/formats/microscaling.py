"""The elements of block-scaled floats: OCP's MX formats and NVIDIA's NVFP4.

Like llama.cpp's block types they are elements plus the block structure that `Spec.parse` gives
them. MX (OCP Microscaling Formats v1.0): 32 elements share a power of two, E8M0. NVFP4: 16 elements
share an E4M3 scale, and all of a weight one float32.
"""

from qjax.formats.base import Format
from qjax.formats.floating import floating, six_bits

MX: dict[str, Format] = {
    "mxfp8": floating("mxfp8", "float8_e4m3fn"),
    "mxfp8_e5m2": floating("mxfp8_e5m2", "float8_e5m2"),
    "mxfp6": six_bits("mxfp6", 2, 3),
    "mxfp6_e3m2": six_bits("mxfp6_e3m2", 3, 2),
    "mxfp4": floating("mxfp4", "float4_e2m1fn"),
}
MICROSCALING: dict[str, Format] = {**MX, "nvfp4": floating("nvfp4", "float4_e2m1fn")}
