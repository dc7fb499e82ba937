"""The cases of docs/peers.md on qwix and on qjax: same model, same input, same judge.

Every case runs in a process of its own for each library, because what was traced before matters to
some of them and because some raise in C++ or never end. A case is judged by numbers: how many of
its weights came out quantized, and the distance (Frobenius norm, relative) of its output from the
float model's. Each library is used as its documentation says; the first rows are cases in which
both work.

    pip install qwix==0.1.8 equinox
    python experiments/compare_qwix.py            # the table, as Markdown
    python experiments/compare_qwix.py 8a qwix    # one case on one library, with its traceback
"""

import functools
import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

VERSION = "0.1.8"  # of qwix
TIMEOUT = 240  # seconds for one case; most take five
LIMIT = {"int8": 0.03, "int4": 0.25, "uint8": 0.03, "uint4": 0.25}  # of the error, by format

INT8 = {"weight_qtype": "int8"}
INT8_BOTH = {"weight_qtype": "int8", "act_qtype": "int8"}
INT4_GROUPS = {"weight_qtype": "int4", "tile_size": 16}


def normal(seed: int, *shape: int) -> jax.Array:
    """Random weights or inputs of unit variance after a matmul."""
    return jax.random.normal(jax.random.key(seed), shape) * shape[0] ** -0.5


def distance(got: Any, wanted: Any) -> float:
    """The norm of the difference over the norm of `wanted`."""
    if got.shape != wanted.shape:
        raise ValueError(f"result of shape {got.shape}, expected {wanted.shape}")
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


def judge(error: float, limit: float, quantized: int, weights: int, note: str = "") -> str:
    """The outcome of a case in words, from its numbers."""
    if quantized < weights:
        return f"**{quantized} of {weights} weights quantized**, without a warning"
    if not error < limit:
        return f"**wrong numbers**: error {error:.2g}"
    return f"right: error {error:.2g}{note}"


# --- one model on one library


def is_aux(leaf: Any) -> bool:
    """Whether a leaf is what qwix puts in place of a weight."""
    from qwix._src.providers.ptq import WithAux

    return isinstance(leaf, WithAux)


def count(tree: Any, is_quantized: Callable[[Any], bool]) -> int:
    """The number of quantized weights in a tree."""
    return sum(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def provider(rule: dict[str, Any]) -> Any:
    """A provider for post-training quantization with one rule for everything."""
    import qwix

    return qwix.PtqProvider([qwix.QuantizationRule(**rule)])


def qwix_linen(make: Callable, rule: dict[str, Any], limit: float, weights: int) -> str:
    """README: abstract parameters from the quantized model, then quantize_params, then apply."""
    import qwix

    model, x = make()
    variables = model.init(jax.random.key(0), x)
    wanted = model.apply(variables, x)
    quantized = qwix.quantize_model(model, provider(rule))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)
    params = qwix.quantize_params(variables["params"], abstract["params"])
    got = quantized.apply({"params": params}, x)
    return judge(distance(got, wanted), limit, count(params, is_aux), weights)


def qjax_linen(make: Callable, spec: str, limit: float, weights: int) -> str:
    """The three lines of the README, tables included."""
    model, x = make()
    return qjax_function(model.apply, model.init(jax.random.key(0), x), x, spec, limit, weights)


def qwix_nnx(make: Callable, rule: dict[str, Any], limit: float, weights: int) -> str:
    """The README: the model is run once, and holds quantized weights afterwards."""
    import qwix

    model, x = make()
    wanted = model(x)
    quantized = qwix.quantize_model(model, provider(rule), x)
    found = count(nnx.to_pure_dict(nnx.state(quantized)), lambda v: is_int8(v, "int8"))
    return judge(distance(quantized(x), wanted), limit, found, weights)


def is_int8(leaf: Any, dtype: str) -> bool:
    """Whether a leaf is an array of codes."""
    return getattr(leaf, "dtype", None) == dtype


def qjax_nnx(make: Callable, spec: str, limit: float, weights: int) -> str:
    """Split into graph and state; the state is the tree of parameters."""
    model, x = make()
    graph, state = nnx.split(model)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    return qjax_function(fn, state, x, spec, limit, weights)


