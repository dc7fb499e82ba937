"""The element encodings of llama.cpp's block types.

A block type is one of these rows plus the block structure that `Spec.parse` gives it: how many
elements share a scale, and how the scales themselves are held. The codes are those of the file,
unpacked.
"""

from qjax.formats.base import Format
from qjax.formats.integer import integer

GGML: dict[str, Format] = {
    "q8_0": integer("q8_0", 8, -128),
    "q4_0": integer("q4_0", 4, -8),
    "q4_1": integer("q4_1", 4, 0),
    "q5_0": integer("q5_0", 5, -16),
    "q5_1": integer("q5_1", 5, 0),
    "q4_k": integer("q4_k", 4, 0),
    "q5_k": integer("q5_k", 5, 0),
    "q6_k": integer("q6_k", 6, -32),
}
