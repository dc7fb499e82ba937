"""Kernels that start while the one before them still runs (programmatic dependent launch)."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def follow() -> None:
    """Waits until the kernel before this one is done and seen, then lets the next one start.

    A kernel that calls it is launched early: what stands before the call runs beside the kernel
    before it, and may read nothing that this one writes. When the call returns, all earlier kernels
    are done, since each of them has waited too. Every thread must call it.
    """
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()
