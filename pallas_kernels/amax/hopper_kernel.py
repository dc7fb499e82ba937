"""The Hopper kernel: tiles of 128 x 128 are read once by TMA, and reduced in both directions.

Columns are reduced as the rows of a transposed load (LDSM.T), so that neither direction crosses
warps. The maxima of columns stay in registers over the tiles of a block.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.amax.mosaic_gpu import Config
from pallas_kernels.amax.problem import BLOCK, Problem

F32 = jnp.float32
HALF = 64  # rows of a tile that a warpgroup holds at a time
STRIP = 128  # bytes over which shared memory is swizzled


def kernel(problem: Problem, config: Config) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`x [rows, columns] -> (of rows [rows], of columns [columns])`."""
    rows, columns = problem.rows, problem.columns
    lines = rows // BLOCK
    tiles = next(t for t in range(config.tiles, 0, -1) if lines % t == 0)
    steps = min(config.steps, tiles)
    halves = [pl.ds(HALF * h, HALF) for h in range(BLOCK // HALF)]
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA)
    i32 = jnp.int32

    def body(x_g, rows_g, columns_g, x_s, top_s, full):
        # from the end, where what made x stopped; a cast then finds the start of x in L2
        i, j = i32(lines // tiles - 1) - lax.axis_index("i"), lax.axis_index("j")
        across = pl.ds(j * BLOCK, BLOCK)

        def fetch(t):
            slot = lax.rem(t, i32(steps))
            down = pl.ds((i * tiles + t) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x_g.at[down, across], x_s.at[slot], full.at[slot])

        def top(view):
            return jnp.max(jnp.abs(load(view)), axis=1).astype(F32)

        def one_tile(t, of_columns):
            slot = lax.rem(t, i32(steps))
            out, tile = lax.rem(t, i32(2)), x_s.at[slot]
            plgpu.barrier_wait(full.at[slot])
            of_rows = [top(tile.at[at]) for at in halves]
            found = [top(tile.at[:, at].transpose((1, 0))) for at in halves]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            for at, value in zip(halves, of_rows, strict=True):
                top_s[out, at] = _finite(value)
            plgpu.commit_smem()  # also: all have read the tile
            pl.when(t + steps < tiles)(lambda: fetch(t + steps))
            along = pl.ds((i * tiles + t) * BLOCK, BLOCK)
            plgpu.copy_smem_to_gmem(top_s.at[out], rows_g.at[j, along])
            return tuple(map(jnp.maximum, of_columns, found))

        for t in range(steps):
            fetch(i32(t))
        zero = plgpu.layout_cast(jnp.zeros(HALF, F32), plgpu.Layout.WGMMA.reduce(1))
        of_columns = lax.fori_loop(i32(0), i32(tiles), one_tile, (zero,) * len(halves))
        for at, value in zip(halves, of_columns, strict=True):
            top_s[2, at] = _finite(value)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(top_s.at[2], columns_g.at[i, across])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    transforms = (plgpu.TilingTransform((8, STRIP // 2)), plgpu.SwizzleTransform(STRIP))
    run = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((columns // BLOCK, rows), F32),
            jax.ShapeDtypeStruct((lines // tiles, columns), F32),
        ],
        grid=(lines // tiles, columns // BLOCK),
        grid_names=("i", "j"),
        scratch_types=[
            plgpu.SMEM((steps, BLOCK, BLOCK), problem.x, transforms=transforms),
            plgpu.SMEM((3, BLOCK), F32),
            plgpu.Barrier(num_arrivals=1, num_barriers=steps),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )

    def amax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_rows, of_columns = run(x)
        return jnp.max(of_rows, axis=0), jnp.max(of_columns, axis=0)

    return amax


def _finite(top: jax.Array) -> jax.Array:
    """NaN counts as Inf."""
    return jnp.where(jnp.isnan(top), jnp.inf, top)