def qjax_function(fn: Callable, params: Any, x: Any, spec: str, limit: float, weights: int) -> str:
    """Sites, quantized parameters, the unmodified function; what was opened is noted."""
    import qjax

    sites = qjax.find_sites(fn, params, x)
    q = qjax.quantize_params(params, qjax.Recipe(qjax.Rule(".*", spec)), sites)
    note = ""
    if not sites:  # the weight reaches its matmul through arithmetic: its rule gives the axis
        recipe = qjax.Recipe(qjax.Rule(".*", spec, axis=0))
        (why, *_) = [r.note for r in qjax.report(q, recipe=recipe, sites=sites).rows]
        note = f"; with `axis` in its rule (without, report says {why!r})"
        q = qjax.quantize_params(params, recipe)
    got = eqx.filter_jit(qjax.quantized(fn))(q, x)
    opened = [u.how for u in qjax.explain(fn, q, x).uses if u.how.startswith("dequantized")]
    note += f"; explain says {opened[0]!r}" if opened else ""
    return judge(distance(got, fn(params, x)), limit, count(q, qjax.is_qtensor), weights, note)


class Case(NamedTuple):
    """One row: what is done, and how each library does it."""

    title: str
    qwix: Callable[[], str]
    qjax: Callable[[], str]


def both(
    title: str,
    make: Callable[[], tuple[Any, Any]],
    spec: str = "int8",
    rule: dict[str, Any] = INT8,
    weights: int = 1,
    nnx_model: bool = False,
) -> Case:
    """A model and an input that both libraries take."""
    limit = LIMIT.get(spec.partition("_")[0].partition("/")[0], LIMIT["int4"])
    theirs, ours = (qwix_nnx, qjax_nnx) if nnx_model else (qwix_linen, qjax_linen)
    return Case(
        title,
        functools.partial(theirs, make, rule, limit, weights),
        functools.partial(ours, make, spec, limit, weights),
    )


# --- the models


class Function(nn.Module):
    """A module whose weights `w0`, `w1` ... are used by `body(weights, x)`."""

    body: Callable[[list[jax.Array], jax.Array], jax.Array]
    shapes: tuple[tuple[int, ...], ...] = ((48, 64),)

    @nn.compact
    def __call__(self, x):
        """Calls the body."""
        init = lambda key, shape: jax.random.normal(key, shape) * shape[-1] ** -0.5
        weights = [self.param(f"w{i}", init, s) for i, s in enumerate(self.shapes)]
        return self.body(weights, x)


def uses(body: Callable, *shapes: tuple[int, ...], x: tuple[int, ...] = (5, 64)) -> Callable:
    """Makes a module that uses weights as `body` says, and its input."""
    return lambda: (Function(body, shapes or ((48, 64),)), normal(1, *x) * x[0] ** 0.5)


class MLP(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x):
        """Hidden layer, tanh, output."""
        return nn.Dense(8)(nn.tanh(nn.Dense(32)(x)))


class NNXMLP(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        """Hidden layer, tanh, output."""
        return self.b(jnp.tanh(self.a(x)))


class Layer(nn.Module):
    """A layer as a scan sees it."""

    @nn.compact
    def __call__(self, x, _):
        """One dense layer."""
        return nn.tanh(nn.Dense(32)(x)), None


class Scanned(nn.Module):
    """Three layers, their parameters stacked."""

    @nn.compact
    def __call__(self, x):
        """Scans over the layers."""
        axes, rngs = {"params": 0}, {"params": True}
        return nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=3)()(x, None)[0]


class Experts(nn.Module):
    """Three dense layers side by side."""

    @nn.compact
    def __call__(self, x):
        """Each expert on its own input."""
        axes, rngs = {"params": 0}, {"params": True}
        return nn.vmap(nn.Dense, variable_axes=axes, split_rngs=rngs)(24)(x)


class Tied(nn.Module):
    """An embedding that is also the head."""

    @nn.compact
    def __call__(self, ids):
        """Looks up and multiplies."""
        embed = nn.Embed(50, 32)
        return embed.attend(embed(ids))


class NNXTied(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)

    def __call__(self, ids):
        """Looks up and multiplies."""
        return self.embed.attend(self.embed(ids))


class BatchNormed(nn.Module):
    """A layer that changes a collection while it runs."""

    @nn.compact
    def __call__(self, x):
        """Dense, then a batch norm in training mode."""
        return nn.BatchNorm(use_running_average=False)(nn.Dense(24)(x))


