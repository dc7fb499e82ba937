"""fp8(loss_fn): what is seen of every use, where it goes, and what the gradients belong to."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import relative_error
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qjax import training

KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (8, 16)) * 1.3
W = jax.random.normal(KEYS[1], (3, 16, 16)) / 4 * jnp.array([1.5, 2.0, 0.5])[:, None, None]
HEAD = jax.random.normal(KEYS[2], (16, 4)) / 4
DELAYED = dataclasses.replace(training.RECIPES["delayed"], history=4)
BITWISE = {"w": W, "head": HEAD}


def cosine(got, wanted):
    pairs = [
        jax.flatten_util.ravel_pytree(jax.tree.map(lambda v: v.astype(jnp.float32), t))[0]
        for t in (got, wanted)
    ]
    return float(pairs[0] @ pairs[1] / jnp.linalg.norm(pairs[0]) / jnp.linalg.norm(pairs[1]))


def ends(x, head):
    return jnp.sum((x @ head) ** 2)


def layer(x, w):
    return jnp.tanh(x @ w)


jitted_layer = jax.jit(layer)


def own_weights(p, x):
    for i in range(3):
        x = layer(x, p[f"w{i}"])
    return ends(x, p["head"])


def scanned(p, x):
    return ends(jax.lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0], p["head"])


def scanned_remat(p, x):
    body = jax.checkpoint(lambda x, w: (layer(x, w), None))
    return ends(jax.lax.scan(body, x, p["w"])[0], p["head"])


def constant(p, x):
    return ends(jax.lax.scan(lambda x, _: (layer(x, p["w"]), None), x, length=3)[0], p["head"])


def called(p, x):
    for _ in range(3):
        x = jitted_layer(x, p["w"])
    return ends(x, p["head"])


def branched(p, x):
    for i in range(3):
        branches = (layer, lambda x, w: layer(x, w) * 0)
        x = jax.lax.cond(jnp.asarray(i >= 0), *branches, x, p["w"])
    return ends(x, p["head"])


def separate(weights):
    return {f"w{i}": w for i, w in enumerate(weights)} | {"head": HEAD}


def after(fn, params, steps=2, x=X, recipe=DELAYED):
    """A transformed loss, its state after some steps on the same parameters, and its jitted
    gradients.
    """
    low = training.fp8(fn, recipe)
    state = low.init(params, x)
    run = jax.jit(low.grads)
    for _ in range(steps):
        state = low.update(state, run(params, state, x)[2])
    return low, state, run


@functools.cache
def settled():
    return after(scanned, BITWISE)


@pytest.mark.parametrize("fn", [pytest.param(scanned, marks=pytest.mark.slow), scanned_remat])
def test_layers_of_a_scan_are_seen_apart(fn):
    _, state, run = after(fn, BITWISE)
    value, grads, seen = run(BITWISE, state, X)
    own = separate(W)
    _, state, run = after(own_weights, own)
    wanted, own_grads, own_seen = run(own, state, X)
    assert relative_error(value, wanted) < 1e-5
    assert relative_error(grads["w"], jnp.stack([own_grads[f"w{i}"] for i in range(3)])) < 1e-5
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *(own_seen[f"w{i}"] for i in range(3)))
    assert relative_error(seen["w"], stacked) < 1e-5


_slow = lambda fn: pytest.param(fn, marks=pytest.mark.slow)


@pytest.mark.parametrize("fn", [constant, _slow(called), _slow(branched)])
def test_uses_of_one_weight_are_reduced_by_maximum(fn):
    """An amax that rode in an ordinary cotangent would be the sum over the uses."""
    params = {"w": W[0], "head": HEAD}
    _, state, run = after(fn, params, 0)
    value, grads, seen = run(params, state, X)
    own = separate([W[0]] * 3)
    _, state, run = after(own_weights, own, 0)
    wanted, own_grads, own_seen = run(own, state, X)
    assert relative_error(value, wanted) < 1e-6
    assert relative_error(grads["w"], sum(own_grads[f"w{i}"] for i in range(3))) < 1e-6
    uses = [own_seen[f"w{i}"] for i in range(3)]
    assert len({float(u["g"]) for u in uses}) == 3
    for name in ("x", "w", "g"):
        got = max(float(v[name]) for key, v in seen.items())  # each branch is a use of its own
        assert got == pytest.approx(max(float(u[name]) for u in uses), rel=1e-6)


@pytest.mark.slow  # it walks through everything that is alive
def test_leak_check_refuses_jit_of_grad_of_shard_map_in_plain_jax():
    """Why `leaks_in_jax` marks the next test: without qjax it fails in the same way."""
    program = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
total = lambda w, x: jax.lax.psum(jnp.sum(x @ w), "d")
mapped = jax.shard_map(total, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
with jax.checking_leaks():
    jax.jit(jax.grad(mapped))(jnp.ones((4, 4)), jnp.ones((8, 4)))
"""  # of its own: among much that is alive, JAX's search for who holds the tracer breaks off
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Leaked trace" in done.stderr


