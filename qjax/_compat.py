"""The only file that knows JAX versions and JAX internals (0.10 to 0.12)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
from jax._src import core as internal_core
from jax._src import source_info_util
from jax.extend import core

JaxprEqn = core.JaxprEqn
Literal = core.Literal
Tracer = jax.core.Tracer


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, of a Jaxpr or a ClosedJaxpr (one class from 0.11 on)."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `inputs`, with all its parameters as they are."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def outermost() -> bool:
    """Whether nothing is being traced: only there does `jax.jit` take options of the compiler."""
    return internal_core.trace_state_clean()


@contextlib.contextmanager
def equation_context(eqn: JaxprEqn) -> Iterator[None]:
    """The name stack, traceback and configuration under which `eqn` was traced, so that profiles
    keep their names.
    """
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
        eqn.ctx.manager,
    ):
        yield


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding in the type of `x`, where its mesh has Explicit axes; None elsewhere."""
    sharding = jax.typeof(x).sharding
    explicit = jax.sharding.AxisType.Explicit
    return sharding if explicit in sharding.mesh.axis_types else None


def explicit_shards(x: Any) -> tuple[int, ...]:
    """The number of shards of each axis of `x` under Explicit mesh axes; ones elsewhere."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return (1,) * x.ndim
    names = [e if isinstance(e, tuple) else () if e is None else (e,) for e in sharding.spec]
    return tuple(math.prod(sharding.mesh.shape[n] for n in axis) for axis in names)


def laid_out(x: Any, mesh: Any, spec: jax.sharding.PartitionSpec) -> Any:
    """`x` with `spec` in its type where the mesh has Explicit axes; as it is elsewhere."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))


def varying_axes(x: Any) -> list[str]:
    """The manual mesh axes that `x` is known to vary over, where `check_vma` keeps account."""
    kind: Any = jax.typeof(x)
    return sorted(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carries among the operands of a scan."""
    if "ft_in" in params:
        constants, carry, _ = params["ft_in"].elts
        return len(constants), len(carry)
    return params["num_consts"], params["num_carry"]


def jit_options(params: dict[str, Any], boxed: Sequence[bool]) -> dict[str, Any]:
    """Keyword arguments of `jax.jit` that give an inner jit back its shardings and donation.

    Operands that are boxed hold several arrays each and take no sharding of their own, nor does
    the operand and result that the interpreter adds at the end.
    """

    def keep(shardings: Sequence[Any]) -> tuple[Any, ...] | None:
        kept = tuple(s if isinstance(s, jax.sharding.Sharding) else None for s in shardings)
        return kept if any(s is not None for s in kept) else None

    options: dict[str, Any] = {}
    inputs = keep([None if b else s for s, b in zip(params["in_shardings"], boxed, strict=True)])
    outputs = keep(params["out_shardings"])
    if inputs is not None:
        options["in_shardings"] = (*inputs, None)
    if outputs is not None:
        options["out_shardings"] = [*outputs, None]
    donated = tuple(i for i, d in enumerate(params["donated_invars"]) if d)
    if donated:
        options["donate_argnums"] = donated
    return options