class Autoencoder(nnx.Module):
    """Two methods that a user calls."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 64, rngs=rngs)

    def encode(self, x):
        """First half."""
        return jnp.tanh(self.a(x))

    def decode(self, x):
        """Second half."""
        return self.b(x)

    def __call__(self, x):
        """Both."""
        return self.decode(self.encode(x))


class Renamed(nnx.Module):
    """Its receiver has another name."""

    def __init__(this, rngs):
        this.a = nnx.Linear(64, 32, rngs=rngs)

    def __call__(this, x):
        """One layer."""
        return this.a(x)


dense = lambda features=32: (nn.Dense(features), normal(0, 5, 64))
conv = lambda: (nn.Conv(8, (3, 3)), normal(0, 2, 9, 9, 16))
ids = lambda: jnp.arange(6)
rngs = lambda: nnx.Rngs(0)


# --- cases that take more than a model


def matmul_model() -> tuple[nn.Module, Any, jax.Array]:
    """`x @ w`, which nothing has run yet; jnp.matmul is a jitted function of JAX."""
    model, x = uses(lambda w, x: x @ w[0], (64, 32))()
    return model, {"params": {"w0": normal(0, 64, 32)}}, x


def helper_model() -> tuple[nn.Module, Any, jax.Array]:
    """The same by a jitted function of the user's."""
    helper = jax.jit(lambda x, w: x @ w)
    _, variables, x = matmul_model()
    return Function(lambda w, x: helper(x, w[0]), ((64, 32),)), variables, x


def exact(variables: Any, x: jax.Array) -> jax.Array:
    """The float result of both models, by another operation than theirs."""
    return jnp.einsum("bi,io->bo", x, variables["params"]["w0"])


def qwix_ptq_after_float() -> str:
    """Case 1: post-training quantization."""
    model, variables, x = matmul_model()
    jax.block_until_ready(model.apply(variables, x))
    return qwix_linen(lambda: (model, x), INT8, LIMIT["int8"], 1)


def qjax_ptq_after_float() -> str:
    """Case 1."""
    model, variables, x = matmul_model()
    jax.block_until_ready(model.apply(variables, x))
    return qjax_function(model.apply, variables, x, "int8", LIMIT["int8"], 1)


def qwix_order(make: Callable, quantized_first: bool) -> str:
    """Cases 1 to 3: quantized training and the float model, one after the other."""
    import qwix

    model, variables, x = make()
    quantized = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**INT8_BOTH)]))
    runs = (lambda: quantized.apply(variables, x), lambda: model.apply(variables, x))
    return order(runs, exact(variables, x), quantized_first)


def qjax_order(make: Callable, quantized_first: bool) -> str:
    """Cases 1 to 3 with dynamic int8 in place of training."""
    import qjax

    model, variables, x = make()
    sites = {"params/w0": (qjax.Site("params/w0", "dot_general", 1, (0,), (), (1,), (), "x"),)}
    q = qjax.quantize_params(variables, "int8/int8_token", sites)  # found without a trace
    run = qjax.quantized(model.apply)
    runs = (lambda: run(q, x), lambda: model.apply(variables, x))
    return order(runs, exact(variables, x), quantized_first)


def order(runs: tuple[Callable, Callable], wanted: jax.Array, quantized_first: bool) -> str:
    """Runs (quantized, float) in the given order and judges the one that ran last."""
    run_quantized, run_float = runs
    if quantized_first:
        jax.block_until_ready(run_quantized())
        error = distance(run_float(), wanted)
        if error < 1e-5:
            return f"right: the float model is off by {error:.1g}"
        return f"**the float model gives quantized results**: error {error:.2g}"
    jax.block_until_ready(run_float())
    error = distance(run_quantized(), wanted)
    if error < 1e-5:
        return f"**quantization is off**, without a warning: error {error:.1g}"
    return judge(error, LIMIT["int8"], 1, 1)


def qwix_quantizes_while_applied() -> str:
    """Case 6: what the docstring of PtqProvider offers in place of quantize_params."""
    import qwix

    model, x = BatchNormed(), normal(0, 5, 32)
    variables = model.init(jax.random.key(0), x)
    wanted, _ = model.apply(variables, x, mutable=True)
    got, _ = qwix.quantize_model(model, provider(INT8)).apply(variables, x, mutable=True)
    return judge(distance(got, wanted), LIMIT["int8"], 1, 1)