@pytest.mark.leaks_in_jax
@pytest.mark.parametrize(
    ("kind", "check_vma"),
    [
        (AxisType.Auto, False),
        (AxisType.Explicit, True),
        pytest.param(AxisType.Auto, True, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, False, marks=pytest.mark.slow),
    ],
)
def test_shards_of_a_shard_map_are_reduced_by_maximum(kind, check_vma):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind,) * 2)

    def shard(w, head, x):
        return jax.lax.psum(ends(layer(layer(x, w[0]), w[1]), head), "d")

    def mapped(p, x):
        specs = (P(), P(), P("d"))
        return jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)(
            p["w"], p["head"], x
        )

    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, P("d")))
        _, state, run = after(mapped, BITWISE, 2, x)
        value, grads, seen = run(BITWISE, state, x)
    whole = lambda p, x: ends(layer(layer(x, p["w"][0]), p["w"][1]), p["head"])
    _, state, run = after(whole, BITWISE)
    wanted, whole_grads, whole_seen = run(BITWISE, state, X)
    assert relative_error(value, wanted) < 1e-5
    if check_vma:  # without it JAX splits a replicated cotangent among the shards
        assert relative_error(seen, whole_seen) < 1e-5
        assert relative_error(grads, whole_grads) < 1e-5
    assert cosine(grads, jax.grad(whole)(BITWISE, X)) > 0.98


def test_data_parallel_by_pmax():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    low, state, run = settled()

    def step(params, state, x):
        _, grads, seen = jax.jit(low.grads)(params, state, x)
        return jax.lax.psum(grads, "d"), jax.lax.pmax(seen, "d")

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P(), check_vma=False
    )
    grads, seen = jax.jit(mapped)(BITWISE, state, X)
    _, wanted, wanted_seen = run(BITWISE, state, X)
    assert relative_error(seen, wanted_seen) < 1e-5
    assert relative_error(grads, wanted) < 1e-5  # delayed: no scale depends on the shard


def test_microbatches_are_merged_and_equal_one_big_batch():
    """flax's fp8_ops average the amax of microbatches (2.73 in place of 3.04)."""
    low, state, run = settled()
    _, big, big_seen = run(BITWISE, state, X)
    parts = [run(BITWISE, state, X[i : i + 2]) for i in range(0, 8, 2)]
    total = jax.tree.map(lambda *g: sum(g), *(g for _, g, _ in parts))
    assert relative_error(total, big) < 1e-5
    merged = low.merge(*(seen for _, _, seen in parts))
    assert relative_error(merged, big_seen) < 1e-5
    mean = np.mean([float(seen["w"]["x"][0]) for _, _, seen in parts])
    assert mean < float(merged["w"]["x"][0])


@pytest.mark.slow
def test_microbatches_inside_the_loss():
    def loss(p, x):
        one = lambda total, part: (total + scanned(p, part), None)
        return jax.lax.scan(one, jnp.zeros(()), x.reshape(4, 2, 16))[0]

    _, state, run = settled()
    value, grads, seen = run(BITWISE, state, X)
    _, other, run = after(loss, BITWISE)
    got, got_grads, got_seen = run(BITWISE, other, X)
    assert relative_error(got, value) < 1e-5
    assert relative_error(got_grads, grads) < 1e-5
    assert relative_error(got_seen, seen) < 1e-5


@pytest.mark.slow
def test_vmap_over_examples():
    """TransformerEngine's GEMMs have no batching rule."""
    low, state, run = settled()
    values, grads, seen = jax.vmap(low.grads, (None, None, 0))(BITWISE, state, X[:, None])
    _, wanted, wanted_seen = run(BITWISE, state, X)
    assert values.shape == (8,)
    assert relative_error(jax.tree.map(lambda g: g.sum(0), grads), wanted) < 1e-5
    assert relative_error(jax.tree.map(lambda s: s.max(0), seen), wanted_seen) < 1e-5


