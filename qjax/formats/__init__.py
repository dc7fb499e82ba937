"""FORMATS: every element encoding, one row each.

A new row is a new format; nothing else names them.
"""

from qjax.formats.base import PLANE_BITS as PLANE_BITS
from qjax.formats.base import Codes as Codes
from qjax.formats.base import Format as Format
from qjax.formats.base import join_planes as join_planes
from qjax.formats.base import move_codes as move_codes
from qjax.formats.base import split_planes as split_planes
from qjax.formats.codebook import CODEBOOK
from qjax.formats.floating import FLOATING
from qjax.formats.ggml import GGML
from qjax.formats.integer import INTEGER
from qjax.formats.microscaling import MICROSCALING

FORMATS: dict[str, Format] = {
    **INTEGER,
    **FLOATING,
    **CODEBOOK,
    **MICROSCALING,
    **GGML,
}