def qjax_quantizes_while_applied() -> str:
    """Case 6: quantized inside of the same jit, mutated collections returned."""
    import qjax

    model, x = BatchNormed(), normal(0, 5, 32)
    variables = model.init(jax.random.key(0), x)
    apply = lambda v, x: model.apply(v, x, mutable=["batch_stats"])
    sites = qjax.find_sites(apply, variables, x)
    run = lambda v, x: qjax.quantized(apply)(qjax.quantize_params(v, "int8", sites), x)
    (got, state), (wanted, _) = jax.jit(run)(variables, x), apply(variables, x)
    assert set(state) == {"batch_stats"}
    return judge(distance(got, wanted), LIMIT["int8"], 1, 1)


def shape_twin() -> tuple[nn.Module, jax.Array, jax.Array]:
    """Case 15: relu(x) times its transpose, beside a weight of that shape."""

    def body(w, x):
        h = nn.relu(x)
        return jnp.dot(h, h.T)

    x = normal(1, 64, 64) * 8
    return Function(body, ((64, 64),)), x, nn.relu(x).T


def qwix_shape_twin() -> str:
    """Case 15: parameters that the quantized model makes, which its docstring recommends."""
    import qwix

    model, x, h = shape_twin()
    wanted = model.init(jax.random.key(0), x)["params"]["w0"]
    found = qwix.quantize_model(model, provider(INT8)).init(jax.random.key(0), x)["params"]["w0"]
    if not is_aux(found):
        return twin_verdict(found, wanted, h)
    return twin_verdict(qwix.dequantize(found.array), wanted, h)


def qjax_shape_twin() -> str:
    """Case 15."""
    import qjax

    model, x, h = shape_twin()
    variables = model.init(jax.random.key(0), x)
    sites = qjax.find_sites(model.apply, variables, x)
    q = qjax.quantize_params(variables, qjax.Recipe(qjax.Rule(".*", "int8")), sites)
    return twin_verdict(q["params"]["w0"], variables["params"]["w0"], h)


def twin_verdict(found: jax.Array, weight: jax.Array, activation: jax.Array) -> str:
    """What the weight holds now."""
    to_weight, to_activation = distance(found, weight), distance(found, activation)
    if to_activation < to_weight:
        return (
            f"**the weight holds the activation**: errors {to_activation:.2g} and {to_weight:.2g}"
        )
    return f"right: the weight is itself, error {to_weight:.2g}"


def held_bits(array: Any, size: int) -> float:
    """Bits per weight that the compiler allocates for a quantized weight."""
    plan = jax.jit(lambda q: jax.tree.map(jnp.ravel, q)).lower(array).compile().memory_analysis()
    return 8 * plan.argument_size_in_bytes / size


def qwix_bits(qtype: str, group: int, nominal: float) -> str:
    """Case 18, with the narrowest scales that it offers."""
    import qwix

    w = normal(0, 1024, 512)
    options = {"channelwise_axes": [1], "tiled_axes": {0: group}, "scale_dtype": jnp.bfloat16}
    q = qwix.quantize(w, qtype, **options)
    return bits_verdict(held_bits(q, w.size), nominal)


def qjax_bits(spec: str, nominal: float) -> str:
    """Case 18."""
    import qjax

    w = normal(0, 1024, 512)
    return bits_verdict(held_bits(qjax.quantize(w, spec, 0), w.size), nominal)


def bits_verdict(bits: float, nominal: float) -> str:
    """Bits per weight beside those of the format."""
    if bits > 1.01 * nominal:
        return f"**{bits:.3f} bits per weight**, the format has {nominal:g}"
    return f"{bits:.3f} bits per weight"


def qwix_weight(qtype: str, limit: float, **options: Any) -> str:
    """Cases 17, 19: one weight quantized and dequantized."""
    import qwix

    w = normal(0, 64, 32)
    q = qwix.quantize(w, qtype, channelwise_axes=[1], **options)
    return judge(distance(qwix.dequantize(q), w), limit, 1, 1)


def qjax_weight(spec: str, limit: float) -> str:
    """Cases 17, 19."""
    import qjax

    w = normal(0, 64, 32)
    return judge(distance(qjax.dequantize(qjax.quantize(w, spec, 0)), w), limit, 1, 1)


def qwix_typo() -> str:
    """Case 25: the rule names a module that is not there."""
    model, x = dense()
    import qwix

    rules = [qwix.QuantizationRule(module_path=".*Dence.*", **INT8)]
    variables = model.init(jax.random.key(0), x)
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)
    params = qwix.quantize_params(variables["params"], abstract["params"])
    error = distance(quantized.apply({"params": params}, x), model.apply(variables, x))
    return judge(error, LIMIT["int8"], count(params, is_aux), 1) + "; get_unused_rules() tells"


