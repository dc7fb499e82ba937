"""Low-bit matmul kernels on plain arrays: no QTensor, no model, jax only.

How an op is arranged, `quantized_matmul` for example::

    quantized_matmul/
      op.py          the op as it is called: checks, derivative, vmap, partitioning
      problem.py     Weight, Problem: what is multiplied, without the numbers
      layout.py      Layout: how a weight lies, and what may be cut
      layouts.py     LAYOUTS, literal: name -> Layout
      reference.py   the definition, and what every choice ends at
      xla_cpu.py, mosaic_gpu.py   implementations; later ones (mosaic_tpu.py) stand beside them
      problems.py    PROBLEMS, literal: what tests, benchmarks and the tuner iterate
    frame.py         Device, Implementation
    dispatch.py      IMPLEMENTATIONS, literal: op -> name -> Implementation, best first; choose

To add an implementation: one file with `run(x, arrays, problem) -> y` and
`supports(problem, device) -> None | reason`, one row in `IMPLEMENTATIONS`; if it wants its weights
in an order of their own, one file with a `Layout` and one row in `LAYOUTS`.
"""
