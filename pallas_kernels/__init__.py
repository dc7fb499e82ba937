"""Low-bit matmuls and casts on plain arrays: no QTensor, no model, jax only.

How an op is arranged, `quantized_matmul` for example::

    quantized_matmul/
      op.py          the op as it is called: checks, derivative, vmap, partitioning
      problem.py     Weight, Problem: what is multiplied, without the numbers
      layout.py      Layout: how a weight lies, and what may be cut
      layouts.py     LAYOUTS, literal: name -> Layout
      reference.py   the definition, and what every choice ends at
      xla_cpu.py, mosaic_gpu.py   implementations; later ones (mosaic_tpu.py) stand beside them
      problems.py    literal dicts: what tests, benchmarks and the tuner iterate
    cast_fp8/, block_scaled_matmul/, row_scaled_matmul/   the same, without layouts and partitioning
    frame.py         Device, Implementation
    hopper.py        what kernels for Hopper need of a device
    mapping.py       looped: vmap as a loop on the device
    dispatch.py      IMPLEMENTATIONS, literal: op -> name -> Implementation, best first; choose

To add an implementation: one file with `run(x, arrays, problem) -> y` and
`supports(problem, device) -> None | reason`, one row in `IMPLEMENTATIONS`; if it wants its weights
in an order of their own, one file with a `Layout` and one row in `LAYOUTS`.
"""
