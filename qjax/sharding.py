"""partition_specs: how the leaves of a QTensor are laid over a mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qjax import activation, blocks
from qjax.formats import FORMATS
from qjax.qtensor import QTensor, Quantized, dequantize, is_qtensor
from qjax.tracing import param_path


def partition_specs(qparams: Any, dense_specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """PartitionSpecs for quantized parameters, from those of the dense ones.

    Codes are sharded as the weight is. A scale is sharded along an axis where every shard holds
    whole blocks, and replicated where it does not (fewer blocks than shards, ragged blocks).

    Args:
      qparams: quantized parameters; boxes such as `nn.LogicallyPartitioned` may hold the QTensors.
      dense_specs: a tree of PartitionSpecs, NamedShardings or None (replicated), one for each dense
        parameter, or a prefix of such a tree.
      mesh: tells how many shards an axis name means.

    Returns:
      A tree of the structure of `qparams` with a PartitionSpec for every array.

    Raises:
      ValueError: naming the path, if a spec has more entries than the weight has axes, names an
        unknown mesh axis, or does not divide the codes.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((4,), ("d",))
      >>> q = {"w": qjax.quantize(jnp.ones((64, 8)), "int4_g32", axis=0)}
      >>> specs = qjax.partition_specs(q, {"w": jax.P("d", None)}, mesh)
      >>> tuple(specs["w"].qvalue), tuple(specs["w"].scale)  # two blocks cannot be cut in four
      (('d', None), (None, None))
    """
    leaf = lambda v: v is None or isinstance(v, PartitionSpec | NamedSharding)

    def under(path: Any, spec: Any, subtree: Any) -> Any:
        spec = spec.spec if isinstance(spec, NamedSharding) else spec or PartitionSpec()

        def one(inner: Any, value: Any) -> Any:
            return leaf_specs(value, spec, mesh, param_path((*path, *inner)))

        return jax.tree_util.tree_map_with_path(one, subtree, is_leaf=is_qtensor)

    return jax.tree_util.tree_map_with_path(under, dense_specs, qparams, is_leaf=leaf)


def leaf_specs(value: Any, spec: PartitionSpec, mesh: Any, path: str = "") -> Any:
    """The PartitionSpecs of one array or QTensor whose dense weight has `spec`."""
    entries = _entries(spec, len(value.shape), path)
    shards = [_count(e, mesh, path) for e in entries]
    if not isinstance(value, Quantized):
        return PartitionSpec(*entries)
    if not isinstance(value, QTensor):
        return value.specs(entries, shards, path)
    if value.param_shape is not None:
        if any(n > 1 for n in shards):
            raise ValueError(f"{path}: {value!r} has another shape than its weight: replicate it")
        return jax.tree.map(lambda v: PartitionSpec(), value)
    for axis, (size, n) in enumerate(zip(value.shape, shards, strict=True)):
        if size % n:
            raise ValueError(
                f"{path}: axis {axis} of shape {value.shape} is not divided by {n} shards; "
                f"choose another spec than {spec} or pad the weight"
            )

    def planes(name: str, plane: Any) -> PartitionSpec:
        last = plane.shape[-1] if plane.shape else 1
        packed = name == "uint1" and (last % shards[-1] or value.shape[-1] // shards[-1] % 8)
        return PartitionSpec(*entries[:-1], None) if packed else PartitionSpec(*entries)

    storage = FORMATS[value.format].storage
    qvalue = (
        planes(storage, value.qvalue)
        if isinstance(storage, str)
        else tuple(planes(n, p) for n, p in zip(storage, value.qvalue, strict=True))
    )
    scaled = _scale_spec(value, entries, shards)
    follow = lambda v: None if v is None else leaf_specs(v, scaled, mesh, path)
    return dataclasses.replace(
        value,
        qvalue=qvalue,
        scale=follow(value.scale),
        zero_point=follow(value.zero_point),
        offset=follow(value.offset),
        activation=_activation_specs(value, entries),
    )


def _activation_specs(q: QTensor, entries: Sequence[Any]) -> Any:
    """Stacked axes are sharded as the weight's; the features are whole on every shard."""
    if q.activation is None:
        return None
    spec = lambda leaf, stacked: PartitionSpec(*entries[:stacked], *[None] * (leaf.ndim - stacked))
    return activation.on_leaves(q.activation, spec)


def shard_map_operand(q: Quantized, spec: PartitionSpec, mesh: Any) -> tuple[Any, Any] | None:
    """`q` and the PartitionSpecs with which it enters a shard_map; None if a shard cuts a block.

    A scale that is a QTensor is dequantized where a shard would cut its own blocks.
    """
    entries = _entries(spec, q.ndim, "")
    shards = [_count(e, mesh, "") for e in entries]
    if not isinstance(q, QTensor):
        try:
            return q, q.specs(entries, shards, "")
        except ValueError:
            return None
    if q.param_shape is not None:
        return None
    if q.activation is not None and any(shards[a] > 1 for a in q.activation.axis):
        return None
    for size, b, n in zip(q.shape, _block(q), shards, strict=True):
        if n > 1 and b < size and not holds_whole_blocks(size, b, n):
            return None
    specs = leaf_specs(q, spec, mesh)
    if "uint1" in FORMATS[q.format].storage and specs.qvalue != (specs.qvalue[0],) * 2:
        return None
    inner = _scale_spec(q, entries, shards)
    nested = {n: v for n in ("scale", "offset") if isinstance(v := getattr(q, n), QTensor)}
    cut = {n: v for n, v in nested.items() if shard_map_operand(v, inner, mesh) is None}
    q = dataclasses.replace(q, **{n: dequantize(v) for n, v in cut.items()})
    return q, leaf_specs(q, spec, mesh)


def _scale_spec(q: QTensor, entries: Sequence[Any], shards: Sequence[int]) -> PartitionSpec:
    """The weight's entries along the axes where every shard holds whole blocks."""
    axes = zip(entries, q.shape, _block(q), shards, strict=True)
    return PartitionSpec(*(e if holds_whole_blocks(s, b, n) else None for e, s, b, n in axes))


def holds_whole_blocks(size: int, block: int, shards: int) -> bool:
    """Whether each of `shards` equal pieces of an axis holds whole blocks and nothing else."""
    return size % shards == 0 and (size // shards) % block == 0


def _block(q: QTensor) -> Sequence[int]:
    return blocks.align(q.block, q.ndim)


def _entries(spec: PartitionSpec, ndim: int, path: str) -> list[Any]:
    if len(spec) > ndim:
        raise ValueError(f"{path}: {spec} has {len(spec)} entries for {ndim} axes")
    return [*spec, *[None] * (ndim - len(spec))]


def _count(entry: Any, mesh: Any, path: str) -> int:
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    for name in names:
        if name not in mesh.shape:
            known = ", ".join(map(str, mesh.shape))
            raise ValueError(f"{path}: mesh axis {name!r} is unknown; the mesh has {known}")
    return math.prod(mesh.shape[name] for name in names)