def test_delayed_follows_numpy_for_50_steps():
    """Histories, scales, loss and weights against a simulation in float64 and ml_dtypes."""
    e4, e5 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)
    recipe = dataclasses.replace(DELAYED, history=6, margin=1, keep_head=False)
    rng = np.random.default_rng(5)
    xs = np.float32(rng.normal(size=(50, 12, 8)) * np.exp(rng.normal(size=(50, 1, 1))))
    target = np.float32(rng.normal(size=(12, 5)))
    params = {
        "a": np.float32(rng.normal(size=(8, 10)) / 3),
        "b": np.float32(rng.normal(size=(10, 5)) / 3),
    }
    loss_fn = lambda p, x: jnp.sum((jax.nn.relu(x @ p["a"]) @ p["b"] - target) ** 2) / 60
    low = training.fp8(loss_fn, recipe)
    state = low.init(params, xs[0])
    step = jax.jit(low.value_and_grad)
    mine = {n: v.astype(np.float64) for n, v in params.items()}
    past = {k: {n: [] for n in "xwg"} for k in "ab"}

    def cast(v, kind, history):
        dtype, top = kind
        known = history[:6]
        scale = max(known) * 2 / top if known else 1.0
        return np.clip(v / scale, -top, top).astype(dtype).astype(np.float64) * scale

    p = jax.tree.map(jnp.asarray, params)
    for x in xs:
        loss, grads, state = step(p, state, x)
        p = jax.tree.map(lambda v, g: v - 0.02 * g, p, grads)

        x64 = x.astype(np.float64)
        qa = cast(mine["a"], e4, past["a"]["w"])
        qx = cast(x64, e4, past["a"]["x"])
        h = np.maximum(qx @ qa, 0)
        qb, qh = cast(mine["b"], e4, past["b"]["w"]), cast(h, e4, past["b"]["x"])
        error = qh @ qb - target
        gy = error / 30
        gh = (cast(gy, e5, past["b"]["g"]) @ qb.T) * (h > 0)
        db = qh.T @ cast(gy, e5, past["b"]["g"])
        da = qx.T @ cast(gh, e5, past["a"]["g"])
        seen = {"a": (x64, mine["a"], gh), "b": (h, mine["b"], gy)}
        for key, tensors in seen.items():
            for name, tensor in zip("xwg", tensors, strict=True):
                past[key][name].insert(0, np.abs(tensor).max())
        mine = {"a": mine["a"] - 0.02 * da, "b": mine["b"] - 0.02 * db}
        assert float(loss) == pytest.approx((error**2).sum() / 60, rel=2e-3)
        for key in "ab":
            for name in "xwg":
                got = np.asarray(state.history[key][name])
                wanted = np.zeros(6)
                wanted[: len(past[key][name][:6])] = past[key][name][:6]
                np.testing.assert_allclose(got, wanted, rtol=5e-3)
    assert relative_error(p, mine) < 2e-3


def test_what_is_not_finite_enters_no_history():
    low, state, run = settled()
    bad = X.at[0, 0].set(jnp.nan)
    value, grads, seen = run(BITWISE, state, bad)
    assert not np.isfinite(value)
    assert not np.isfinite(grads["w"]).all()
    assert np.isinf(seen["w"]["x"]).all()
    after_bad = low.update(state, low.merge(seen, run(BITWISE, state, X)[2]))
    for name in ("x", "g"):
        np.testing.assert_array_equal(after_bad.history["w"][name], state.history["w"][name])
    assert int(after_bad.step) == 3
    assert np.isfinite(low.value_and_grad(BITWISE, after_bad, X)[0])


def test_gradients_have_the_structure_and_dtypes_of_the_parameters():
    params = {"w": [W[0].astype(jnp.bfloat16), {"b": jnp.zeros(16)}], "head": HEAD}

    def loss(p, x):
        y = x.astype(jnp.bfloat16) @ p["w"][0]
        return ends(jnp.tanh(y.astype(jnp.float32) + p["w"][1]["b"][None]), p["head"])

    _, state, run = after(loss, params, 1)
    _, grads, _ = run(params, state, X)
    kinds = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype.name), tree)
    assert kinds(grads) == kinds(params)
    assert cosine(grads, jax.grad(loss)(params, X)) > 0.95


def test_aux_argnums_and_keywords():
    def loss(p, x, *, gain, mode):
        assert mode == "train"
        return gain * scanned(p, x), {"mean": jnp.mean(x), "name": mode}

    low = training.fp8(loss, "rowwise", has_aux=True, argnums=(0, 1))
    kwargs = {"gain": jnp.float32(2.0), "mode": "train"}
    state = low.init(BITWISE, X, **kwargs)
    (_, aux), (dp, dx), state = low.value_and_grad(BITWISE, state, X, **kwargs)
    assert aux["name"] == "train"
    assert float(aux["mean"]) == pytest.approx(float(X.mean()))
    exact = jax.grad(lambda p, x: loss(p, x, **kwargs)[0], (0, 1))(BITWISE, X)
    assert cosine((dp, dx), exact) > 0.98
    assert int(state.step) == 1
    last = training.fp8(loss, "rowwise", has_aux=True, argnums=-1)
    assert relative_error(last.grads(BITWISE, state, X, **kwargs)[1], dx) < 1e-6


