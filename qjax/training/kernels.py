"""Where a kernel runs a recipe's casts and products: operands as 2-D views, and which views fit."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.amax.op import amax
from pallas_kernels.amax.problem import Problem as Amax
from pallas_kernels.block_scaled_matmul.op import block_scaled_matmul
from pallas_kernels.block_scaled_matmul.problem import Problem as Product
from pallas_kernels.cast_fp8.op import cast_fp8
from pallas_kernels.cast_fp8.problem import Problem as CastProblem
from pallas_kernels.dispatch import IMPLEMENTATIONS, choose
from pallas_kernels.frame import Device
from pallas_kernels.row_scaled_matmul.mosaic_gpu import COLUMNS, ROWS
from pallas_kernels.row_scaled_matmul.op import row_scaled_matmul
from pallas_kernels.row_scaled_matmul.problem import Problem as Scaled
from pallas_kernels.sharded import divides
from qjax import _compat, blocks
from qjax.formats import FORMATS
from qjax.qtensor import QTensor
from qjax.training.recipes import Cast

Axes = tuple[int, ...]
BLOCK = 128
KINDS = {128: "block", (128, 128): "tile", (): "given", None: "given"}  # by `Cast.block`
ALONE = {128: "block", None: "row"}  # the same, for one GEMM
TILES = 128  # of a product with scales of rows: about one per multiprocessor
LEAST = 2**22  # elements of x: at 2^20 XLA's cast to given scales was 1.16x as fast, at 2^22 0.8x


def runs(op: str, problem: Any) -> bool:
    """Whether something better than the reference runs it here, on one device or a mesh."""
    sizes = [v for v in problem if isinstance(v, int) and not isinstance(v, bool)]
    whole = jax.device_count() == 1 or all(map(divides, sizes))
    return whole and slower(problem) is None and choose(op, problem) != "reference"


def slower(problem: Any) -> str | None:
    """Why XLA's code is faster than a kernel would be, or None: kernels have more to start."""
    given = isinstance(problem, CastProblem) and problem.scales == "given"
    if given and problem.rows * problem.columns < LEAST:
        return f"x [{problem.rows}, {problem.columns}] has less than {LEAST} elements"
    if isinstance(problem, Scaled) and -(-problem.m // ROWS) * (problem.n // COLUMNS) < TILES:
        return f"the result [{problem.m}, {problem.n}] has less than {TILES} tiles"
    return None


def misplaced(x: jax.Array) -> str | None:
    """Why no kernel runs on `x`, wherever it is: they know Auto mesh axes, and whole shards."""
    if _compat.explicit_sharding(x) is not None:
        return "mesh axes are Explicit"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and (len(mesh.manual_axes) < len(mesh.axis_names)):
        return "some mesh axes of the shard_map are not manual"
    if _compat.varying_axes(x):
        return "the shard_map has check_vma, which kernels do not know"
    return None


def note(x: jax.Array, how: Cast | None, contract: Axes) -> str:
    """What a listing says of the casts of an operand: nothing where no kernel could run them."""
    device = Device.default()
    if how is None or hopper.missing(device) is not None:
        return ""
    kind = KINDS.get(how.block) if how.scale in ("current", "delayed") else None
    columns = math.prod(x.shape[a] for a in contract)
    rows = x.size // max(columns, 1)
    problem = CastProblem(rows, columns, kind or "given", dtype_of(how), x.dtype.name)
    if kind is None or how.stochastic or not problem.dtype.startswith("float8_e"):
        reason = f"no kernel casts to {how.format} like this"
    else:
        supports = IMPLEMENTATIONS["cast_fp8"]["mosaic_gpu"].supports
        reason = misplaced(x) or supports(problem, device) or slower(problem)
    if reason is None and not runs("cast_fp8", problem):
        reason = f"{jax.device_count()} devices may cut x [{rows}, {columns}] inside 128"
    return ", casts by mosaic_gpu" if reason is None else f", casts by XLA: {reason}"


def dtype_of(how: Cast) -> str:
    """The dtype name of the codes."""
    return str(FORMATS[how.format].storage)


def cast_both(
    x: jax.Array,
    how: Cast,
    contracts: Sequence[Axes],
    pair: Sequence[blocks.Block],
    scales: Callable[..., tuple[jax.Array, jax.Array]],
) -> tuple[QTensor, QTensor] | None:
    """X cast for two GEMMs from one read, the codes of each laid out as tensor cores take them.

    Args:
      x: floating point; axes in front that no GEMM contracts are layers.
      how: the cast, the same for both.
      contracts: the axes that each GEMM contracts.
      pair: the block of scales of each.
      scales: the number of a GEMM -> scales of its blocks and their reciprocals, for those that no
        tile of 128 x 128 holds; it takes the largest magnitudes of the blocks where they are known.

    Returns:
      None where no kernel takes it.
    """
    if how.stochastic or how.hadamard or how.scale not in ("current", "delayed"):
        return None
    kind, storage = KINDS.get(how.block), dtype_of(how)
    used = sorted({*contracts[0], *contracts[1]})
    layers = x.ndim - len(used)
    if kind is None or not all(contracts) or used != list(range(layers, x.ndim)):
        return None
    last = next((i for i in range(2) if x.ndim - 1 in contracts[i]), 0)
    along, down = sorted(contracts[last]), sorted(contracts[1 - last])
    if [*down, *along] != used:
        return None
    rows, columns = (math.prod(x.shape[a] for a in axes) for axes in (down, along))
    if not storage.startswith("float8_e"):
        return None
    ordered = [list(c) for c in contracts] == [sorted(c) for c in contracts]
    whole = ordered and all(x.shape[axes[-1]] % BLOCK == 0 for axes in (along, down))
    if kind != "given" and not whole:  # blocks lie along the innermost axis that is contracted
        return None
    problem = CastProblem(rows, columns, kind, storage, x.dtype.name)
    if misplaced(x) is not None or not runs("cast_fp8", problem):
        return None
    stack = x.shape[:layers]
    operands, found = [x.reshape(*stack, rows, columns)], ()
    if kind == "given":
        tops = _tops(operands[0], problem) if how.block is None else (None, None)
        found = tuple(
            scales(i, None if top is None else top.reshape(blocks.scale_shape(x.shape, pair[i])))
            for i, top in zip((last, 1 - last), tops, strict=True)
        )
        for (_, inverse), axes in zip(found, (down, along), strict=True):
            wide = jnp.broadcast_to(inverse, [*stack, *(_wide(inverse, x, a, axes) for a in used)])
            operands.append(_line(wide, layers, used, axes))
    run = lambda *v: cast_fp8(v[0], kind, *v[1:], dtype=storage)
    codes, turned, *made = _mapped(run, layers)(*operands)
    turned = jnp.swapaxes(turned, -1, -2)
    if kind == "block":
        made = [jnp.swapaxes(made[0], -1, -2), made[1]]
    of = [found[i][0] for i in range(2)] if kind == "given" else [made[0], made[-1]]
    out: list[Any] = [None, None]
    for i, code, scale in ((last, codes, of[0]), (1 - last, turned, of[1])):
        shape = blocks.scale_shape(x.shape, pair[i])
        out[i] = QTensor(
            code.reshape(x.shape),
            scale.reshape(shape),
            None,
            None,
            None,
            how.format,
            blocks.trim(pair[i]),
            np.dtype(x.dtype),
        )
    return out[0], out[1]


def cast_rows(x: jax.Array, how: Cast, contract: Axes, block: blocks.Block) -> QTensor | None:
    """X cast for one GEMM that contracts its last axes; None where no kernel takes it."""
    kind, storage = ALONE.get(how.block), dtype_of(how)
    last = list(range(x.ndim - len(contract), x.ndim))
    if kind is None or how.stochastic or how.hadamard or how.scale != "current":
        return None
    if not contract or sorted(contract) != last or not storage.startswith("float8_e"):
        return None
    if kind == "block" and (list(contract) != last or x.shape[-1] % BLOCK):
        return None
    columns = math.prod(x.shape[a] for a in contract)
    rows = x.size // max(columns, 1)
    problem = CastProblem(rows, columns, kind, storage, x.dtype.name, False)
    if misplaced(x) is not None or not runs("cast_fp8", problem):
        return None
    codes, scale = cast_fp8(x.reshape(rows, columns), kind, dtype=storage, turned=False)
    scale = scale.T.reshape(blocks.scale_shape(x.shape, block))
    dtype = np.dtype(x.dtype)
    codes = codes.reshape(x.shape)
    return QTensor(codes, scale, None, None, None, how.format, blocks.trim(block), dtype)


def _mapped(run: Callable[..., Any], layers: int) -> Callable[..., Any]:
    for _ in range(layers):
        run = jax.vmap(run)
    return run


def _tops(x: jax.Array, problem: CastProblem) -> tuple[Any, Any]:
    """The largest magnitudes of whole rows and of whole columns, or None twice.

    XLA would write |x| in float32 between the two: 10 bytes of traffic per element in place of 2.
    """
    if not runs("amax", Amax(problem.rows, problem.columns, problem.x)):
        return None, None
    return _mapped(amax, x.ndim - 2)(x)


def _wide(inverse: jax.Array, x: jax.Array, axis: int, kept: Sequence[int]) -> int:
    return x.shape[axis] if axis in kept else inverse.shape[axis]


def _line(wide: jax.Array, layers: int, used: Sequence[int], kept: Sequence[int]) -> jax.Array:
    return wide.reshape(*wide.shape[:layers], math.prod(wide.shape[a] for a in kept))


def product(a: QTensor, b: QTensor, numbers: Any, dtype: Any) -> jax.Array | None:
    """`lax.dot_general` of operands in blocks of 128 along the contraction, or None."""
    (of_a, of_b), batch = numbers
    if any(batch) or not of_a:
        return None
    views = [_view(q, axes) for q, axes in ((a, of_a), (b, of_b))]
    if any(v is None for v in views) or all(v[3] for v in views):
        return None
    swap = views[0][3]  # the kernel has tiles on the right
    left, right = views[::-1] if swap else views
    problem = Product(
        left[0].shape[0], right[0].shape[0], left[0].shape[1], not right[3], np.dtype(dtype).name
    )
    if not runs("block_scaled_matmul", problem):
        return None
    y = block_scaled_matmul(*left[:2], *right[:2], out=dtype)
    return (y.T if swap else y).reshape([*views[0][2], *views[1][2]])


def stored(a: QTensor, b: QTensor, numbers: Any, dtype: Any) -> jax.Array | None:
    """`lax.dot_general` of operands with a scale per row, for a result that is stored, or None.

    What reads a result may take scales of rows and columns up on its way; a store does not, and XLA
    would read and write all of it again.
    """
    (of_a, of_b), batch = numbers
    views = [_rows(q, axes) for q, axes in ((a, of_a), (b, of_b))]
    if any(batch) or any(v is None for v in views):
        return None
    (codes, scale, free), (other, other_scale, other_free) = views
    problem = Scaled(len(codes), len(other), codes.shape[1], np.dtype(dtype).name)
    if not runs("row_scaled_matmul", problem):
        return None
    y = row_scaled_matmul(codes, scale, other, other_scale, out=dtype)
    return y.reshape([*free, *other_free])


def _rows(q: QTensor, contract: Axes) -> Any:
    """(codes [free, contracted], scales [free], free shape), or None."""
    free = [a for a in range(q.ndim) if a not in contract]
    if not isinstance(q.qvalue, jax.Array) or not isinstance(q.scale, jax.Array):
        return None
    wanted = [1 if a in contract else q.shape[a] for a in range(q.ndim)]
    if not free or not contract or q.format != "fp8_e4m3" or list(q.scale.shape) != wanted:
        return None
    sizes = [q.shape[a] for a in free]
    if misplaced(q.qvalue) is not None:
        return None
    codes = lax.transpose(q.qvalue, (*free, *contract)).reshape(math.prod(sizes), -1)
    return codes, q.scale.reshape(-1), sizes


def _view(q: QTensor, contract: Axes) -> Any:
    """(codes [free, contracted], scales, free shape, whether they are tiles), or None."""
    block, last = blocks.align(q.block, q.ndim), contract[-1]
    free = [a for a in range(q.ndim) if a not in contract]
    if not isinstance(q.qvalue, jax.Array) or not isinstance(q.scale, jax.Array):
        return None
    if not free or q.format != "fp8_e4m3":
        return None
    blocked = {a: n for a, n in enumerate(block) if n != 1}
    tile = len(blocked) == 2
    wanted = {last: BLOCK, free[-1]: BLOCK} if tile else {last: BLOCK}
    if blocked != wanted or any(q.shape[axis] % BLOCK for axis in blocked):
        return None
    if misplaced(q.qvalue) is not None:
        return None
    width = math.prod(q.shape[a] for a in contract)
    codes = lax.transpose(q.qvalue, (*free, *contract)).reshape(-1, width)
    order = (*free, *contract) if tile else (*contract, *free)
    scale = lax.transpose(q.scale, order)
    lines = math.prod(scale.shape[: len(free) if tile else len(contract)])
    return codes, scale.reshape(lines, -1), [q.shape[a] for a in free], tile
