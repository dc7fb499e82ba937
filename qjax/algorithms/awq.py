"""AWQ: scale up the input features that matter, by a search on the error of the output."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import blocks, quantizing
from qjax.algorithms.base import Algorithm, Notes, Stats, needed
from qjax.algorithms.grid import AXIS, nearest
from qjax.algorithms.rtn import rtn
from qjax.algorithms.scaled import quantize_scaled
from qjax.qtensor import QTensor, dequantize
from qjax.spec import Spec


def awq(
    grid: int = 20,
    clip: bool = True,
    solver: Callable[[], Algorithm] = rtn,
    shared: tuple[int, int] | None = None,
) -> Algorithm:
    """AWQ: searches the input scale s that leaves the least error in the output of x @ w.

        error(Q) = ||x (w - Q(s * w) / s)||^2 = trace(E^T X^T X E)
        s_j = mean|x_j|^a             and  s_j = mean|x_j|^a / mean_o(|w_jo| / max|block|)^(1 - a)

    for a = 0, 1/grid ... 1, s brought to sqrt(max s * min s) = 1 (Lin et al., arXiv:2306.00978,
    section 3.2; the second form is that of the authors' code). Then each block of each output is
    clipped to 1, 0.95 ... 0.5 of its range by the error that its own features leave, and an output
    keeps its clips if its whole error is less with them. a = 0 is rounding to nearest, so that the
    error is never larger than that.

    Args:
      grid: how many steps a takes.
      clip: whether to search clips. Where a block spans several outputs there is no such search.
      solver: makes the algorithm that then chooses the codes of s * w, with the scales that the
        clips leave: `qjax.rtn` or `qjax.gptq`.
      shared: (heads, head_dim) for an o projection whose query heads share a value head so many at
        a time: they get one s, from the means of mean|x_j| and of the other factor over them, so
        that `qjax.models.fold` can move it into v. None: every feature has its own.

    Returns:
      An Algorithm that needs the hessian and mean_abs. Joint: weights with one input share s, which
      is the QTensor's `input_scale`; `qjax.models.fold` moves it into what makes x. Its notes:
      "rtn_error" and "error", the error before and after (with round to nearest), relative to that
      of no weight at all.

    Raises:
      ValueError: if `grid` or a number of `shared` is below 1, or the features are no multiple of
        those of `shared`.

    Deviations: the error is that of this weight's own output, exactly, from the hessian; the
    authors take samples, and the output of the block it stands in. s_j is 1 for a feature that
    calibration never saw. The authors leave out an o whose heads share value heads.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.ones(32).at[3].set(30)[None]
      >>> w = jax.random.normal(jax.random.key(1), (32, 8))
      >>> stats = qjax.Stats(hessian=x.T @ x, mean_abs=jnp.abs(x).mean(0))
      >>> q, notes = qjax.awq().quantize(w, qjax.Spec.parse("int3_g16"), stats)
      >>> bool(notes["error"] < 0.5 * notes["rtn_error"])
      True
    """
    if grid < 1:
        raise ValueError(f"awq: grid must be at least 1, got {grid}; the paper's is 20")
    if shared is not None and min(shared) < 1:
        raise ValueError(f"awq: shared must be two counts, heads and head_dim, got {shared}")
    inner = solver()

    def quantize(w: jax.Array, spec: Spec, stats: Stats) -> tuple[QTensor, Notes]:
        h, mean_abs = (needed("awq", stats, name) for name in ("hessian", "mean_abs"))
        if shared is not None and w.shape[0] % (shared[0] * shared[1]):
            raise ValueError(f"awq: {w.shape[0]} features are no heads that share {shared}")
        scale, within, notes = _search(w, spec, h, mean_abs, grid, clip, shared)
        q, more = quantize_scaled(inner, w, spec, stats, scale, within)
        return q, notes | more

    needs, options = frozenset({"hessian", "mean_abs"}) | inner.needs, f"{grid}, {clip}, {inner}"
    options += f", shared {shared}" if shared is not None else ""
    return Algorithm("awq", needs, True, quantize, options=options)


@functools.partial(jax.jit, static_argnums=(1, 4, 5, 6))
def _search(
    w: jax.Array,
    spec: Spec,
    hessian: jax.Array,
    mean_abs: jax.Array,
    grid: int,
    clip: bool,
    shared: tuple[int, int] | None,
) -> tuple[jax.Array, jax.Array | None, Notes]:
    """(s, what to choose the scales of s * w from, notes)."""
    w, h = w.astype(jnp.float32), hessian.astype(jnp.float32)
    total = jnp.trace(h)
    h = h / jnp.where(total > 0, total, 1)
    error = lambda scale: jnp.sum(
        _errors(h, w - _rounded(w * scale[:, None], spec) / scale[:, None])
    )
    mean_abs, of_w = (_over_heads(v, shared) for v in (mean_abs, _relative(w, spec)))
    seen = mean_abs > 0
    of_x = jnp.where(seen, mean_abs, 1)

    def scale_of(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        a, by_weight = candidate
        scale = of_x**a / jnp.where(by_weight, of_w ** (1 - a), 1)
        low = jnp.min(jnp.where(seen, scale, jnp.inf))
        high = jnp.max(jnp.where(seen, scale, 0))
        scale = scale / jnp.sqrt(jnp.where(jnp.any(seen), low * high, 1))
        return jnp.where(seen, scale, 1)

    def step(best: tuple, candidate: tuple) -> tuple[tuple, None]:
        scale = scale_of(candidate)
        found = (error(scale), scale)
        better = found[0] < best[0]
        return tuple(jnp.where(better, n, o) for n, o in zip(found, best, strict=True)), None

    start = jnp.ones(w.shape[0], jnp.float32)
    rtn_error = error(start)
    steps = np.linspace(0, 1, grid + 1, dtype=np.float32)
    candidates = np.tile(steps, 2), np.repeat([False, True], grid + 1)
    (least, scale), _ = lax.scan(step, (rtn_error, start), jax.tree.map(jnp.asarray, candidates))
    within = None
    if clip and quantizing.block_of(spec, w.shape, (AXIS,))[1] == 1:
        within, least = _clipped(w * scale[:, None], spec, h / scale[:, None] / scale[None, :])
    whole = jnp.sum(_errors(h, w))
    relative = lambda v: v / jnp.where(whole > 0, whole, 1)
    return scale, within, {"rtn_error": relative(rtn_error), "error": relative(least)}


def _over_heads(values: jax.Array, shared: tuple[int, int] | None) -> jax.Array:
    """Those of features, or their means over the heads that share one."""
    if shared is None:
        return values
    heads = values.reshape(-1, *shared)
    return jnp.broadcast_to(heads.mean(1, keepdims=True), heads.shape).reshape(-1)


def _rounded(w: jax.Array, spec: Spec, within: jax.Array | None = None) -> jax.Array:
    return dequantize(nearest(w, spec, within)[0])


def _errors(h: jax.Array, e: jax.Array) -> jax.Array:
    """e^T H e of each output."""
    return jnp.sum(e * jnp.matmul(h, e, precision="highest"), axis=0)


def _relative(w: jax.Array, spec: Spec) -> jax.Array:
    """The mean over outputs of |w| / max|block|, positive."""
    block = quantizing.block_of(spec, w.shape, (AXIS,))
    ratio = lambda v, top: jnp.abs(v) / jnp.where(top == 0, 1, top)
    return jnp.mean(blocks.apply(ratio, w, block, blocks.largest(w, block)), axis=1) + 1e-4


def _clipped(w: jax.Array, spec: Spec, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """W with the blocks clipped that gain by it, and the error that is left."""
    size, out = w.shape
    block = quantizing.block_of(spec, w.shape, (AXIS,))
    count = -(-size // block[0])
    low, high = blocks.extremes(w, block)
    if spec.symmetric:
        high = jnp.maximum(high, -low)
        low = -high
    middle, half = (low + high) / 2, (high - low) / 2
    pad = count * block[0] - size
    padded = jnp.pad(h, [(0, pad), (0, pad)]).reshape(count, block[0], count, block[0])
    own = padded[jnp.arange(count), :, jnp.arange(count), :]  # each block's features alone

    def clip(factor: jax.Array) -> jax.Array:
        inside = lambda x, m, r: jnp.clip(x, m - r, m + r)
        return blocks.apply(inside, w, block, middle, half * factor)

    def error(factor: jax.Array) -> jax.Array:
        e = jnp.pad(w - _rounded(w, spec, clip(factor)), [(0, pad), (0, 0)])
        e = e.reshape(count, block[0], out)
        return jnp.sum(e * jnp.einsum("gij,gjo->gio", own, e, precision="highest"), axis=1)

    def step(best: tuple, factor: jax.Array) -> tuple[tuple, None]:
        factor = jnp.full((count, out), factor)
        found = (error(factor), factor)
        better = found[0] < best[0]
        return tuple(jnp.where(better, n, o) for n, o in zip(found, best, strict=True)), None

    ones = jnp.ones((count, out), jnp.float32)
    factors = np.linspace(0.95, 0.5, 10, dtype=np.float32)
    (_, factor), _ = lax.scan(step, (error(ones), ones), jnp.asarray(factors))
    clipped = clip(factor)
    with_clips, without = (_errors(h, w - _rounded(w, spec, v)) for v in (clipped, w))
    gains = with_clips < without
    return jnp.where(gains[None, :], clipped, w), jnp.sum(jnp.minimum(with_clips, without))
