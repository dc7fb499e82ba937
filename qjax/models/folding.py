"""`fold`: input scales of AWQ and SmoothQuant move into the weights that make the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.activation import Activation, changes_coordinates
from qjax.models.decoder import Decoder
from qjax.qtensor import QTensor, is_qtensor
from qjax.run import quantized

_SCALES = ("float32", "float16", "bfloat16")  # the dtypes of a scale that can be divided
_COMPUTE = 1e-4  # what float32 arithmetic in another order may change of the logits' norm
_TOKENS = 16  # of the probe

Params = dict[str, Any]


class Folded(NamedTuple):
    """What `fold` made.

    Attributes:
      params: the parameters, to be run in place of the old ones.
      folded: the paths of the weights whose `input_scale` is gone.
      skipped: why others keep theirs, by path.
    """

    params: Any
    folded: tuple[str, ...]
    skipped: dict[str, str]


class _Skip(Exception):
    """Why a scale stays where it is."""


def fold(params: Any, model: Decoder) -> Folded:
    """Moves `input_scale`s into what comes before, so that nothing divides at run time.

    A weight with input scale s is held as s * W and multiplied with x / s. Where x is made by
    something linear in its features that something is divided instead:

        q, k, v      attention_norm / s          up   mlp_norm / s, with gate
        o            columns of v / s            down columns of up / s
        head         norm / s

    Query heads share key and value heads, so o's scale moves only if it is the same for the heads
    that share one. All that a norm feeds must have the same scale; an array that has none, such as
    a router, has its rows multiplied. What cannot move is left as it is and reported.

    Args:
      params: of `model`, unrolled or scanned, with QTensors; prepare them afterwards.
      model: a decoder of `qjax.models`.

    Returns:
      Folded.

    Raises:
      ValueError: if the parameters are not those of the decoder, or if on a probe of 16 tokens the
        logits of both, without activation quantization and computed in float32, differ by more
        than rounding: u, the rounding of the dtypes that were divided, in 2 L branches of a
        residual stream may change their norm by 4 u sqrt(2 L), and arithmetic by 1e-4.

    Deviations: AutoAWQ and llm-compressor fold while they quantize; here the codes stay as they
    are. Dividing a scale rounds it to its dtype.

    Example:
      >>> config = qjax.models.Config(50, 32, 48, 1, 4, 4, 8)
      >>> model, tokens = qjax.models.Decoder(config), jnp.ones((1, 8), jnp.int32)
      >>> params = model.init(jax.random.key(0), tokens)
      >>> recipe = qjax.Recipe(
      ...     qjax.Rule(".*", None, where=qjax.is_gathered),
      ...     qjax.Rule(".*", "int8/int8_token", qjax.smoothquant()),
      ... )
      >>> stats = qjax.calibrate(model.apply, params, [tokens], recipe)
      >>> sites = qjax.find_sites(model.apply, params, tokens)
      >>> done = fold(qjax.quantize_params(params, recipe, sites, stats=stats), model)
      >>> len(done.folded), done.skipped
      (8, {})
    """
    config = model.config
    _check(params, model)
    held = dict(params["params"])
    folded: list[str] = []
    skipped: dict[str, str] = {}
    names = ["layers"] if config.scan else [f"layers_{i}" for i in range(config.num_layers)]
    for name in names:
        block = held[name]["block"] if config.scan else held[name]
        where = f"params/{name}/block" if config.scan else f"params/{name}"
        block = _block(block, where, config, folded, skipped)
        held[name] = {"block": block} if config.scan else block
    if not config.tied:
        held = _before(held, "norm", (("head",),), "params", folded, skipped)
    done = {**params, "params": held}
    if folded:
        _compare(model, params, done)
    return Folded(done, tuple(folded), skipped)


def _block(
    block: Params, where: str, config: Any, folded: list[str], skipped: dict[str, str]
) -> Params:
    """One layer, or all of them stacked."""
    attention = tuple(("attention", name) for name in ("q", "k", "v"))
    inner = ("mlp", "experts") if config.num_experts else ("mlp",)
    feeds = tuple((*inner, name) for name in ("gate", "up"))
    if config.num_experts:
        feeds = (*feeds, ("mlp", "router"))
    block = _before(block, "attention_norm", attention, where, folded, skipped)
    block = _before(block, "mlp_norm", feeds, where, folded, skipped)
    groups = config.num_heads // config.num_kv_heads

    def shared(s: jax.Array) -> jax.Array:
        heads = s.reshape(*s.shape[:-1], config.num_kv_heads, groups, config.head_dim)
        if not bool(jnp.all(heads == heads[..., :1, :])):
            raise _Skip(f"{groups} query heads share each value head, and their scales differ")
        return heads[..., 0, :].reshape(*s.shape[:-1], -1)

    pairs = ((("attention", "v"), ("attention", "o"), shared),)
    pairs += (((*inner, "up"), (*inner, "down"), lambda s: s),)
    for source, target, rule in pairs:
        path = _named(where, target)
        s = _scale_of(_get(block, (*target, "kernel")))
        if s is None:
            continue
        try:
            made = _columns(_get(block, source), rule(s))
        except _Skip as why:
            skipped[path] = str(why)
            continue
        block = _set(block, source, made)
        block = _set(block, (*target, "kernel"), _stripped(_get(block, (*target, "kernel"))))
        folded.append(path)
    return block


def _before(
    tree: Params,
    norm: str,
    targets: Sequence[tuple[str, ...]],
    where: str,
    folded: list[str],
    skipped: dict[str, str],
) -> Params:
    """The tree with the scale that all `targets` share in a norm."""
    kernels = {t: _get(tree, (*t, "kernel")) for t in targets}
    scales = {t: s for t, w in kernels.items() if (s := _scale_of(w)) is not None}
    if not scales:
        return tree
    gain = tree[norm]["scale"]
    s = next(iter(scales.values()))
    try:
        for t, w in kernels.items():
            other = scales.get(t)
            if other is not None and other.shape != gain.shape:
                raise _Skip(f"its scale {other.shape} is not one for each feature of {norm}")
            if is_qtensor(w) and other is None:
                raise _Skip(f"{'/'.join(t)} has the same input and no scale")
            if other is not None and not bool(jnp.all(other == s)):
                raise _Skip(f"{'/'.join(t)} has the same input and another scale")
    except _Skip as why:
        skipped |= {_named(where, t): str(why) for t in scales}
        return tree
    for t, w in kernels.items():
        made = _stripped(w) if t in scales else _rows(w, s)
        tree = _set(tree, (*t, "kernel"), made)
    folded.extend(_named(where, t) for t in scales)
    return _set(tree, (norm, "scale"), _divided(gain, s))


def _scale_of(kernel: Any) -> jax.Array | None:
    act = kernel.activation if isinstance(kernel, QTensor) else None
    return None if act is None else act.input_scale


def _stripped(q: QTensor) -> QTensor:
    """The weight s * W in the place of W."""
    act = q.activation
    assert act is not None
    act = dataclasses.replace(act, input_scale=None)
    if not changes_coordinates(act):
        act = None if act.spec is None else dataclasses.replace(act, axis=())
    return dataclasses.replace(q, activation=act)


def _rows(w: jax.Array, s: jax.Array) -> jax.Array:
    """An array `[..., in, out]` that multiplies x / s in place of x."""
    return (w.astype(jnp.float32) * s.astype(jnp.float32)[..., None]).astype(w.dtype)


def _columns(dense: Params, s: jax.Array) -> Params:
    """A kernel `[..., in, out]`, and its bias, with every output divided."""
    w = dense["kernel"]
    if isinstance(w, QTensor):
        if w.param_shape is not None or w.block[-1] != 1:
            raise _Skip(f"the weight before has blocks {w.block} that span several outputs")
        made: Any = dataclasses.replace(
            w,
            scale=_divided_scale(w, w.scale, s),
            offset=None if w.offset is None else _divided_scale(w, w.offset, s),
        )
    elif is_qtensor(w):
        raise _Skip("the weight before is prepared; fold what unprepare gives back")
    else:
        made = _divided(w, s[..., None, :])
    bias = {"bias": _divided(dense["bias"], s)} if "bias" in dense else {}
    return {**dense, "kernel": made} | bias


def _divided_scale(w: QTensor, scale: jax.Array | QTensor, s: jax.Array) -> jax.Array:
    """A scale or an offset `[..., blocks, out]` of `w`."""
    if isinstance(scale, QTensor) or scale.dtype.name not in _SCALES:
        kind = "codes" if isinstance(scale, QTensor) else scale.dtype.name
        raise _Skip(f"the weight before is in {w.format} with scales in {kind}")
    made = _divided(scale, s[..., None, :])
    if not bool(jnp.all(jnp.isfinite(made))):
        raise _Skip(f"{scale.dtype} cannot hold the scales of the weight before, divided")
    return made


def _divided(v: jax.Array, s: jax.Array) -> jax.Array:
    return (v.astype(jnp.float32) / s.astype(jnp.float32)).astype(v.dtype)


def _get(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: Params, path: Sequence[str], value: Any) -> Params:
    """A copy with another value at a path."""
    name, *rest = path
    return {**tree, name: _set(tree[name], rest, value) if rest else value}


def _named(where: str, target: Sequence[str]) -> str:
    return "/".join((where, *target, "kernel"))


def _check(params: Any, model: Decoder) -> None:
    """Raises ValueError unless the parameters have the names of the decoder's."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    names = lambda t: {
        jax.tree_util.keystr(p, simple=True, separator="/"): tuple(v.shape)
        for p, v in jax.tree_util.tree_flatten_with_path(t, is_leaf=is_qtensor)[0]
    }
    got, wanted = names(params), names(shapes)
    odd = [p for p in sorted(got.keys() | wanted.keys()) if got.get(p) != wanted.get(p)]
    if odd:
        raise ValueError(
            f"fold: {odd[0]} is {got.get(odd[0])}, of the decoder {wanted.get(odd[0])}; give the "
            "model that the parameters belong to (scan and tied included)"
        )


