"""Kernels that start while the one before them still runs (programmatic dependent launch)."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def follow() -> None:
    """Waits until the kernel before this one is done and seen, then lets the next one start.

    A kernel that calls it is launched as soon as all blocks of the one before have called it too;
    a kernel that lets nobody start early is done by then, with all that it wrote (PTX ISA,
    `griddepcontrol`). So what stands before the call may read weights, which no kernel right in
    front writes, and nothing else, unless it reads again behind the call and goes by that. Kernels
    of XLA may let the next one start early too (Triton matmuls do). Every thread must call it: that
    all earlier kernels are done when it returns rests on each having waited.
    """
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()
