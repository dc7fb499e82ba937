"""What all kernels for Hopper need of a device."""

import jax

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.hopper_layout import is_hopper
from pallas_kernels.sharded import BLOCK

ROWS = 64  # of a decode step


def missing(device: Device) -> str | None:
    """Why no kernel for Hopper runs there, or None."""
    if not is_hopper(device):
        return f"it is compiled for H100 and H200, not for {device.kind}"
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
        return f"it needs jax 0.11 or newer, this is {jax.__version__}"
    return None


def missing_tiles(device: Device, rows: int, columns: int, dtype: str) -> str | None:
    """Why no kernel that goes over x by tiles runs there, or None."""
    reason = missing(device)
    if reason is not None:
        return reason
    if rows % BLOCK or columns % BLOCK:
        return f"x [{rows}, {columns}] must be of multiples of {BLOCK}"
    return None if dtype == "bfloat16" else f"x is {dtype}, it takes bfloat16"


def missing_alone(device: Device) -> str | None:
    """Why no kernel that knows no mesh runs there, or None."""
    count = jax.device_count()
    reason = f"it runs on one device, here are {count}" if count > 1 else None
    return missing(device) or reason


def missing_rows(device: Device, rows: int, width: int, dtype: str) -> str | None:
    """As `missing_alone`, for kernels that take a few rows of bfloat16 in multiples of 128."""
    reason = missing_alone(device)
    if reason is not None:
        return reason
    if dtype != "bfloat16":
        return f"the arrays are {dtype}, it takes bfloat16"
    if width % BLOCK:
        return f"rows of {width}: it takes multiples of {BLOCK}"
    return f"{rows} rows, it takes {ROWS}" if rows > ROWS else None
