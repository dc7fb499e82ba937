"""The Hopper kernel: a tile of 128 x 128 is read once, and written in one or both orientations.

TMA brings the tile to shared memory and takes the codes from there. The transposed codes are made
from a transposed load of the same tile (LDSM.T), so both are written along their rows.
"""

# jax 0.10, which is too old for the kernel, wants an index for `load` and hides `ACC`.
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import functools
import itertools
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
STRIP = 128  # bytes over which shared memory is swizzled


def kernel(problem: Problem, config: Config) -> Callable[..., tuple[jax.Array, ...]]:
    """What `op.cast_fp8` returns, from x and, where scales are given, their reciprocals."""
    rows, columns = problem.rows, problem.columns
    dtype, given = jnp.dtype(problem.dtype), problem.scales == "given"
    sides = 2 if problem.turned else 1
    largest = float(jnp.finfo(dtype).max)
    lines = rows // BLOCK
    tiles = next(t for t in range(min(config.tiles, lines), 0, -1) if lines % t == 0)
    steps, outs = min(config.steps, tiles), min(config.outs, tiles)
    halves = [pl.ds(HALF * h, HALF) for h in range(BLOCK // HALF)]
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA)
    i32 = jnp.int32

    def body(x_g, *refs, x_s, code_s, scale_s, full):
        i, j = lax.axis_index("i"), lax.axis_index("j")
        inverse_g, out_g = (refs[:sides], refs[sides:]) if given else ((), refs)
        across = pl.ds(j * BLOCK, BLOCK)

        def fetch(t):
            slot = lax.rem(t, i32(steps))
            down = pl.ds((i * tiles + t) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(x_g.at[down, across], x_s.at[slot], full.at[slot])
            for of, (ref, at) in enumerate(zip(inverse_g, (down, across), strict=False)):
                plgpu.copy_gmem_to_smem(ref.at[at], scale_s.at[slot, of], full.at[slot])

        def write(out, x, inverse):
            out[...] = (x * inverse).astype(dtype)

        def rows_of(vector):
            return lax.broadcast_in_dim(vector, (HALF, BLOCK), (0,))

        def one_tile(t, _):
            slot, out = lax.rem(t, i32(steps)), lax.rem(t, i32(outs))
            tile = x_s.at[slot]
            views = (
                [tile.at[at] for at in halves],
                [tile.at[:, at].transpose((1, 0)) for at in halves],
            )
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem((outs - 1) * len(out_g), wait_read_only=True)
            inverse = None
            if problem.scales == "tile":
                tops = [jnp.max(jnp.abs(load(view).astype(F32)), axis=1) for view in views[0]]
                found, inverse = scales_of(jnp.max(functools.reduce(jnp.maximum, tops)), largest)
                scale_s[out, 0] = jnp.broadcast_to(found, (BLOCK,))
            for of, at in itertools.product(range(sides), range(len(halves))):
                x, code = load(views[of][at]).astype(F32), code_s.at[out, of, halves[at]]
                if problem.scales == "block":
                    found, inverse = scales_of(jnp.max(jnp.abs(x), axis=1), largest)
                    scale_s[out, of, halves[at]] = found
                    write(code, x, rows_of(inverse))
                elif given:
                    write(code, x, rows_of(scale_s[slot, of, halves[at]]))
                else:
                    write(code, x, inverse)
            plgpu.commit_smem()  # also: all have read the tile
            pl.when(t + steps < tiles)(lambda: fetch(t + steps))
            down = i * tiles + t
            along = pl.ds(down * BLOCK, BLOCK)
            places = [out_g[0].at[along, across], out_g[sides - 1].at[across, along]][:sides]
            if problem.scales == "block":
                places += [out_g[sides].at[j, along], out_g[-1].at[down, across]][:sides]
            elif problem.scales == "tile":
                places += [out_g[2].at[down, across]]
            made = [ref.at[out, of] for ref in (code_s, scale_s) for of in range(sides)]
            for source, place in zip(made, places, strict=False):
                plgpu.copy_smem_to_gmem(source, place)
            return _

        for t in range(steps):
            fetch(i32(t))
        lax.fori_loop(i32(0), i32(tiles), one_tile, i32(0))
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
            "x_s": plgpu.SMEM((steps, BLOCK, BLOCK), problem.x, transforms=tiled(2)),
            "code_s": plgpu.SMEM((outs, sides, BLOCK, BLOCK), dtype, transforms=tiled(1)),
            "scale_s": plgpu.SMEM((max(steps, outs), sides, BLOCK), F32),
            "full": plgpu.Barrier(num_arrivals=1 + given * sides, num_barriers=steps),
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
