"""Every structural operation on one format, in a process of its own: XLA:CPU aborts on some dtypes.

`python format_matrix.py few|each FORMAT...` says what differs on its last line: `few` runs some
operations in one compilation, `each` all of them one by one, with blocks along every axis.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax
from qjax.spec import WHOLE_SPECS

# Operations on [4, m, n]. Whether codes are carried or opened is the business of test_structural;
# here only the numbers count.
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "transpose: last to first": lambda w: w.transpose(2, 0, 1),
    "transpose: outer axes": lambda w: w.transpose(1, 0, 2),
    "transpose twice": lambda w: w.transpose(2, 1, 0).transpose(0, 2, 1),
    "reshape: merge outer": lambda w: w.reshape(-1, w.shape[2]),
    "reshape: merge inner": lambda w: w.reshape(4, -1),
    "reshape: flat": lambda w: w.reshape(-1),
    "reshape: split last": lambda w: w.reshape(*w.shape[:2], -1, 8),
    "reshape: split first": lambda w: w.reshape(2, 2, *w.shape[1:]),
    "reshape: unit axes": lambda w: w.reshape(1, 4, -1, 1, w.shape[2], 1),
    "expand_dims": lambda w: w[:, None, :, None],
    "squeeze": lambda w: w[:1].squeeze(0),
    "slice outer": lambda w: w[1:3],
    "slice middle": lambda w: w[:, 2:5],
    "slice last at a block": lambda w: w[..., 8:24],
    "slice last inside a block": lambda w: w[..., 3:21],
    "strided slice": lambda w: w[:, ::2],
    "strided slice of last": lambda w: w[..., 1::3],
    "dynamic_slice outer": lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(1), 2, axis=0),
    "dynamic_slice out of bounds": lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(9), 2, axis=1),
    "dynamic_slice last": lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(8), 8, axis=2),
    "dynamic index": lambda w: lax.dynamic_index_in_dim(w, jnp.int32(2), keepdims=False),
    "dynamic_update_slice": lambda w: lax.dynamic_update_slice(
        w, w[:1] * 2, (jnp.int32(1), jnp.int32(0), jnp.int32(0))
    ),
    "concatenate outer": lambda w: jnp.concatenate([w[:1], w], axis=0),
    "concatenate middle": lambda w: jnp.concatenate([w, w[:, :1]], axis=1),
    "concatenate last": lambda w: jnp.concatenate([w, w], axis=2),
    "concatenate a shorter end": lambda w: jnp.concatenate([w, w[:2], w[:3]], axis=0),
    "stack": lambda w: jnp.stack([w, w]),
    "split": lambda w: jnp.concatenate(jnp.split(w, 2, axis=0)[::-1]),
    "split last": lambda w: jnp.split(w, 2, axis=2)[1],
    "pad": lambda w: jnp.pad(w, ((1, 0), (0, 2), (3, 1))),
    "take rows": lambda w: jnp.take(w, jnp.array([3, 0, 0]), axis=0),
    "take middle": lambda w: jnp.take(w, jnp.array([[5], [1]]), axis=1),
    "take last": lambda w: jnp.take(w, jnp.array([1, 9, 2]), axis=2),
    "take out of bounds": lambda w: jnp.take(w, jnp.array([1, 7]), axis=0, mode="clip"),
    "gather pairs": lambda w: w[jnp.array([0, 2]), jnp.array([5, 1])],
    "broadcast": lambda w: jnp.broadcast_to(w[None], (2, *w.shape)),
    "broadcast a unit axis": lambda w: jnp.broadcast_to(w[:, :1], w.shape),
    "tile": lambda w: jnp.tile(w, (2, 1, 1)),
    "rev": lambda w: w[::-1],
    "rev last": lambda w: w[..., ::-1],
    "where": lambda w: jnp.where(w > 0, w, -w),
    "sort": lambda w: jnp.sort(w, axis=2),
    "sum": lambda w: w.sum(0),
    "cast": lambda w: w.astype(jnp.bfloat16),
    "to integers": lambda w: (w * 8).astype(jnp.int32),
    "barrier": lambda w: lax.optimization_barrier(w),
    "vmap": lambda w: jax.vmap(lambda v: v.T)(w),
    "scan": lambda w: lax.scan(lambda c, v: (c, v[::2] * 2), 0, w)[1],
    "dot last": lambda w: jnp.einsum("abk,ck->abc", w, _x(w.shape[2])),
    "dot middle": lambda w: jnp.einsum("akb,ck->abc", w, _x(w.shape[1])),
    "dot of a transpose": lambda w: _x(w.shape[0]) @ w.transpose(2, 0, 1),
    "dot of rows": lambda w: jnp.take(w, jnp.array([3, 0]), axis=0) @ _x(w.shape[2]).T,
}
FEW = (
    *("transpose: last to first", "reshape: merge inner", "slice last inside a block"),
    *("concatenate outer", "take middle", "scan", "dot of rows"),
)
INEXACT = ("dot", "sum")  # their order of summation is XLA's


def _x(k: int) -> jax.Array:
    return jnp.cos(jnp.arange(3 * k, dtype=jnp.float32)).reshape(3, k)


def examples(name: str) -> Iterator[tuple[str, qjax.QTensor]]:
    """QTensors [4, m, n] of a format, with blocks along the last axis, then along others."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    if name in WHOLE_SPECS:
        n = 256 if WHOLE_SPECS[name].scale_method == "ggml" else 32
        yield "last", qjax.quantize(normal(4, 6, n), name, 2)
        yield "middle", qjax.quantize(normal(4, n, 32), name, 1)
        return
    yield "last", qjax.quantize(normal(4, 6, 32), f"{name}_g8", 2)
    yield "last, ragged", qjax.quantize(normal(4, 6, 32), f"{name}_g5", 2)
    yield "middle", qjax.quantize(normal(4, 6, 32), f"{name}_g3", 1)
    yield "all", qjax.quantize(normal(4, 6, 32), f"{name}_tensor", 2)


