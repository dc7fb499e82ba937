"""Quantized trees in Orbax checkpoints, at their nominal size.

A checkpoint is an Orbax PyTree item: a dictionary of the tree's arrays by name, with the manifest
of `qjax.io.manifest` as its custom metadata: ``format`` ("qjax"), ``version`` and ``parameters``.
Codes of less than a byte are uint8, packed along the last axis with the first code in the lowest
bits, so that they shard as the codes do. An array without elements is one byte: Orbax saves none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from qjax.io import manifest
from qjax.io.packing import BITS

VERSION = 2

_BYTE = np.dtype(np.uint8)


def save_args(tree: Any) -> ocp.args.PyTreeSave:
    """What to hand to a checkpointer or a CheckpointManager in place of a quantized tree.

    Args:
      tree: nested dictionaries (keys str or int) of arrays and QTensors, on any sharding.

    Raises:
      ValueError: naming the path, if something else is in the tree or a QTensor is broken.

    Example::

      checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
      checkpointer.save(path, args=qjax.io.orbax.save_args(qparams))   # returns at once
      checkpointer.wait_until_finished()
    """
    described = manifest.describe(tree)
    arrays = {name: _stored(value) for name, value in described.arrays.items()}
    metadata = {"format": "qjax", "version": VERSION, "parameters": described.entries}
    return ocp.args.PyTreeSave(arrays, custom_metadata=metadata)


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a checkpoint and waits until it is complete.

    Args:
      path: a folder that does not exist.
      tree: as for `save_args`.

    Raises:
      ValueError: if `path` exists, or the tree cannot be saved.
    """
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(os.path.abspath(path), args=save_args(tree))