def qjax_typo() -> str:
    """Case 25."""
    import qjax

    model, x = dense()
    variables = model.init(jax.random.key(0), x)
    recipe = qjax.Recipe(qjax.Rule(".*/kernal", "int8"), qjax.Rule(".*", None))
    qjax.quantize_params(variables, recipe, qjax.find_sites(model.apply, variables, x))
    return "**nothing quantized**, without a warning"


def qwix_jvp() -> str:
    """Case 26: forward mode through quantized training."""
    import qwix

    model, x = dense()
    variables = model.init(jax.random.key(0), x)
    quantized = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**INT8_BOTH)]))
    _, tangent = jax.jvp(lambda x: quantized.apply(variables, x), (x,), (x,))
    return judge(distance(tangent, model.apply(variables, x)), LIMIT["int8"], 1, 1)


def qjax_jvp() -> str:
    """Case 26: straight-through forward mode."""
    import qjax

    model, x = dense()
    variables = model.init(jax.random.key(0), x)
    sites = qjax.find_sites(model.apply, variables, x)
    q = qjax.quantize_params(variables, "int8/int8_token", sites)
    _, tangent = jax.jvp(lambda x: qjax.quantized(model.apply)(q, x), (x,), (x,))
    return judge(distance(tangent, model.apply(variables, x)), LIMIT["int8"], 1, 1)


def sharded_model() -> tuple[nn.Module, Any, Any, jax.Array]:
    """Case 27: a kernel of 64 rows in groups of 32, cut in four."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("d", None))
    model, x = nn.Dense(32, kernel_init=init), normal(0, 5, 64)
    return mesh, model, model.init(jax.random.key(0), x), x


def qwix_sharded() -> str:
    """Case 27: as in the tests of MaxText and tunix, shardings come from the abstract tree."""
    import qwix

    mesh, model, variables, x = sharded_model()
    quantized = qwix.quantize_model(model, provider({"weight_qtype": "int4", "tile_size": 32}))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)
    params = qwix.quantize_params(nn.unbox(variables)["params"], abstract["params"])
    specs = nn.get_partition_spec(abstract)["params"]
    place = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: type(s) is P)
    got = jax.jit(quantized.apply)({"params": jax.device_put(params, place)}, x)
    wanted = model.apply(variables, x)
    return judge(distance(got, wanted), LIMIT["int4"], count(params, is_aux), 1)


def qjax_sharded() -> str:
    """Case 27."""
    import qjax

    mesh, model, variables, x = sharded_model()
    q = qjax.quantize_params(variables, "int4_g32", qjax.find_sites(model.apply, variables, x))
    specs = qjax.partition_specs(q, nn.get_partition_spec(q), mesh)
    place = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: type(s) is P)
    got = jax.jit(qjax.quantized(model.apply))(jax.device_put(q, place), x)
    wanted = model.apply(variables, x)
    return judge(distance(got, wanted), LIMIT["int4"], count(q, qjax.is_qtensor), 1)


def qwix_plain() -> str:
    """Case 28: a function of a weight."""
    import qwix

    w, x = normal(0, 64, 32), normal(1, 5, 64)
    q = qwix.quantize(w, "int8", channelwise_axes=[1])
    return judge(distance(x @ q, x @ w), LIMIT["int8"], 1, 1)


def qjax_plain() -> str:
    """Case 28."""
    w, x = normal(0, 64, 32), normal(1, 5, 64)
    return qjax_function(lambda w, x: x @ w, w, x, "int8", LIMIT["int8"], 1)


def equinox_model() -> tuple[Any, jax.Array]:
    """Case 28: its activation function is a leaf of the tree."""
    return eqx.nn.MLP(64, 8, 32, 1, key=jax.random.key(0)), normal(0, 5, 64)


def qwix_equinox() -> str:
    """Case 28."""
    import qwix

    model, x = equinox_model()
    quantized = qwix.quantize_model(model, provider(INT8), x)
    return judge(distance(jax.vmap(quantized)(x), jax.vmap(model)(x)), LIMIT["int8"], 2, 2)


def qjax_equinox() -> str:
    """Case 28."""
    model, x = equinox_model()
    return qjax_function(lambda m, x: jax.vmap(m)(x), model, x, "int8", LIMIT["int8"], 2)


def qwix_methods() -> str:
    """Case 29."""
    import qwix

    model, x = Autoencoder(rngs()), normal(0, 5, 64)
    wanted = model.encode(x)
    quantized = qwix.quantize_model(model, provider(INT8), x, methods=["encode", "decode"])
    return judge(distance(quantized.encode(x), wanted), LIMIT["int8"], 1, 1)


def qjax_methods() -> str:
    """Case 29: quantized once, each method run on it."""
    import qjax

    graph, state = nnx.split(Autoencoder(rngs()))
    x = normal(0, 5, 64)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    q = qjax.quantize_params(state, "int8", qjax.find_sites(fn, state, x))
    encode = lambda state, x: nnx.merge(graph, state).encode(x)
    decode = lambda state, x: nnx.merge(graph, state).decode(x)
    h = encode(state, x)
    error = max(
        distance(qjax.quantized(encode)(q, x), h),
        distance(qjax.quantized(decode)(q, h), decode(state, h)),
    )
    return judge(error, LIMIT["int8"], count(q, qjax.is_qtensor), 2)


def qwix_pickle() -> str:
    """Case 29."""
    import qwix

    model, x = NNXMLP(rngs()), normal(0, 5, 64)
    quantized = qwix.quantize_model(model, provider(INT8), x)
    again = pickle.loads(pickle.dumps(quantized))
    return judge(distance(again(x), model(x)), LIMIT["int8"], 1, 1)


def qjax_pickle() -> str:
    """Case 29: what is pickled is the graph, which is the model's own, and the quantized state."""
    import qjax

    graph, state = nnx.split(NNXMLP(rngs()))
    x = normal(0, 5, 64)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    q = qjax.quantize_params(state, "int8", qjax.find_sites(fn, state, x))
    graph, q = pickle.loads(pickle.dumps((graph, q)))
    return judge(distance(qjax.quantized(fn)(q, x), fn(state, x)), LIMIT["int8"], 1, 1)


