"""The layouts of quantized weights."""

from collections.abc import Mapping

from pallas_kernels.quantized_matmul import hopper_layout, rows
from pallas_kernels.quantized_matmul.layout import Layout

# name -> layout. For a weight without a name `prepare` takes the first one that its platform wants
# and that supports it.
LAYOUTS: Mapping[str, Layout] = {
    "nibbles": rows.NIBBLES,
    "bytes": rows.BYTES,
    "hopper4": hopper_layout.HOPPER4,
    "hopper8": hopper_layout.HOPPER8,
}
