"""Which implementation runs a problem, and why not the others."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.add_norm import mosaic_gpu as norm_mosaic_gpu
from pallas_kernels.add_norm import reference as norm_reference
from pallas_kernels.amax import mosaic_gpu as amax_mosaic_gpu
from pallas_kernels.amax import reference as amax_reference
from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_mosaic_gpu
from pallas_kernels.block_scaled_matmul import reference as block_reference
from pallas_kernels.cast_fp8 import mosaic_gpu as cast_mosaic_gpu
from pallas_kernels.cast_fp8 import reference as cast_reference
from pallas_kernels.decode_attention import mosaic_gpu as attention_mosaic_gpu
from pallas_kernels.decode_attention import reference as attention_reference
from pallas_kernels.frame import Device, Implementation
from pallas_kernels.gated import mosaic_gpu as gated_mosaic_gpu
from pallas_kernels.gated import reference as gated_reference
from pallas_kernels.int8_matmul import mosaic_gpu as int8_mosaic_gpu
from pallas_kernels.int8_matmul import reference as int8_reference
from pallas_kernels.norm_matmul import mosaic_gpu as norm_matmul_mosaic_gpu
from pallas_kernels.norm_matmul import reference as norm_matmul_reference
from pallas_kernels.quantized_matmul import mosaic_gpu, mosaic_wgmma, reference, xla_cpu
from pallas_kernels.row_scaled_matmul import mosaic_gpu as row_mosaic_gpu
from pallas_kernels.row_scaled_matmul import reference as row_reference

# op -> name -> implementation, best first; the reference is last and takes everything.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "quantized_matmul": {
        "mosaic_gpu": Implementation(
            mosaic_gpu.run, mosaic_gpu.supports, True, mosaic_gpu.run_joined, mosaic_gpu.joins
        ),
        "mosaic_wgmma": Implementation(
            mosaic_wgmma.run,
            mosaic_wgmma.supports,
            True,
            mosaic_wgmma.run_joined,
            mosaic_wgmma.joins,
        ),
        "xla_cpu": Implementation(xla_cpu.run, xla_cpu.supports),
        "reference": Implementation(reference.run, reference.supports),
    },
    "int8_matmul": {
        "mosaic_gpu": Implementation(int8_mosaic_gpu.run, int8_mosaic_gpu.supports),
        "reference": Implementation(int8_reference.run, int8_reference.supports),
    },
    "cast_fp8": {
        "mosaic_gpu": Implementation(cast_mosaic_gpu.run, cast_mosaic_gpu.supports),
        "reference": Implementation(cast_reference.run, cast_reference.supports),
    },
    "amax": {
        "mosaic_gpu": Implementation(amax_mosaic_gpu.run, amax_mosaic_gpu.supports),
        "reference": Implementation(amax_reference.run, amax_reference.supports),
    },
    "decode_attention": {
        "mosaic_gpu": Implementation(attention_mosaic_gpu.run, attention_mosaic_gpu.supports),
        "reference": Implementation(attention_reference.run, attention_reference.supports),
    },
    "add_norm": {
        "mosaic_gpu": Implementation(norm_mosaic_gpu.run, norm_mosaic_gpu.supports),
        "reference": Implementation(norm_reference.run, norm_reference.supports),
    },
    "gated": {
        "mosaic_gpu": Implementation(gated_mosaic_gpu.run, gated_mosaic_gpu.supports),
        "reference": Implementation(gated_reference.run, gated_reference.supports),
    },
    "norm_matmul": {
        "mosaic_gpu": Implementation(norm_matmul_mosaic_gpu.run, norm_matmul_mosaic_gpu.supports),
        "reference": Implementation(norm_matmul_reference.run, norm_matmul_reference.supports),
    },
    "block_scaled_matmul": {
        "mosaic_gpu": Implementation(block_mosaic_gpu.run, block_mosaic_gpu.supports),
        "reference": Implementation(block_reference.run, block_reference.supports),
    },
    "row_scaled_matmul": {
        "mosaic_gpu": Implementation(row_mosaic_gpu.run, row_mosaic_gpu.supports),
        "reference": Implementation(row_reference.run, row_reference.supports),
    },
}


def choose(
    op: str, problem: Any, device: Device | None = None, implementation: str | None = None
) -> str:
    """The name of the implementation that runs `problem`.

    Args:
      op: a key of `IMPLEMENTATIONS`.
      problem: of that op.
      device: where it runs; None for the default device.
      implementation: a name, which is taken or refused, never replaced; None for the first one that
        supports the problem.

    Raises:
      ValueError: if the named implementation is unknown or does not support the problem.
    """
    rows = IMPLEMENTATIONS[op]
    device = Device.default() if device is None else device
    if implementation is None:
        return next(name for name, row in rows.items() if row.supports(problem, device) is None)
    if implementation not in rows:
        raise ValueError(f"{op} has no implementation {implementation!r}, only {', '.join(rows)}")
    reason = rows[implementation].supports(problem, device)
    if reason is not None:
        raise ValueError(
            f"{op}: {implementation} cannot run {problem} on {device.kind}: {reason}; "
            "implementation=None takes the best one that can"
        )
    return implementation
