"""fake_quant: training that sees what quantization will do; gradients pass straight through."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from qjax import _compat, run, tracing
from qjax.interpret import Decline, Table, interpret
from qjax.qtensor import Quantized, dequantize, is_qtensor
from qjax.recipe import Recipe
from qjax.sites import find_sites
from qjax.spec import Spec
from qjax.transform import quantize_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fake:
    """A weight on its way through a jaxpr: `value` is the dequantized `tensor`, with the gradient
    of the master weight.
    """

    value: Any
    tensor: Quantized
    path: str = dataclasses.field(metadata={"static": True})

    def box(self) -> run.Box:
        return run.Box(lax.stop_gradient(self.tensor), self.path)


@dataclasses.dataclass(frozen=True)
class FakeQuant:
    """A loss function that simulates quantization; what `fake_quant` returns.

    Attributes:
      loss_fn: any function of `(params, *args, **kwargs)`.
      recipe: what each parameter is quantized to.
    """

    loss_fn: Callable[..., Any]
    recipe: Recipe

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """`loss_fn` on the quantized parameters, differentiable in `params` and all else."""
        qparams = self.convert(lax.stop_gradient(params), *args, **kwargs)
        masters, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
        tensors = jax.tree.leaves(qparams, is_leaf=is_qtensor)
        fakes = {}
        for i, ((path, w), q) in enumerate(zip(masters, tensors, strict=True)):
            if is_qtensor(q):
                value = dequantize(q) if is_qtensor(w) else _straight(dequantize(q), w)
                fakes[i] = _Fake(value, q, tracing.param_path(path))
        leaves, whole = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_qtensor)
        dense = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if is_qtensor(v) else v
        traced = tracing.trace(self.loss_fn, leaves, whole, dense)
        arrays = [(i, v) for i, v in enumerate(leaves) if tracing.is_array(v) or is_qtensor(v)]
        outputs = interpret(_table(), traced.jaxpr, [fakes.get(i, v) for i, v in arrays])
        return traced.rebuild([v.value if isinstance(v, _Fake) else v for v in outputs])

    def convert(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The QTensors that a call with these arguments simulates, for `quantized(loss_fn)`."""
        sites = find_sites(self.loss_fn, params, *args, **kwargs)
        return quantize_params(params, self.recipe, sites)


def fake_quant(loss_fn: Callable[..., Any], recipe: Recipe | Spec | str) -> FakeQuant:
    """`loss_fn` as it will be once its parameters are quantized, with straight-through gradients.

    The value is that of `quantized(loss_fn)(convert(params))`, bit for bit: weights and, where
    their spec says so, activations are rounded, and matmuls run on codes. The derivative is that of
    `loss_fn` at the rounded weights, taken with respect to the unrounded ones (Bengio et al.,
    arXiv:1308.3432); forward mode works too.

    Args:
      loss_fn: any function of `(params, *args, **kwargs)`; the model's `apply` as well.
      recipe: as for `quantize_params`, such as "int4_g32" or "int8/int8_token".

    Returns:
      A `FakeQuant`: call it in place of `loss_fn`, and `convert` the parameters at the end.

    Example:
      >>> loss_fn = lambda params, x: jnp.sum(x @ params["w"])
      >>> qat = qjax.training.fake_quant(loss_fn, "int4_g32")
      >>> params, x = {"w": jnp.linspace(-1, 1, 64).reshape(32, 2)}, jnp.ones((1, 32))
      >>> jax.grad(qat)(params, x)["w"].shape
      (32, 2)
      >>> bool(qat(params, x) == qjax.quantized(loss_fn)(qat.convert(params, x), x))
      True
    """
    return FakeQuant(loss_fn, Recipe.of(recipe))


@jax.custom_jvp
def _straight(value: jax.Array, like: jax.Array) -> jax.Array:
    """`value`, with the derivative of `like`."""
    return value


@_straight.defjvp
def _straight_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    return primals[0], tangents[1]


def _table() -> Table:
    quiet = lambda box, eqn, how: None
    base = run.run_table(None)

    def slice_leading(fake: _Fake) -> _Fake | None:
        cut = base.slice_leading(run.Box(fake.tensor, fake.path))
        return None if cut is None else dataclasses.replace(fake, tensor=cut.tensor)

    def shard(fake: _Fake, spec: Any, mesh: Any) -> tuple[_Fake, _Fake] | None:
        entered = base.shard(run.Box(fake.tensor, fake.path), spec, mesh)
        if entered is None:
            return None
        box, specs = entered
        inner = dataclasses.replace(fake, tensor=box.tensor)
        return inner, dataclasses.replace(fake, value=spec, tensor=specs.tensor)

    rules = {name: functools.partial(_carry, rule) for name, rule in run.STRUCTURAL.items()}
    rules |= {
        name: functools.partial(_compute, functools.partial(rule, quiet))
        for name, rule in run.COMPUTING.items()
    }
    is_fake = lambda v: isinstance(v, _Fake)
    return Table(is_fake, rules, lambda fake, eqn, reason: fake.value, slice_leading, shard)


def _carry(rule: Any, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    carried = run.carry(rule, eqn, [v.box() if isinstance(v, _Fake) else v for v in inputs])
    if isinstance(carried, Decline):
        return carried
    values = _values(eqn, inputs)
    pairs = zip(carried, values, strict=True)
    return [_Fake(v, b.tensor, b.path or "") if isinstance(b, run.Box) else v for b, v in pairs]


def _compute(rule: Any, eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any] | Decline:
    """The value that the quantized weight gives, with the derivative at its dequantized value."""
    boxed = [v.box() if isinstance(v, _Fake) else lax.stop_gradient(v) for v in inputs]
    found = rule(eqn, boxed)
    if isinstance(found, Decline):
        return found
    return [_straight(y, v) for y, v in zip(found, _values(eqn, inputs), strict=True)]


def _values(eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any]:
    return _compat.bind(eqn, [v.value if isinstance(v, _Fake) else v for v in inputs])