@functools.cache
def programs(names: tuple[str, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Some operations on a QTensor, and on the array, which formats of one shape share."""
    fn = lambda w: {n: OPERATIONS[n](w) for n in names}
    return jax.jit(qjax.quantized(fn)), jax.jit(fn)


def differences(q: qjax.QTensor, names: tuple[str, ...]) -> Iterator[str]:
    """The operations whose results are not those of the dequantized array."""
    quantized, dense = programs(names)
    got, wanted = quantized(q), dense(qjax.dequantize(q))
    # Scales that have an offset of their own are contracted to one rounding or not, as XLA fuses.
    exact = not (isinstance(q.scale, qjax.QTensor) and q.scale.offset is not None)
    for n in names:
        a, b = (np.asarray(v[n]).astype(np.float64) for v in (got, wanted))
        if (got[n].dtype, a.shape) != (wanted[n].dtype, b.shape):
            yield f"{n}: gives {got[n].dtype} {a.shape}, needed {wanted[n].dtype} {b.shape}"
            continue
        rtol = 0 if exact and not n.startswith(INEXACT) else 1e-5
        if not np.allclose(a, b, rtol, rtol * np.abs(b).max(initial=0)):
            yield f"{n}: is off by {np.abs(a - b).max()}"


def main(mode: str, names: list[str]) -> None:
    """Writes where it is to stderr, and what differs as JSON to stdout."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = []
    for name in names:
        for where, q in examples(name):
            groups = [FEW] if mode == "few" else [(n,) for n in OPERATIONS]
            for group in groups:
                sys.stderr.write(f"{name} {where} {', '.join(group)}\n")
                sys.stderr.flush()
                found += [f"{name}, blocks along {where}: {d}" for d in differences(q, group)]
            if mode == "few":
                break
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