def qwix_path() -> str:
    """Case 30: what a weight-only matmul runs on, read off the jaxpr, and who says so."""
    import qwix

    model, x = dense()
    variables = model.init(jax.random.key(0), x)
    quantized = qwix.quantize_model(model, provider(INT8))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)
    params = qwix.quantize_params(variables["params"], abstract["params"])
    jaxpr = jax.make_jaxpr(quantized.apply)({"params": params}, x)
    tellers = [n for n in dir(qwix) if n in ("explain", "report", "inspect", "summary")]
    assert not tellers
    return f"dot of {dot_dtypes(jaxpr)}; no function of the library tells"


def qjax_path() -> str:
    """Case 30."""
    import qjax

    model, x = dense()
    variables = model.init(jax.random.key(0), x)
    q = qjax.quantize_params(variables, "int8", qjax.find_sites(model.apply, variables, x))
    (use,) = qjax.explain(model.apply, q, x).uses
    jaxpr = jax.make_jaxpr(qjax.quantized(model.apply))(q, x)
    return f"dot of {dot_dtypes(jaxpr)}; explain says {use.how!r}"


def dot_dtypes(jaxpr: Any) -> str:
    """The dtypes of the operands of the first dot in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            return " x ".join(str(v.aval.dtype) for v in eqn.invars)
        for inner in jax.core.jaxprs_in_params(eqn.params):
            if found := dot_dtypes(inner):
                return found
    return ""


def small_weights(roundtrip: Callable[[jax.Array], jax.Array]) -> str:
    """Case 31: a format's error should not depend on the magnitude of the weights."""
    w = normal(0, 256, 64) * 16  # of standard deviation 1
    errors = {std: distance(roundtrip(w * std), w * std) for std in (1, 0.02, 0.005, 0.002, 0.0005)}
    text = ", ".join(f"{std:g}: {error:.3f}" for std, error in errors.items())
    wrong = max(errors.values()) > 1.5 * errors[1]
    return f"{'**small weights are lost**' if wrong else 'right'}: error by deviation {text}"


def qwix_small(qtype: str, group: int) -> str:
    """Case 31."""
    import qwix

    options = {"channelwise_axes": [1], "tiled_axes": {0: group}}
    return small_weights(lambda w: qwix.dequantize(qwix.quantize(w, qtype, **options)))


def qjax_small(spec: str) -> str:
    """Case 31."""
    import qjax

    return small_weights(lambda w: qjax.dequantize(qjax.quantize(w, spec, 0)))


