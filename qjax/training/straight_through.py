"""fake_quant: training that sees what quantization will do; gradients pass straight through."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax import _compat, run, tracing
from qjax.formats import FORMATS
from qjax.interpret import Decline, Table, interpret
from qjax.qtensor import Activation, QTensor, Quantized, dequantize, is_qtensor
from qjax.recipe import Recipe
from qjax.sites import find_sites
from qjax.spec import Spec
from qjax.training import learned
from qjax.training.learned import straight
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
        masters, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)
        tensors = jax.tree.leaves(qparams, is_leaf=is_qtensor)
        fakes = {}
        for i, ((path, w), q) in enumerate(zip(masters, tensors, strict=True)):
            if learned.is_learned(w):
                # its clip is differentiated through the QTensor that it rides in
                q = dataclasses.replace(q, activation=learned.held(w).activation)
                fakes[i] = _Fake(learned.simulated(w, q), q, tracing.param_path(path))
            elif is_qtensor(q):
                value = dequantize(q) if is_qtensor(w) else straight(dequantize(q), w)
                fakes[i] = _Fake(value, q, tracing.param_path(path))
        plain = (_plain(params), *args)
        leaves, whole = jax.tree.flatten((plain, kwargs), is_leaf=is_qtensor)
        dense = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if is_qtensor(v) else v
        traced = tracing.trace(self.loss_fn, leaves, whole, dense)
        arrays = [(i, v) for i, v in enumerate(leaves) if tracing.is_array(v) or is_qtensor(v)]
        outputs = interpret(_table(), traced.jaxpr, [fakes.get(i, v) for i, v in arrays])
        return traced.rebuild([v.value if isinstance(v, _Fake) else v for v in outputs])

    def convert(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The QTensors that a call with these arguments simulates, for `quantized(loss_fn)`."""
        plain = _plain(params)
        sites = find_sites(self.loss_fn, plain, *args, **kwargs)
        qparams = quantize_params(plain, self.recipe, sites)
        one = lambda w, q: learned.held(w) if learned.is_learned(w) else q
        return jax.tree.map(one, params, qparams, is_leaf=_is_leaf)

    def learn(
        self,
        params: Any,
        *args: Any,
        clip: float | None = None,
        only: str = ".*",
        begin: str = "spec",
        **kwargs: Any,
    ) -> Any:
        """The parameters with learned scales: a tree to train, call and convert in their place.

        Each array that the recipe quantizes becomes a `Learned` of the weight, its step sizes (LSQ,
        arXiv:1902.08153) and, with `clip`, the clip of its matmul's other operand (PACT,
        arXiv:1805.06085, here on both sides: the derivative by it is the sign of what is cut).

        Args:
          params, *args, **kwargs: of the loss function.
          clip: where the clips begin, rather too wide; for specs with an activation.
          only: a regular expression; other paths keep the scales that their spec gives.
          begin: "spec": the scales that the spec gives to these weights; "lsq": the paper's, 2
            mean|w| / sqrt(largest code), for weights that are still to be trained.

        Raises:
          ValueError: naming the path, if a spec is none of symmetric integers, has no activation to
            clip, or `only` matches nothing that is quantized.

        Example:
          >>> qat = fake_quant(lambda p, x: jnp.sum(x @ p["w"]), "int4_g32")
          >>> params, x = {"w": jnp.linspace(-1, 1, 64).reshape(32, 2)}, jnp.ones((1, 32))
          >>> trained = qat.learn(params, x)
          >>> jax.grad(qat)(trained, x)["w"].scale.shape
          (1, 2)
        """
        sites = find_sites(self.loss_fn, params, *args, **kwargs)
        qparams = quantize_params(params, self.recipe, sites)
        found = []

        def one(path: Any, w: Any, q: Any) -> Any:
            name = tracing.param_path(path)
            if is_qtensor(w) or not is_qtensor(q) or not re.fullmatch(only, name):
                return w
            found.append(name)
            rule = self.recipe.rule_for(name, sites[name])
            assert rule is not None
            assert isinstance(rule.spec, Spec)
            stacked = len(sites[name][0].stacked_axes)
            return learned.start(name, w, q, rule.spec, clip, stacked, begin)

        trained = jax.tree_util.tree_map_with_path(one, params, qparams, is_leaf=is_qtensor)
        if not found:
            raise ValueError(f"only={only!r} matches no parameter that the recipe quantizes")
        return trained


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


def _is_leaf(leaf: Any) -> bool:
    return is_qtensor(leaf) or learned.is_learned(leaf)


def _plain(params: Any) -> Any:
    """The parameters without their learned scales."""
    one = lambda v: v.value if learned.is_learned(v) else v
    return jax.tree.map(one, params, is_leaf=_is_leaf)


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
    values = _values(eqn, _clipped(inputs))
    return [straight(y, v) for y, v in zip(found, values, strict=True)]


def _clipped(inputs: list[Any]) -> list[Any]:
    """The inputs of a matmul, those that meet a weight with a learned clip cut to it."""
    acts = [act for v in inputs if isinstance(v, _Fake) and (act := _clip(v.tensor)) is not None]
    if not acts:
        return inputs
    (act,) = acts
    assert act.spec is not None
    assert act.scale is not None
    top = act.scale * FORMATS[act.spec.format].max
    cut = lambda v: v if isinstance(v, _Fake) or not _is_float(v) else _cut(v, top.astype(v.dtype))
    return [cut(v) for v in inputs]


def _clip(q: Quantized) -> Activation | None:
    """The activation of a weight, if its step is known."""
    act = q.activation if isinstance(q, QTensor) else None
    return None if act is None or act.scale is None else act


def _is_float(v: Any) -> bool:
    return jnp.issubdtype(v.dtype, jnp.floating)


def _cut(x: jax.Array, top: jax.Array) -> jax.Array:
    top = jnp.broadcast_to(top, x.shape)
    return lax.clamp(-top, x, top)


def _values(eqn: _compat.JaxprEqn, inputs: list[Any]) -> list[Any]:
    return _compat.bind(eqn, [v.value if isinstance(v, _Fake) else v for v in inputs])