def abstract(path: str | os.PathLike[str]) -> Any:
    """The tree of a checkpoint with a ShapeDtypeStruct for each array; no array is read.

    Its QTensors have their formats and blocks, so that `qjax.partition_specs` can lay it out.

    Raises:
      ValueError: if `path` is no checkpoint that qjax wrote, or of another version, or its arrays
        are not those of its manifest.
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _leaves(path))


def restore(path: str | os.PathLike[str], shardings: Any = None) -> Any:
    """Reads the tree that `save` or `save_args` was given, bit for bit.

    Args:
      path: the folder (of a CheckpointManager: ``directory/step/item``).
      shardings: one Sharding for all arrays, or a tree of them like `abstract(path)` or a prefix of
        it. None: all on the default device. Each device reads its own part.

    Raises:
      ValueError: as for `abstract`, or if `shardings` is no prefix of the tree, or does not divide
        it.

    Example::

      specs = qjax.partition_specs(abstract(path), dense_specs, mesh)
      shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
      qparams = restore(path, shardings)
    """
    leaves, tree = jax.tree.flatten(_leaves(path))
    if shardings is None:
        shardings = SingleDeviceSharding(jnp.zeros(()).device)
    is_sharding = lambda x: isinstance(x, Sharding)
    given = jax.tree.leaves(
        jax.tree.broadcast(shardings, jax.tree.unflatten(tree, leaves), is_leaf=is_sharding),
        is_leaf=is_sharding,
    )
    wanted = {leaf.name: (leaf, where) for leaf, where in zip(leaves, given, strict=True)}
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=_held_sharding(leaf.shape, leaf.dtype, where))
        for name, (leaf, where) in wanted.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        held = checkpointer.restore(os.path.abspath(path), args=args)
    arrays = [_loaded(held.pop(leaf.name), *wanted[leaf.name]) for leaf in leaves]
    return jax.tree.unflatten(tree, arrays)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array of a checkpoint that is not read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def _leaves(path: str | os.PathLike[str]) -> Any:
    """The tree of a checkpoint with a `_Leaf` for each array."""
    if not os.path.isdir(path):
        raise ValueError(f"{path}: is no folder; give the one that was saved to")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        item = checkpointer.metadata(os.path.abspath(path)).item_metadata
    fields = None if item is None else item.custom_metadata
    if item is None or not isinstance(fields, dict) or fields.get("format") != "qjax":
        raise ValueError(f"{path}: format: must be 'qjax'; qjax.io.orbax did not write this")
    version = fields.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"{path}: version: is {str(version)[:80]}, this version of qjax reads {VERSION}; "
            "update qjax or save the checkpoint again"
        )
    holding = manifest.Holding(_form, lambda _, name, shape, dtype: _Leaf(name, shape, dtype))
    return manifest.restore(fields.get("parameters"), item.tree, str(path), holding)


def _form(shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that a checkpoint holds for an array."""
    if 0 in shape:
        return (1,), _BYTE
    if dtype not in BITS:
        return shape, dtype
    *rows, length = shape or (1,)
    return (*rows, -(-length * BITS[dtype] // 8)), _BYTE


def _stored(value: Any) -> Any:
    if 0 in value.shape:
        return np.zeros(1, np.uint8)
    bits = BITS.get(np.dtype(value.dtype))
    if bits is None:
        return value
    wide = _widen(jnp.asarray(value))
    wide = jax.device_put(wide, _held_sharding(value.shape, np.dtype(value.dtype), wide.sharding))
    return _pack(wide.reshape(wide.shape or (1,)), bits)


# Sub-byte arrays only ever meet elementwise operations: XLA:CPU aborts the process when it has to
# move parts of them between devices (jax 0.10.2).


@jax.jit
def _widen(codes: jax.Array) -> jax.Array:
    bits = BITS[np.dtype(codes.dtype)]
    return jax.lax.bitcast_convert_type(codes, jnp.dtype(f"uint{bits}")).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=1)
def _pack(wide: jax.Array, bits: int) -> jax.Array:
    per_byte = 8 // bits
    *rows, length = wide.shape
    size = -(-length // per_byte)
    if size * per_byte > length:
        wide = jnp.pad(wide, [(0, 0)] * len(rows) + [(0, size * per_byte - length)])
    parts = wide.reshape(*rows, size, per_byte)
    return functools.reduce(
        jnp.bitwise_or, (parts[..., i] << jnp.uint8(i * bits) for i in range(per_byte))
    )


def _unpack(packed: jax.Array, shape: tuple[int, ...], bits: int) -> jax.Array:
    """Codes of `shape`, a byte each."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    shifts = shifts.reshape((1,) * packed.ndim + shifts.shape)
    codes = (packed[..., None] >> shifts) & jnp.uint8((1 << bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], packed.shape[-1] * shifts.size)
    return codes[..., : shape[-1] if shape else 1].reshape(shape)


def _narrow(wide: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(wide.astype(f"uint{BITS[dtype]}"), dtype)


def _held_sharding(shape: tuple[int, ...], dtype: np.dtype, where: Sharding) -> Sharding:
    """Where the bytes lie that hold an array which lies on `where`.

    In the same places, except that bytes which the shards do not divide are whole along their axis.
    """
    array_shape, (shape, _) = shape, _form(shape, dtype)
    if not isinstance(where, NamedSharding) or shape == array_shape:
        return where
    if len(shape) != len(array_shape) or 0 in array_shape:
        return NamedSharding(where.mesh, PartitionSpec())
    spec = (*where.spec, *[None] * (len(shape) - len(where.spec)))
    names = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],)
    parts = math.prod(where.mesh.shape[n] for n in names if n is not None)
    return where if shape[-1] % parts == 0 else NamedSharding(where.mesh, PartitionSpec(*spec[:-1]))


def _loaded(held: jax.Array, leaf: _Leaf, where: Sharding) -> jax.Array:
    if 0 in leaf.shape:
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where)
    if leaf.dtype not in BITS:
        return held
    unpack = jax.jit(_unpack, static_argnums=(1, 2), out_shardings=where)
    narrow = jax.jit(_narrow, static_argnums=1, out_shardings=where)
    return narrow(unpack(held, leaf.shape, BITS[leaf.dtype]), leaf.dtype)
