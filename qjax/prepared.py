"""prepare: quantized weights in the order in which kernels read them. unprepare: the codes back."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.frame import Device
from pallas_kernels.quantized_matmul.layouts import LAYOUTS
from pallas_kernels.quantized_matmul.problem import Weight
from qjax import _compat, blocks, structural
from qjax.activation import Activation
from qjax.formats import FORMATS, Format, join_planes, split_planes
from qjax.qtensor import QTensor, Quantized, check, dequantize, is_qtensor
from qjax.sites import Site
from qjax.structural import CannotCarry
from qjax.tracing import param_path

Sites = Mapping[str, Sequence[Site]]
FIELDS = {"scale": "scale", "zero": "zero_point", "offset": "offset"}  # of a QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Prepared(Quantized):
    """A quantized weight in a kernel's order: a matrix `[k, n]` with axes of layers in front.

    Attributes:
      arrays: "codes", "scale" and, where the weight has them, "zero" and "offset", in the order of
        the layout; axes of layers and experts come first. Scales and offsets that are quantized
        themselves are QTensors `[groups, n]` with codes of whole bytes.
      activation: as in the QTensor.
      format, block, dtype: as in the QTensor.
      nested: (name, format) of the quantized scales and offsets, before their codes were widened.
      layout: a name in `pallas_kernels.quantized_matmul.layouts.LAYOUTS`.
      weight: what the arrays of one layer hold, before a mesh cuts them.
      inner: the shape of the weight without the axes of layers, before a mesh cuts it.
      k_axes, n_axes: the axes of `inner` that are contracted, and the others, each in the order in
        which they are merged into k and n.
    """

    arrays: dict[str, Any]
    activation: Activation | None
    format: str = dataclasses.field(metadata={"static": True})
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    nested: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})
    weight: Weight = dataclasses.field(metadata={"static": True})
    inner: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    k_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    n_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def lead(self) -> tuple[int, ...]:
        """The lengths of the axes of layers and experts."""
        shape = self.arrays["codes"].shape
        return tuple(shape[: len(shape) - len(LAYOUTS[self.layout].code_axes)])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, *self.local().inner)

    def __repr__(self) -> str:
        try:
            shape = self.shape
        except (AttributeError, ValueError):  # a tree map put something else into the leaves
            shape = "?"
        return f"Prepared({self.format}, shape={shape}, layout={self.layout!r}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("qvalue", "scale", "zero_point", "offset", "param_shape", "storage_shape"):
            raise ValueError(
                f"{self!r} lies in a kernel's order and has no {name}: "
                "qjax.unprepare it first, or keep the quantized tree that was prepared"
            )
        raise AttributeError(name)

    def local(self) -> "Prepared":
        """This weight as the arrays say: inside a shard_map they hold a part of `weight`."""
        order, shards = LAYOUTS[self.layout], {"k": 1, "n": 1}
        whole = order.shapes(self.weight)["codes"].shape
        for axis, size, held in zip(
            order.code_axes, whole, self.arrays["codes"].shape[len(self.lead) :], strict=True
        ):
            if axis and held != size:
                shards[axis] = size // max(held, 1)
        if shards == {"k": 1, "n": 1}:
            return self
        inner = list(self.inner)
        for count, axes in ((shards["k"], self.k_axes), (shards["n"], self.n_axes)):
            if count > 1:
                inner[axes[0]] //= count
        k, n = (math.prod(inner[a] for a in axes) for axes in (self.k_axes, self.n_axes))
        return dataclasses.replace(self, weight=self.weight._replace(k=k, n=n), inner=tuple(inner))

    def check(self, path: str = "") -> None:
        """Raises ValueError, naming `path` and the remedy, if the arrays belie the layout."""
        where, order, here = f"{path}: " if path else "", LAYOUTS[self.layout], self.local()
        for name, wanted in order.shapes(here.weight).items():
            held = self.arrays.get(name)
            if isinstance(held, QTensor):
                held.check(f"{path}/{name}" if path else name)
                continue
            shape = (*self.lead, *wanted.shape)
            if held is None or (held.shape, held.dtype) != (shape, wanted.dtype):
                got = type(held).__name__ if held is None else f"{held.dtype} of shape {held.shape}"
                raise ValueError(
                    f"{where}{name} of a weight in layout {self.layout!r} must be {wanted.dtype} "
                    f"of shape {shape}, got {got}; a tree map over prepared parameters must leave "
                    "their arrays alone (is_leaf=qjax.is_qtensor), or unprepare them first"
                )

    def dequantized(self) -> jax.Array:
        """The array that this stands for, as `qjax.dequantize` computes it."""
        return dequantize(_unpack(self))

    def operands(self) -> dict[str, jax.Array]:
        """The arrays as a kernel takes them: scales that are quantized are opened."""
        here, order = self.local(), LAYOUTS[self.layout]

        pack = _over(len(self.lead), lambda v: order.pack_scale(v, here.weight))
        return {
            name: pack(dequantize(held)) if isinstance(held, QTensor) else held
            for name, held in self.arrays.items()
        }

    def specs(self, entries: Sequence[Any], shards: Sequence[int], path: str = "") -> "Prepared":
        """The PartitionSpecs of the arrays whose weight has these entries, one per axis.

        Raises:
          ValueError: naming the path, if a mesh would cut it elsewhere than between tiles.
        """
        lead, order, along = len(self.lead), LAYOUTS[self.layout], {}
        tiles = dict(zip("kn", order.tile(self.weight), strict=True))
        for axis, axes in (("k", self.k_axes), ("n", self.n_axes)):
            first, *rest = (lead + a for a in axes)
            size, count = getattr(self.weight, axis), shards[first]
            if any(shards[a] > 1 for a in rest):
                raise ValueError(
                    f"{path}: {self!r} can be cut along the first of the axes that form its "
                    f"{axis}, not along a later one; replicate it there, or unprepare it"
                )
            if count > 1 and size % (count * tiles[axis]):
                raise ValueError(
                    f"{path}: {count} shards cannot cut {axis} = {size} of {self!r}: each must "
                    f"hold a multiple of {tiles[axis]}; replicate it there, or unprepare it"
                )
            along[axis] = entries[first]
        scaled = along if self.weight.groups > 1 else {**along, "k": None}

        def one(name: str, held: Any) -> Any:
            if isinstance(held, QTensor):
                return jax.tree.map(lambda v: PartitionSpec(), held)
            axes, of = (order.code_axes, along) if name == "codes" else (order.scale_axes, scaled)
            return PartitionSpec(*entries[:lead], *(of.get(a) for a in axes))

        return dataclasses.replace(self, arrays={n: one(n, v) for n, v in self.arrays.items()})

    def explicit_sharding(self) -> NamedSharding | None:
        """That of the weight, where its mesh has Explicit axes; None elsewhere."""
        where = _compat.explicit_sharding(self.arrays["codes"])
        if where is None:
            return None
        lead, axes = len(self.lead), LAYOUTS[self.layout].code_axes
        spec = [*where.spec, *[None] * self.arrays["codes"].ndim]
        entries = [*spec[:lead], *[None] * len(self.inner)]
        for axis, ours in (("k", self.k_axes), ("n", self.n_axes)):
            entries[lead + ours[0]] = spec[lead + axes.index(axis)]
        return NamedSharding(where.mesh, PartitionSpec(*entries))

    def explicit_cut(self) -> tuple[int, int]:
        """Into how many parts Explicit mesh axes cut k and n."""
        counts = {"k": 1, "n": 1}
        held = _compat.explicit_shards(self.arrays["codes"])[len(self.lead) :]
        for axis, count in zip(LAYOUTS[self.layout].code_axes, held, strict=True):
            if axis:
                counts[axis] *= count
        return counts["k"], counts["n"]


def prepare(
    qparams: Any,
    sites: Sites | None = None,
    *,
    layout: str | None = None,
    device: Device | None = None,
    unsupported: str = "keep",
) -> Any:
    """Quantized parameters with their weights in the order in which the kernels of a device read
    them. Once, outside of jit; `unprepare` gives the codes back bit for bit.

    The result goes wherever `qparams` went (`quantized`, jit, scan, vmap, device_put); codecs and
    checkpoints want it unprepared. A weight that no layout takes stays a QTensor, and `report` says
    why.

    Args:
      qparams: what `quantize_params` returned; arrays and prepared weights stay as they are.
      sites: from `find_sites`: which axes are contracted. Without it the axes that a block runs
        along are contracted and, where the block ends before the last axis, those behind it are
        output channels.
      layout: a name in `pallas_kernels.quantized_matmul.layouts.LAYOUTS`; None for the first that
        the platform wants and that takes the weight.
      device: where the weights will be used; None for the default device.
      unsupported: "keep", or "raise" to refuse a tree with a weight that no layout takes.

    Returns:
      A tree like `qparams`, with `Prepared` leaves.

    Raises:
      ValueError: naming the paths, with `unsupported="raise"`.

    Example:
      >>> q = {"w": qjax.quantize(jnp.ones((128, 8)), "int4_g64", axis=0)}
      >>> qjax.prepare(q)["w"]
      Prepared(int4, shape=(128, 8), layout='nibbles', dtype=float32)
    """
    if unsupported not in ("keep", "raise"):
        raise ValueError(f"prepare: unsupported must be 'keep' or 'raise', is {unsupported!r}")
    leaves, tree = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_qtensor)
    prepared, kept = [], []
    for path, leaf in leaves:
        name = param_path(path)
        if isinstance(leaf, QTensor):
            check(leaf, name)
            try:
                leaf = _pack(leaf, plan(leaf, (sites or {}).get(name, ()), layout, device))
            except CannotCarry as why:
                kept.append(f"{name}: {why}")
        prepared.append(leaf)
    if kept and unsupported == "raise":
        raise ValueError("prepare: no layout takes " + "; ".join(kept))
    return jax.tree.unflatten(tree, prepared)


def unprepare(prepared: Any) -> Any:
    """The quantized parameters that `prepare` was given, bit for bit.

    Example:
      >>> q = {"w": qjax.quantize(jnp.ones((128, 8)), "int4_g64", axis=0)}
      >>> qjax.unprepare(qjax.prepare(q))["w"]
      QTensor(int4, shape=(128, 8), block=(64, 1), dtype=float32)
    """
    back = lambda v: _unprepare(v) if isinstance(v, Prepared) else v
    return jax.tree.map(back, prepared, is_leaf=is_qtensor)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a QTensor becomes Prepared: which axes are layers, k and n, and in which layout."""

    lead: int
    k_axes: tuple[int, ...]
    n_axes: tuple[int, ...]
    layout: str
    weight: Weight