def test_plain_grad_users():
    low, state, run = settled()
    value, grads, _ = run(BITWISE, state, X)
    got, got_grads = jax.jit(jax.value_and_grad(low))(BITWISE, state, X)
    assert relative_error((got, got_grads), (value, grads)) < 1e-6


def count(jaxpr, wanted):
    """How many equations satisfy `wanted`, inner jaxprs included, and how many in loops."""
    total = inner = 0
    for eqn in jaxpr.eqns:
        total += wanted(eqn)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            sub = getattr(value, "jaxpr", value)
            if hasattr(sub, "eqns"):
                a, b = count(sub, wanted)
                total, inner = total + a, inner + (a if eqn.primitive.name == "scan" else b)
    return total, inner


def casts_of(shape):
    def wanted(eqn):
        if eqn.primitive.name != "convert_element_type":
            return False
        out = eqn.outvars[0].aval
        return out.dtype.name.startswith("float8") and out.shape == shape

    return wanted


@pytest.mark.parametrize("recipe", ["delayed", "block"])
def test_weights_are_cast_once_outside_of_loops_and_rematerialization(recipe):
    def microbatches(p, x):
        one = lambda total, part: (total + scanned_remat(p, part), None)
        return jax.lax.scan(one, jnp.zeros(()), x.reshape(4, 2, 16))[0]

    low = training.fp8(microbatches, recipe)
    state = low.init(BITWISE, X)
    jaxpr = jax.make_jaxpr(low.value_and_grad)(BITWISE, state, X).jaxpr
    assert count(jaxpr, casts_of((3, 16, 16))) == (1, 0)
    assert count(jaxpr, casts_of((16, 16))) == (0, 0)

    prepared = low.prepare(BITWISE, state)
    jaxpr = jax.make_jaxpr(low.grads)(prepared, state, X).jaxpr
    assert count(jaxpr, casts_of((3, 16, 16))) == (0, 0)
    run = jax.jit(low.grads)
    got, wanted = run(prepared, state, X), run(BITWISE, state, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_of_its_own_gradient_keeps_it():
    @jax.custom_vjp
    def special(x, w):
        return x @ w

    special.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 7.0 * jnp.ones_like(r[1]))
    )
    loss = lambda p, x: ends(layer(special(x, p["w"][0]), p["w"][1]), p["head"])
    low = training.fp8(loss, "current")
    grads = jax.jit(low.grads)(BITWISE, low.init(BITWISE, X), X)[1]
    np.testing.assert_allclose(grads["w"][0], 7.0)
    hows = [u.how for u in low.explain(BITWISE, X).uses]
    assert any("dense: custom_vjp_call has no rule" in h for h in hows)
    assert "current" in hows


def test_listing_says_what_stays_dense_and_why():
    def loss(p, ids):
        x = p["embed"][ids] + p["bias"][None, None]
        for i in range(3):
            x = jax.nn.softmax(x @ p[f"layers_{i}"]["router"]) @ p[f"layers_{i}"]["w"].T + x
        return jnp.mean((x @ p["embed"].T) ** 2)

    params = {
        "embed": jnp.ones((20, 8)),
        "bias": jnp.ones(8),
        **{f"layers_{i}": {"router": jnp.ones((8, 4)), "w": jnp.ones((8, 4))} for i in range(3)},
    }
    ids = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    nv = {u.path: u.how for u in training.fp8(loss, "nvfp4").explain(params, ids).uses}
    assert nv["layers_0/w"] == nv["layers_2/w"] == "dense: kept: a first or last layer"
    assert nv["layers_1/w"] == "nvfp4"
    assert nv["layers_1/router"] == "dense: kept: a router"
    assert "looked up" in nv["embed"]
    mixed = dataclasses.replace(
        training.RECIPES["current"],
        overrides=((".*1/w", "block"), (".*2/w", None), ("embed", "rowwise")),
    )
    uses = training.fp8(loss, mixed).explain(params, ids).uses
    how = {(u.path, u.primitive): u.how for u in uses}
    assert how["layers_0/w", "dot_general"] == "current"
    assert how["layers_1/w", "dot_general"] == "block"
    assert how["layers_2/w", "dot_general"] == "dense: override '.*2/w'"
    assert how["embed", "dot_general"] == "rowwise"
    assert how["embed", "gather"] == "dense: gather runs dense"


