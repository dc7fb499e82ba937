"""What all kernels for Hopper need of a device."""

import jax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.hopper_layout import is_hopper


def missing(device: Device) -> str | None:
    """Why no kernel for Hopper runs there, or None."""
    if not is_hopper(device):
        return f"it is compiled for H100 and H200, not for {device.kind}"
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
        return f"it needs jax 0.11 or newer, this is {jax.__version__}"
    return None