def plan(
    q: QTensor,
    sites: Sequence[Site] = (),
    layout: str | None = None,
    device: Device | None = None,
) -> Plan:
    """How `q` would be prepared.

    Raises:
      CannotCarry: saying why no layout takes it.
    """
    if jax.tree.leaves(q.activation):
        raise CannotCarry("its activation changes coordinates or has a static scale")
    lead, k_axes, n_axes = _axes(q, sites)
    device = Device.default() if device is None else device
    wanted = [n for n, row in LAYOUTS.items() if row.serves(device)]
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    return _plan(q, lead, k_axes, n_axes, wanted if layout is None else [layout])


def why_not(q: QTensor, sites: Sequence[Site] = ()) -> str:
    """Why `prepare` leaves `q` as it is; "prepare was not asked to" where it would not."""
    try:
        plan(q, sites)
    except CannotCarry as why:
        return str(why)
    return "prepare was not asked to"


def _plan(
    q: QTensor,
    lead: int,
    k_axes: tuple[int, ...],
    n_axes: tuple[int, ...],
    layouts: Sequence[str],
) -> Plan:
    matrix = jax.eval_shape(lambda q: _matrix(q, lead, k_axes, n_axes), q)
    *rest, group, across = structural.block_of(matrix)
    if any(b != 1 for b in (*rest, across)):
        raise CannotCarry(f"its blocks of {q.block} run along other axes than the contracted")
    for name in ("scale", "offset"):
        nested = isinstance(getattr(q, name), QTensor)
        if nested and not isinstance(getattr(matrix, name), QTensor):
            raise CannotCarry(f"its quantized {name} cannot follow into a matrix")
        if nested and lead and structural.slice_leading(getattr(matrix, name)) is None:
            raise CannotCarry(f"the blocks of its quantized {name} run across layers")
    dtypes = [None if (v := getattr(matrix, f)) is None else v.dtype.name for f in FIELDS.values()]
    code, _, values = _code(FORMATS[q.format])
    k, n = matrix.shape[-2:]
    scale, zero, offset = dtypes
    weight = Weight(k, n, group, code, str(scale), zero, offset, values)
    reasons = []
    for name in layouts:
        reason = LAYOUTS[name].supports(weight)
        if reason is None and q.activation is not None and q.activation.spec is not None:
            reason = LAYOUTS[name].takes_codes(weight, q.activation.spec.format)
        if reason is None:
            return Plan(lead, k_axes, n_axes, name, weight)
        reasons.append(f"{name}: {reason}")
    raise CannotCarry("; ".join(reasons) or "its platform has no layout")


