"""The Hopper kernel: a tile of 128 x 128 is read once, and written in one or both orientations.

TMA brings the tile to shared memory and takes the codes from there. The transposed codes are made
from a transposed load of the same tile (LDSM.T), so both are written along their rows.
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

from pallas_kernels.cast_fp8.mosaic_gpu import Config
from pallas_kernels.cast_fp8.problem import BLOCK, SMALLEST, Problem

F32 = jnp.float32
HALF = 64  # rows of a tile that a warpgroup holds at a time
PIECES = 2  # of so many rows of codes in shared memory
STRIP = 128  # bytes over which shared memory is swizzled


def kernel(problem: Problem, config: Config) -> Callable[..., tuple[jax.Array, ...]]:
    """What `op.cast_fp8` returns, from x and, where scales are given, their reciprocals."""
    rows, columns = problem.rows, problem.columns
    dtype, given = jnp.dtype(problem.dtype), problem.scales == "given"
    sides = 2 if problem.turned else 1
    largest = float(jnp.finfo(dtype).max)
    lines = rows // BLOCK
    tiles = next(t for t in range(config.tiles, 0, -1) if lines % t == 0)
    halves = [pl.ds(HALF * h, HALF) for h in range(BLOCK // HALF)]
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA)

    def body(x_g, *refs, x_s, code_s, scale_s, full):
        i, j = lax.axis_index("i"), lax.axis_index("j")
        if not given:  # from the end, where what made x stopped: that is in L2. An amax of rows and
            # columns, after which scales are given, began there and stopped at the start.
            i = jnp.int32(lines // tiles - 1) - i
        inverse_g, out_g = (refs[:sides], refs[sides:]) if given else ((), refs)
        across = pl.ds(j * BLOCK, BLOCK)
        down = [pl.ds((i * tiles + t) * BLOCK, BLOCK) for t in range(tiles)]
        tile = [None] * tiles  # reciprocals of their scales

        def half(of, t, h):
            return x_s.at[t, halves[h]] if of == 0 else x_s.at[t, :, halves[h]].transpose((1, 0))

        def fetch(t):
            plgpu.copy_gmem_to_smem(x_g.at[down[t], across], x_s.at[t], full.at[t])
            for of, (ref, at) in enumerate(zip(inverse_g, (down[t], across), strict=False)):
                plgpu.copy_gmem_to_smem(ref.at[at], scale_s.at[of, t], full.at[t])

        def begin(t):
            plgpu.barrier_wait(full.at[t])
            if problem.scales == "tile":
                tops = [jnp.max(jnp.abs(load(x_s.at[t, at])), axis=1) for at in halves]
                top = jnp.max(functools.reduce(jnp.maximum, tops))
                found, tile[t] = scales_of(top.astype(F32), largest)
                scale_s[0, t] = jnp.broadcast_to(found, (BLOCK,))

        def cast(of, t, h):
            x = load(half(of, t, h))
            if problem.scales == "tile":
                return x.astype(F32) * tile[t]
            if given:
                inverse = scale_s[of, t, halves[h]]
            else:
                top = jnp.max(jnp.abs(x), axis=1).astype(F32)
                found, inverse = scales_of(top, largest)
                scale_s[of, t, halves[h]] = found
            return x.astype(F32) * lax.broadcast_in_dim(inverse, (HALF, BLOCK), (0,))

        def place(of, t, h):
            if of == 0:
                return out_g[0].at[pl.ds((i * tiles + t) * BLOCK + HALF * h, HALF), across]
            return out_g[1].at[pl.ds(j * BLOCK + HALF * h, HALF), down[t]]

        def place_of_scales(of, t, h):
            """Where the scales go that are complete with this piece, or None."""
            if problem.scales == "tile":
                return out_g[-1].at[i * tiles + t, across] if (of, h) == (0, 0) else None
            if given or h == 0:
                return None
            return out_g[sides].at[j, down[t]] if of == 0 else out_g[-1].at[i * tiles + t, across]

        for t in range(tiles):
            fetch(t)
        order = [(0, t, h) for t in range(tiles) for h in range(len(halves))]
        if sides == 2:  # neighbors in memory one after the other
            order += [(1, t, h) for h in range(len(halves)) for t in range(tiles)]
        for n, (of, t, h) in enumerate(order):
            if (of, h) == (0, 0):
                begin(t)
            code, slot = cast(of, t, h).astype(dtype), code_s.at[n % PIECES]
            if n >= PIECES:
                plgpu.wait_smem_to_gmem(PIECES - 1, wait_read_only=True)
            slot[...] = code
            plgpu.commit_smem()
            scales = place_of_scales(of, t, h)
            plgpu.copy_smem_to_gmem(slot, place(of, t, h), commit_group=scales is None)
            if scales is not None:
                plgpu.copy_smem_to_gmem(scale_s.at[of, t], scales)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = lambda size: (plgpu.TilingTransform((8, STRIP // size)), plgpu.SwizzleTransform(STRIP))
    scale = lambda a, b: jax.ShapeDtypeStruct((a // BLOCK, b), F32)
    shapes = ((rows, columns), (columns, rows))[:sides]
    out = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    if problem.scales == "block":
        out += [scale(*shape[::-1]) for shape in shapes]
    elif problem.scales == "tile":
        out += [scale(rows, columns)]
    run = plgpu.kernel(
        body,
        out_type=out,
        grid=(lines // tiles, columns // BLOCK),
        grid_names=("i", "j"),
        scratch_types={
            "x_s": plgpu.SMEM((tiles, BLOCK, BLOCK), problem.x, transforms=tiled(2)),
            "code_s": plgpu.SMEM((PIECES, HALF, BLOCK), dtype, transforms=tiled(1)),
            "scale_s": plgpu.SMEM((sides, tiles, BLOCK), F32),
            "full": plgpu.Barrier(num_arrivals=1 + given * sides, num_barriers=tiles),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )

    def cast_fp8(x, *inverses):
        made = run(x, *inverses)
        # TMA writes 16 bytes at least: a tile's one scale stands there 128 times
        return (*made[:2], made[2][:, ::BLOCK]) if problem.scales == "tile" else tuple(made)

    return cast_fp8


def scales_of(top: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """The scale and its reciprocal, each rounded once; NaN counts as Inf."""
    top = jnp.where(jnp.isnan(top), jnp.inf, jnp.maximum(top, SMALLEST))
    return top / largest, largest / top