def _compare(model: Decoder, before: Any, after: Any) -> None:
    """Raises ValueError if the function on a probe is another one."""
    config = model.config
    exact = Decoder(dataclasses.replace(config, dtype=jnp.float32))
    tokens = jax.random.randint(jax.random.key(0), (1, _TOKENS), 0, config.vocab_size, jnp.int32)
    run = quantized(exact.apply)
    with jax.default_matmul_precision("highest"):
        old, new = (np.asarray(jax.jit(run)(_weights(p), tokens)) for p in (before, after))
    kinds = {jnp.dtype(v.dtype) for v in jax.tree.leaves(before)}
    unit = max(float(jnp.finfo(d).eps) / 2 for d in kinds if d.name in _SCALES)
    bound = _COMPUTE + 4 * unit * (2 * config.num_layers) ** 0.5
    off = float(np.linalg.norm(new - old) / np.linalg.norm(old))
    if not off <= bound:
        raise ValueError(
            f"fold: the logits of a probe change by {off:.3g} of their norm, more than rounding "
            f"({bound:.3g}); nothing was folded: are the parameters finite, and is no input scale "
            "near the ends of its range?"
        )


def _weights(params: Any) -> Any:
    """The parameters without what quantizes activations, which would turn rounding into steps."""

    def plain(x: Any) -> Any:
        if not isinstance(x, QTensor) or x.activation is None:
            return x
        leaves = {n: getattr(x.activation, n) for n in ("input_scale", "permutation", "signs")}
        act = Activation(axis=x.activation.axis, **leaves)
        return dataclasses.replace(x, activation=act if changes_coordinates(act) else None)

    return jax.tree.map(plain, params, is_leaf=is_qtensor)
