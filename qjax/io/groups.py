"""Matrices of integer codes in groups along their inputs, as GPTQ's files and their kind have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from qjax.activation import Activation
from qjax.formats import FORMATS, join_planes, split_planes
from qjax.qtensor import QTensor, check


class Grouped(NamedTuple):
    """A matrix `w[k, n] = (codes[k, n] - zeros[g, n]) * scale[g, n]`, g the group of k.

    Attributes:
      bits: of a code.
      codes: uint8 `[k, n]`, 0 to ``2 ** bits - 1``.
      scale: floats `[groups, n]`.
      zeros: integers `[groups, n]`; None where all are ``2 ** (bits - 1)``.
      group: neighbors along k that share a scale; the last group may be shorter.
      order: of the inputs, where groups are not of neighbors: row i of `codes` is the input
        ``order[i]``; None where they are.
    """

    bits: int
    codes: np.ndarray
    scale: np.ndarray
    zeros: np.ndarray | None
    group: int
    order: np.ndarray | None = None


FLOATS = tuple(np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32))


def told(array: np.ndarray | None) -> str:
    """What an array is, for messages."""
    return "missing" if array is None else f"{array.dtype} {array.shape}"


def neighbors(k: int, group: int) -> int:
    """Of `k` inputs those that share a scale; a group of -1 has all."""
    return k if group == -1 else min(group, k)


def check_part(
    parts: Mapping[str, np.ndarray],
    name: str,
    dtypes: Sequence[Any],
    size: tuple[int, ...],
    where: str,
) -> None:
    """Raises a ValueError unless a tensor is there, in one of the dtypes and of that size."""
    array = parts.get(name)
    if array is None or array.dtype not in dtypes or array.shape != size:
        kinds = " or ".join(np.dtype(d).name for d in dtypes)
        raise ValueError(f"{where}: {name!r} must be {kinds} {size}, is {told(array)}")


def to_qtensor(held: Grouped, dtype: DTypeLike) -> QTensor:
    """The QTensor `[k, n]` with the same codes and scales.

    Without zero points codes are held less ``2 ** (bits - 1)``, as `int4` and its like; with them
    as `uint4` and its like.
    """
    bits, half = held.bits, 1 << (held.bits - 1)
    zeros = held.zeros
    name = f"{'int' if zeros is None else 'uint'}{bits}"
    fmt, codes = FORMATS[name], held.codes
    if _is_signed(name):
        codes = (codes ^ np.uint8(half)).view(np.int8)
        codes = codes << np.int8(8 - bits) >> np.int8(8 - bits) if bits < 8 else codes
    point = None
    if zeros is not None:
        point = jnp.asarray(zeros.astype(_zero_dtype(int(zeros.max(initial=0)))))
    act = None
    if held.order is not None:
        act = Activation(axis=(-2,), permutation=jnp.asarray(held.order, jnp.int32))
    qvalue = split_planes(fmt, jnp.asarray(codes))
    block = (held.group, 1)
    return QTensor(qvalue, jnp.asarray(held.scale), point, None, act, name, block, np.dtype(dtype))


def plain(held: Grouped) -> Grouped:
    """Without zero points where they are ``2 ** (bits - 1)`` everywhere."""
    half = 1 << (held.bits - 1)
    none = held.zeros is not None and bool((held.zeros == half).all())
    return held._replace(zeros=None) if none else held


def alike(parts: Sequence[QTensor], where: str) -> list[QTensor]:
    """Matrices that are stacked, in one form: with zero points and an order where one has them."""
    first = parts[0]
    if all(jax.tree.structure(q) == jax.tree.structure(first) for q in parts) and all(
        [v.dtype for v in jax.tree.leaves(q)] == [v.dtype for v in jax.tree.leaves(first)]
        for q in parts
    ):
        return list(parts)
    if any(not re.fullmatch(r"u?int[2-8]", q.format) for q in parts):
        raise ValueError(f"{where}: are in unlike forms: {sorted({repr(q) for q in parts})}")
    held = [from_qtensor(q) for q in parts]
    if len({(h.bits, h.group, h.codes.shape, h.scale.dtype) for h in held}) > 1:
        raise ValueError(f"{where}: are in unlike forms: {sorted({repr(q) for q in parts})}")
    if any(h.zeros is not None for h in held):
        fill = lambda h: np.full(h.scale.shape, 1 << (h.bits - 1), np.int32)
        held = [h._replace(zeros=fill(h) if h.zeros is None else h.zeros) for h in held]
    if any(h.order is not None for h in held):
        order = np.arange(len(held[0].codes))
        held = [h._replace(order=order if h.order is None else h.order) for h in held]
    highest = max((int(h.zeros.max(initial=0)) for h in held if h.zeros is not None), default=0)
    made = [to_qtensor(h, q.dtype) for h, q in zip(held, parts, strict=True)]
    widen = lambda z: None if z is None else z.astype(_zero_dtype(highest))
    return [dataclasses.replace(q, zero_point=widen(q.zero_point)) for q in made]


def from_qtensor(q: QTensor) -> Grouped:
    """The inverse of `to_qtensor`: codes, scales and zero points as they are.

    Raises:
      ValueError: if `q` is no matrix of integers in groups along its first axis.
    """
    check(q)
    match = re.fullmatch(r"u?int([2-8])", q.format)
    matrix = q.ndim == 2 and q.block[1:] == (1,) and q.param_shape is None
    if match is None or not matrix or q.offset is not None or isinstance(q.scale, QTensor):
        raise ValueError(
            f"is {q!r}: these files hold matrices of int2 to int8, or of uint2 to uint8 with zero "
            "points, in groups along their inputs, with scales of one level"
        )
    if q.format.startswith("u") and q.zero_point is None:
        raise ValueError(f"is {q!r} without zero points: these files hold some for unsigned codes")
    if q.shape[0] % q.block[0] and q.block[0] < q.shape[0]:
        raise ValueError(
            f"is {q!r}: readers of these files want groups that divide the {q.shape[0]} inputs"
        )
    bits = int(match[1])
    half = 1 << (bits - 1)
    codes = np.asarray(join_planes(FORMATS[q.format], q.qvalue))
    if _is_signed(q.format):
        codes = codes.astype(np.int16) + half
    zeros = None if q.zero_point is None else np.asarray(q.zero_point).astype(np.int32)
    if zeros is not None and not q.format.startswith("u"):
        zeros = zeros + half
    return Grouped(bits, codes.astype(np.uint8), np.asarray(q.scale), zeros, q.block[0], _order(q))


def _order(q: QTensor) -> np.ndarray | None:
    act = q.activation
    if act is None:
        return None
    if act.input_scale is not None or act.signs is not None or act.spec is not None:
        raise ValueError(
            f"is {q!r} with an activation: these files have no place for input scales, rotations "
            "or codes of the other operand; qjax.models.fold moves AWQ's scales into the model"
        )
    return None if act.permutation is None else np.asarray(act.permutation)


def _is_signed(name: str) -> bool:
    return FORMATS[name].storage in ("int2", "int4", "int8")


def _zero_dtype(highest: int) -> np.dtype:
    """The narrowest for zero points: 0 to 16 in files of 4 bits that hold them less one."""
    return np.dtype(ml_dtypes.uint4 if highest < 16 else np.uint8 if highest < 256 else np.int32)