def order_case(title: str, make: Callable, quantized_first: bool) -> Case:
    """Cases 1 to 3."""
    runs = (functools.partial(run, make, quantized_first) for run in (qwix_order, qjax_order))
    return Case(f"{title} (qjax: int8/int8_token)", *runs)


part = functools.partial
MATMUL = ((64, 32),)
CASES: dict[str, Case] = {
    # controls: both libraries do these
    "a": both("Dense layers, int8", lambda: (MLP(), normal(0, 5, 64)), weights=2),
    "b": both(
        "Dense layers, int4 in groups of 16",
        lambda: (MLP(), normal(0, 5, 64)),
        "int4_g16",
        INT4_GROUPS,
        2,
    ),
    "c": both(
        "NNX dense layers, int8",
        lambda: (NNXMLP(rngs()), normal(0, 5, 64)),
        weights=2,
        nnx_model=True,
    ),
    "d": both("Convolution, weights and activations in int8", conv, "int8/int8_token", INT8_BOTH),
    # what was traced before
    "1a": Case(
        "PTQ of `x @ w` after the float model ran", qwix_ptq_after_float, qjax_ptq_after_float
    ),
    "1b": order_case("QAT of `x @ w` after the float model ran", matmul_model, False),
    "2": order_case("The float model `x @ w` after QAT ran", matmul_model, True),
    "3a": order_case("As 1b, with a jitted helper of the user", helper_model, False),
    "3b": order_case("As 2, with a jitted helper of the user", helper_model, True),
    # lifted modules
    "4a": both("Linen `nn.scan` over layers, int8", lambda: (Scanned(), normal(0, 5, 32))),
    "4b": both(
        "Linen `nn.scan` over layers, int4 in groups of 16",
        lambda: (Scanned(), normal(0, 5, 32)),
        "int4_g16",
        INT4_GROUPS,
    ),
    "5": both("Linen `nn.vmap(nn.Dense)`", lambda: (Experts(), normal(0, 3, 5, 32))),
    "6": Case(
        "Float variables given to the quantized model, with mutable collections",
        qwix_quantizes_while_applied,
        qjax_quantizes_while_applied,
    ),
    # embeddings, convolutions, experts
    "8a": both("Tied embedding (`Embed.attend`), Linen", lambda: (Tied(), ids())),
    "8b": both("Tied embedding, NNX", lambda: (NNXTied(rngs()), ids()), nnx_model=True),
    "8c": both("Embedding alone", lambda: (nn.Embed(50, 32), ids())),
    "9a": both("Convolution, weight only", conv),
    "9b": both(
        "Convolution, int4 weights and int8 activations",
        conv,
        "int4/int8_token",
        {"weight_qtype": "int4", "act_qtype": "int8"},
    ),
    "10": both(
        "`lax.ragged_dot` over experts",
        uses(
            lambda w, x: lax.ragged_dot(x, w[0], jnp.array([2, 0, 3], jnp.int32)),
            (3, 64, 32),
        ),
    ),
    # weights used in every way
    "11a": both("`jnp.dot(w, x.T)`", uses(lambda w, x: jnp.dot(w[0], x.T))),
    "11b": both("`einsum('oi,bi->bo', w, x)`", uses(lambda w, x: jnp.einsum("oi,bi->bo", w[0], x))),
    "11c": both("`jnp.dot(x, w.T)`", uses(lambda w, x: jnp.dot(x, w[0].T))),
    "12a": both("`jnp.tensordot`", uses(lambda w, x: jnp.tensordot(x, w[0], axes=((1,), (1,))))),
    "12b": both(
        "A normalized weight, `x @ (w / norm(w))`",
        uses(lambda w, x: x @ (w[0] / jnp.linalg.norm(w[0])), *MATMUL),
    ),
    "12c": both(
        "A fused weight, split",
        uses(lambda w, x: sum(x @ part for part in jnp.split(w[0], 2, axis=1)), *MATMUL),
    ),
    "12d": both(
        "Rows taken from a weight that is multiplied",
        uses(lambda w, x: (x @ w[0])[:1] + jnp.take(w[0], jnp.arange(3), axis=0), *MATMUL),
    ),
    "13": both(
        "Einsum of three operands",
        uses(lambda w, x: jnp.einsum("bi,io,o->bo", x, w[0], jnp.arange(32.0)), *MATMUL),
    ),
    "14a": both(
        "The sum of two weights of one shape",
        uses(lambda w, x: x @ (w[0] + w[1]), *MATMUL * 2),
        weights=2,
    ),
    "14b": both(
        "The sum of three weights of one shape",
        uses(lambda w, x: x @ (w[0] + w[1] + w[2]), *MATMUL * 3),
        weights=3,
    ),
    "15": Case(
        "A matmul of two activations, and an unused weight of their shape",
        qwix_shape_twin,
        qjax_shape_twin,
    ),
    # formats
    "16": both(
        "Groups of 32 along 100 inputs",
        uses(lambda w, x: jnp.dot(x, w[0]), (100, 32), x=(5, 100)),
        "int4_g32",
        {"weight_qtype": "int4", "tile_size": 32},
    ),
    "17a": Case("uint4", part(qwix_weight, "uint4", 0.25), part(qjax_weight, "uint4", 0.25)),
    "17b": Case("uint8", part(qwix_weight, "uint8", 0.03), part(qjax_weight, "uint8", 0.03)),
    "17c": Case("int1", part(qwix_weight, "int1", 0.9), part(qjax_weight, "int1", 0.9)),
    **{
        f"18{letter}": Case(
            f"Bits held: {spec}", part(qwix_bits, qtype, group, bits), part(qjax_bits, spec, bits)
        )
        for letter, spec, qtype, group, bits in (
            ("a", "int2_g32", "int2", 32, 2.5),
            ("b", "int3_g32", "int3", 32, 3.5),
            ("c", "mxfp4", "mxfp4", 32, 4.25),
            ("d", "mxfp8", "mxfp8", 32, 8.25),
            ("e", "nvfp4", "nvfp4", 16, 4.5),
        )
    },
    "19": Case(
        "Asymmetric nf4",
        part(qwix_weight, "nf4", 0.25, calibration_method="minmax"),
        part(qjax_weight, "nf4_asym", 0.25),
    ),
    "20": both(
        "int4 weights and int4 activations",
        dense,
        "int4/int4_token",
        {"weight_qtype": "int4", "act_qtype": "int4"},
    ),
    # rules, transforms, meshes, frameworks
    "25": Case("A rule whose path is misspelt", qwix_typo, qjax_typo),
    "26": Case("`jax.jvp` through QAT (qjax: int8/int8_token)", qwix_jvp, qjax_jvp),
    "27": Case("Two groups on four shards", qwix_sharded, qjax_sharded),
    "28a": Case("A plain function, `x @ w`, as it is", qwix_plain, qjax_plain),
    "28b": Case("An Equinox model", qwix_equinox, qjax_equinox),
    "29a": Case("NNX, two methods", qwix_methods, qjax_methods),
    "29b": both(
        "NNX, a receiver that is not called `self`",
        lambda: (Renamed(rngs()), normal(0, 5, 64)),
        nnx_model=True,
    ),
    "29c": Case("NNX, the quantized model pickled", qwix_pickle, qjax_pickle),
    "30": Case("What a weight-only matmul runs on, and who says so", qwix_path, qjax_path),
    "31": Case("nvfp4 of small weights", part(qwix_small, "nvfp4", 16), part(qjax_small, "nvfp4")),
}


def main() -> None:
    """Runs every case in processes of its own and prints the table."""
    print(f"| case | what | qwix {VERSION} | qjax |\n| --- | --- | --- | --- |")
    for name, case in CASES.items():
        cells = [outcome(name, library) for library in ("qwix", "qjax")]
        print(f"| {name} | {case.title} | {' | '.join(cells)} |", flush=True)


def outcome(name: str, library: str) -> str:
    """What became of one case on one library, on one line."""
    command = [sys.executable, __file__, name, library]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"**no end** in {TIMEOUT} s"
    if ran.returncode < 0:
        return f"**the process dies** (signal {-ran.returncode})"
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
    if ran.returncode == 0:
        return lines[-1]
    raised = [line for line in lines if "Error: " in line and not line.startswith(" ")]
    kind, _, message = (raised or lines)[-1].partition(": ")
    text = message if len(message) < 160 else f"{message[:157]}..."
    return f"raises {kind.rpartition('.')[2]}: {text}".replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    if len(sys.argv) == 3:
        jax.config.update("jax_num_cpu_devices", 8)
        print(getattr(CASES[sys.argv[1]], sys.argv[2])())
    else:
        main()