def test_errors_name_what_is_wrong_and_the_remedy():
    with pytest.raises(ValueError, match=r"no recipe 'delaid' \(did you mean 'delayed'\?\)"):
        training.fp8(scanned, "delaid")
    with pytest.raises(ValueError, match="no matmul of the loss function would run"):
        training.fp8(lambda p, x: jnp.sum(x * p["w"][0, :8]), "current").init(BITWISE, X)
    low, state, _ = settled()
    wider = {"w": jnp.ones((2, 16, 16)), "head": HEAD}
    with pytest.raises(ValueError, match=r"the state is of another model.*\(3, 16, 16\).*init"):
        low.grads(wider, state, X)
    with pytest.raises(ValueError, match="make one with init"):
        training.fp8(scanned, "rowwise").grads(BITWISE, state, X)
    with pytest.raises(ValueError, match="update takes what `grads` returned"):
        low.update(state, {})
    odd = dataclasses.replace(training.RECIPES["current"], overrides=(("w_typo", None),))
    with pytest.raises(ValueError, match=r"'w_typo'.*matches no parameter.*these have: w, head"):
        training.fp8(scanned, odd).init(BITWISE, X)
    cast = training.Cast("fp8_e4m3", 128, "delayed")
    with pytest.raises(ValueError, match="whole tensors"):
        training.Recipe("mine", (cast, cast), (cast, cast), (cast, cast))


def test_second_call_does_not_compile():
    low, state, _ = settled()
    step = jax.jit(low.value_and_grad)
    _, grads, state = step(BITWISE, state, X)
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, BITWISE, grads)
    step(moved, state, X)
    assert step._cache_size() == 1


@pytest.mark.usefixtures("no_tracer_leaks")
def test_no_tracer_leaks():
    low = training.fp8(scanned_remat, DELAYED)
    state = low.init(BITWISE, X)
    jax.jit(low.value_and_grad)(BITWISE, state, X)


@pytest.mark.parametrize("name", ["current", "delayed", "rowwise"])
def test_the_form_that_xla_rewrites_to_cublas_fp8(name):
    """Plain FP8 dots, all of them, with scales on the result: lowered for CUDA on a CPU."""
    low = training.fp8(own_weights, name)
    params = separate(W)
    state = low.init(params, X)
    lowered = jax.jit(low.grads).trace(params, state, X).lower(lowering_platforms=("cuda",))
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    low_dots = [d for d in dots if d.count("f8E") == 2]
    assert len(low_dots) == 3 * 3 - 1  # no gradient of the model's input is asked for
    assert all("-> tensor<" in d and d.rstrip().endswith("f32>") for d in low_dots)
    assert len(dots) - len(low_dots) == 3  # of the head


@pytest.mark.parametrize("name", ["current", "rowwise"])
def test_products_of_a_bfloat16_model_are_bfloat16(name):
    """Codes times one scale, or plain FP8 dots, that give bfloat16: a float32 product would cost a
    pass over memory. Both are forms that XLA rewrites.
    """
    low = training.fp8(own_weights, name)
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (separate(W), X))
    state = low.init(params, x)
    lowered = jax.jit(low.grads).trace(params, state, x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text().splitlines()
    dots = [line for line in text if "dot_general" in line]
    assert all(d.rstrip().endswith("bf16>") for d in dots)
    widened = [line for line in text if "convert" in line and "f8E" in line.split("->")[0]]
    if name == "rowwise":
        assert sum(d.count("f8E") == 2 for d in dots) == 3 * 3 - 1
    else:
        assert len(widened) == 2 * (3 * 3 - 1)
        assert all(line.rstrip().endswith("bf16>") for line in widened)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["delayed", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_orbax_resumes_bit_for_bit(name, tmp_path):
    tx = optax.adam(1e-2)
    low = training.fp8(scanned, name)
    step = jax.jit(low.value_and_grad)

    def run(params, moments, state, steps):
        for i in steps:
            _, grads, state = step(params, state, X + 0.01 * i)
            updates, moments = tx.update(grads, moments)
            params = optax.apply_updates(params, updates)
        return params, moments, state

    start = (BITWISE, tx.init(BITWISE), low.init(BITWISE, X))
    half = run(*start, range(4))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "step", half)
        saver.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, start)
        restored = saver.restore(tmp_path / "step", shapes)
    assert restored[2].uses == half[2].uses
    for a, b in zip(
        jax.tree.leaves(run(*restored, range(4, 8))),
        jax.tree.leaves(run(*start, range(8))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