def _axes(q: QTensor, sites: Sequence[Site]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """How many leading axes are layers or experts, and which axes form k and n."""
    block = structural.block_of(q)  # refuses a weight that is stored in another shape
    matmuls = {
        (s.contract_axes, tuple(sorted((*s.batch_axes, *s.stacked_axes))))
        for s in sites
        if s.contract_axes
    }
    if any(s.primitive == "conv_general_dilated" for s in sites):
        raise CannotCarry("it is the kernel of a convolution")
    if len(matmuls) > 1:
        raise CannotCarry("its uses contract different axes")
    if sites and not matmuls:
        raise CannotCarry("no matmul uses it")
    if matmuls:
        ((k_axes, lead),) = matmuls
        if lead != tuple(range(len(lead))):
            raise CannotCarry(f"the axes {lead} of layers and experts are not its first")
    else:
        k_axes: tuple[int, ...] = tuple(a for a, b in enumerate(block) if b > 1)
        if not k_axes:
            raise CannotCarry("no axis is blocked: give sites, to say which are contracted")
        first, last = k_axes[0], k_axes[-1]
        if last > first and last == q.ndim - 1:
            raise CannotCarry("its blocks run along several axes: give sites, for the contracted")
        lead = tuple(range(first if last < q.ndim - 1 else max(first - 1, 0)))
    n_axes = tuple(a for a in range(len(lead), q.ndim) if a not in k_axes)
    if not n_axes or 0 in q.shape:
        raise CannotCarry("it is no matrix")
    shift = lambda axes: tuple(a - len(lead) for a in axes)
    return len(lead), shift(k_axes), shift(n_axes)


def _code(fmt: Format) -> tuple[str, int, tuple[float, ...] | None]:
    """How a kernel sees the codes of a format: their dtype, what is added to the stored pattern to
    make them, and the codebook if the code is not the value.
    """
    storage = fmt.storage if isinstance(fmt.storage, str) else "uint8"
    width = 4 if fmt.bits <= 4 else 8
    if jnp.issubdtype(jnp.dtype(storage), jnp.floating) and width == 8:
        return storage, 0, None
    if jnp.issubdtype(jnp.dtype(storage), jnp.signedinteger):
        return f"int{width}", 0, None
    with jax.ensure_compile_time_eval():
        patterns = jnp.arange(1 << fmt.bits, dtype=jnp.uint8)
        decoded = np.asarray(fmt.decode(_stored(patterns, storage), jnp.dtype(jnp.float32)))
    shift = decoded - np.arange(len(decoded), dtype=np.float32)
    if (shift == shift[0]).all() and shift[0] in (0, -len(decoded) // 2):
        return f"{'int' if shift[0] else 'uint'}{width}", int(shift[0]), None
    return f"uint{width}", 0, tuple(map(float, decoded))


def _wide(code: str) -> Any:
    """The integer of 8 bits that holds codes of this dtype; of floats, their bits."""
    return jnp.dtype(jnp.int8 if code.startswith("int") else jnp.uint8)


def _stored(patterns: jax.Array, storage: str) -> jax.Array:
    """Bit patterns in uint8 as the dtype that a format is stored in."""
    dtype = jnp.dtype(storage)
    if not jnp.issubdtype(dtype, jnp.floating):
        return patterns.astype(dtype)
    narrow = patterns.astype(f"uint{jnp.finfo(dtype).bits}")
    return lax.bitcast_convert_type(narrow, dtype)


def _bits(codes: jax.Array, wide: Any) -> jax.Array:
    """The inverse of `_stored`."""
    if jnp.issubdtype(codes.dtype, jnp.floating):
        codes = lax.bitcast_convert_type(codes, f"uint{jnp.finfo(codes.dtype).bits}")
    return codes.astype(wide)


def _matrix(q: QTensor, lead: int, k_axes: Sequence[int], n_axes: Sequence[int]) -> QTensor:
    """`q` as `[*lead, k, n]`, with codes as a kernel sees them, in 8 bits."""
    fmt = FORMATS[q.format]
    code, shift, _ = _code(fmt)
    codes = join_planes(fmt, q.qvalue)
    wide = _wide(code)
    codes = _bits(codes, wide) + jnp.asarray(shift, wide)
    plain = dataclasses.replace(q, qvalue=codes, format=codes.dtype.name, activation=None)
    moved = structural.transpose(plain, [*range(lead), *(lead + a for a in (*k_axes, *n_axes))])
    k, n = (math.prod(q.shape[lead + a] for a in axes) for axes in (k_axes, n_axes))
    return structural.reshape(moved, (*q.shape[:lead], k, n))


@functools.partial(jax.jit, static_argnums=1)
def _pack(q: QTensor, how: Plan) -> Prepared:
    matrix = _matrix(q, how.lead, how.k_axes, how.n_axes)
    order, weight = LAYOUTS[how.layout], how.weight
    codes: Any = matrix.qvalue
    pack = lambda v: order.pack_codes(_stored(v, weight.code), weight)
    arrays: dict[str, Any] = {"codes": _over(how.lead, pack)(codes)}
    for name, field in FIELDS.items():
        held = getattr(matrix, field)
        if isinstance(held, QTensor):
            arrays[name] = _widen(held)
        elif held is not None:
            arrays[name] = _over(how.lead, lambda v: order.pack_scale(v, weight))(held)
    held = {name: getattr(matrix, field) for name, field in FIELDS.items()}
    nested = tuple((name, v.format) for name, v in held.items() if isinstance(v, QTensor))
    return Prepared(
        arrays,
        q.activation,
        q.format,
        q.block,
        q.dtype,
        nested,
        how.layout,
        weight,
        q.shape[how.lead :],
        how.k_axes,
        how.n_axes,
    )


def _widen(scale: QTensor) -> QTensor:
    """The same numbers, with codes of whole bytes where they were planes or half bytes."""
    fmt = FORMATS[scale.format]
    if isinstance(fmt.storage, str) and fmt.bits == 8:
        return scale
    codes = fmt.decode(join_planes(fmt, scale.qvalue), jnp.dtype(jnp.int8))
    return dataclasses.replace(scale, qvalue=codes, format="int8")


def _narrow(scale: QTensor, name: str) -> QTensor:
    """The inverse of `_widen`, given the format that it had."""
    fmt = FORMATS[name]
    if scale.format == name:
        return scale
    _, shift, _ = _code(fmt)
    codes = scale.qvalue - jnp.int8(shift)
    codes = codes if isinstance(fmt.storage, str) else codes.astype(jnp.uint8)
    return dataclasses.replace(scale, qvalue=split_planes(fmt, codes), format=name)


@jax.jit
def _unpack(p: Prepared) -> QTensor:
    """The QTensor in the axes that `p` has now; its block is normalized."""
    p = p.local()
    fmt, order, weight = FORMATS[p.format], LAYOUTS[p.layout], p.weight
    code, shift, _ = _code(fmt)
    wide, lead = _wide(code), p.lead
    fields: dict[str, Any] = dict.fromkeys(FIELDS.values())
    for name, held in p.arrays.items():
        if isinstance(held, QTensor):
            fields[FIELDS[name]] = _narrow(held, dict(p.nested)[name])
        elif name != "codes":
            unpack = lambda v, name=name: order.unpack_scale(v, weight, name)
            back = _over(len(lead), unpack)(held)
            fields[FIELDS[name]] = back.astype(getattr(weight, name))
    codes = _over(len(lead), lambda v: order.unpack_codes(v, weight))(p.arrays["codes"])
    plain = QTensor(
        qvalue=_bits(codes, wide),
        activation=p.activation,
        format=wide.name,
        block=blocks.trim((weight.group, 1)),
        dtype=p.dtype,
        **fields,
    )
    axes = (*p.k_axes, *p.n_axes)
    moved = structural.reshape(plain, (*lead, *(p.inner[a] for a in axes)))
    back = [len(lead) + axes.index(a) for a in range(len(axes))]
    plain = structural.transpose(moved, [*range(len(lead)), *back])
    patterns = plain.qvalue - jnp.asarray(shift, wide)  # pyright: ignore[reportOperatorIssue]
    if isinstance(fmt.storage, str):
        qvalue = _stored(patterns, fmt.storage)
    else:
        qvalue = split_planes(fmt, patterns.astype(jnp.uint8))
    return dataclasses.replace(plain, qvalue=qvalue, format=p.format)


def _unprepare(p: Prepared) -> QTensor:
    return dataclasses.replace(_unpack(p), block=p.block)


def _over(lead: int, function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    for _ in range(lead):
        function = jax.vmap(function)
    return function
