"""calibrate: statistics of every kind of site against float64 sums over tokens kept by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import qjax
from qjax.algorithms.base import Algorithm

FIELDS = frozenset({"hessian", "mean_abs", "max_abs", "second_moment"})
SAMPLES = FIELDS | {"samples"}


def algorithm(needs=FIELDS, joint=True):
    """Rounds to nearest, after asking for statistics."""

    def quantize(w, spec, stats):
        assert all(getattr(stats, n) is not None for n in needs)
        return qjax.quantize(w, spec, 0), {}

    return Algorithm("listener", frozenset(needs), joint, quantize)


def recipe(pattern=".*", needs=FIELDS):
    return qjax.Recipe(
        qjax.Rule(pattern, "int8", algorithm(needs)), qjax.Rule(".*", None, optional=True)
    )


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def wanted(x):
    """Statistics of tokens x [tokens, in], in float64."""
    x = np.asarray(x, np.float64)
    samples = np.zeros((512, x.shape[1]))
    samples[: min(len(x), 512)] = x[:512]
    return {
        "hessian": x.T @ x,
        "mean_abs": np.abs(x).sum(0) / max(len(x), 1),
        "max_abs": np.abs(x).max(0, initial=0),
        "second_moment": (x**2).sum(0) / max(len(x), 1),
        "samples": samples,
        "count": np.float64(len(x)),
    }


def check(stats, *tokens):
    """Compares Stats with those of `tokens`, nested lists of arrays for leading axes."""

    def at(index, tokens):
        if isinstance(tokens, list):
            for i, part in enumerate(tokens):
                at((*index, i), part)
            return
        for name, value in wanted(tokens).items():
            if getattr(stats, name) is None:
                assert name == "samples"
                continue
            found = np.asarray(getattr(stats, name), np.float64)[index]
            np.testing.assert_allclose(found, value, rtol=2e-6, atol=2e-5, err_msg=name)

    (tokens,) = tokens
    at((), tokens)


def flat(x, size):
    return np.asarray(x).reshape(-1, size)


def test_plain_matmuls_share_one_object_and_batches_add_up():
    def fn(p, x):
        h = jnp.tanh(x @ p["q"]) + x.astype(jnp.float32) @ p["k"]
        return h @ p["o"]

    p = {"q": normal(0, 6, 4), "k": normal(1, 6, 4), "o": normal(2, 4, 5)}
    batches = [normal(3, 2, 3, 6), normal(4, 1, 3, 6), normal(5, 2, 3, 6)]
    stats = qjax.calibrate(fn, p, batches, recipe())
    check(stats["q"], np.concatenate([flat(b, 6) for b in batches]))
    assert stats["q"] is stats["k"]
    hidden = [np.tanh(b @ p["q"]) + b @ p["k"] for b in batches]
    check(stats["o"], np.concatenate([flat(h, 4) for h in hidden]))
    h = np.asarray(stats["q"].hessian)
    np.testing.assert_array_equal(h, h.T)


USES = {
    "several contracted axes": (
        lambda p, x: jnp.einsum("bshk,hkd->bsd", x, p["w"]),
        (2, 3, 5),
        (2, 4, 2, 3),
        lambda x: flat(x, 6),
    ),
    "the weight is transposed": (lambda p, x: x @ p["w"].T, (5, 6), (3, 6), lambda x: x),
    "the weight comes first": (lambda p, x: p["w"] @ x, (5, 6), (6, 3), lambda x: x.T),
    "contracted axes in another order": (
        lambda p, x: jnp.einsum("bkh,hkd->bd", x, p["w"]),
        (2, 3, 5),
        (4, 3, 2),
        lambda x: flat(np.swapaxes(x, 1, 2), 6),
    ),
    "merged in another order": (
        lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(6, 5),
        (2, 3, 5),
        (4, 6),
        lambda x: flat(np.swapaxes(x.reshape(4, 3, 2), 1, 2), 6),
    ),
    "two slices of the contracted axis": (
        lambda p, x: (x[:, :2] @ p["w"][:2]) * (x[:, 2:] @ p["w"][2:]),
        (6, 5),
        (4, 6),
        lambda x: np.concatenate(
            [np.pad(x[:, :2], [(0, 0), (0, 4)]), np.pad(x[:, 2:], [(0, 0), (2, 0)])]
        ),
    ),
    "used twice": (
        lambda p, x: jnp.tanh(x) @ p["w"] + x @ p["w"],
        (6, 5),
        (4, 6),
        lambda x: np.concatenate([np.tanh(x), x]),
    ),
    "a convolution": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (2, 3, 5),
        (1, 4, 3),
        lambda x: np.stack([x[0, i : i + 2].reshape(-1) for i in range(3)]),
    ),
    "under jit and remat": (
        lambda p, x: jax.checkpoint(jax.jit(lambda w, x: x @ w))(p["w"], x),
        (6, 5),
        (4, 6),
        lambda x: x,
    ),
    "a constant of a scan": (
        lambda p, x: lax.scan(lambda c, x: (c, x @ p["w"]), 0.0, x)[1],
        (6, 5),
        (3, 4, 6),
        lambda x: flat(x, 6),
    ),
    "inside while": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x),
        (6, 6),
        (4, 6),
        None,
    ),
    "inside cond": (
        lambda p, x: lax.cond(x[0, 0] > 1e9, lambda x: x, lambda x: x @ p["w"], x),
        (6, 6),
        (4, 6),
        lambda x: x,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_uses(name, no_tracer_leaks):
    fn, shape, x_shape, tokens = USES[name]
    p, x = {"w": normal(0, *shape) / 2}, normal(1, *x_shape)
    (stats,) = qjax.calibrate(fn, p, [x], recipe()).values()
    if tokens is None:
        steps = [np.asarray(x)]
        for _ in range(2):
            steps.append(np.tanh(steps[-1] @ np.asarray(p["w"])))
        check(stats, np.concatenate(steps))
    else:
        check(stats, tokens(np.asarray(x)))


def test_scanned_layers_and_experts_stand_in_front():
    def fn(p, x):
        def layer(h, w):
            return jnp.tanh(jnp.einsum("ebd,edf->ebf", h, w)), None

        return lax.scan(layer, x, p["w"])[0]

    p, x = {"w": normal(0, 2, 3, 4, 4)}, normal(1, 3, 5, 4)
    (stats,) = qjax.calibrate(fn, p, [x], recipe()).values()
    hidden = np.tanh(np.einsum("ebd,edf->ebf", x, p["w"][0]))
    check(stats, [list(np.asarray(x)), list(hidden)])


def test_nested_scans_sum_what_the_inner_one_repeats():
    def fn(p, x):
        def outer(h, w):
            return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=2)[0], None

        return lax.scan(outer, x, p["w"])[0]

    p, x = {"w": normal(0, 3, 4, 4)}, normal(1, 5, 4)
    (stats,) = qjax.calibrate(fn, p, [x], recipe()).values()
    h, seen = np.asarray(x), []
    for w in np.asarray(p["w"]):
        steps = [h, np.tanh(h @ w)]
        h = np.tanh(steps[1] @ w)
        seen.append(np.concatenate(steps))
    check(stats, seen)


def test_empty_slots_of_an_experts_capacity_are_no_tokens():
    x = normal(0, 2, 4, 3).at[0, 2:].set(0).at[1, 1].set(0)
    fn = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"])
    (stats,) = qjax.calibrate(fn, {"w": normal(1, 2, 3, 5)}, [x], recipe()).values()
    assert stats.count.tolist() == [2, 3]
    check(stats, [np.asarray(x[0, :2]), np.asarray(x[1])[[0, 2, 3]]])


@pytest.mark.parametrize("masked", [False, True])
def test_experts_of_a_ragged_dot_see_their_own_tokens(masked):
    sizes = jnp.array([2, 0, 900, 3], jnp.int32)
    x = normal(0, 905, 4)
    keep = np.ones(905, bool)
    keep[[0, 5, 700, 904]] = not masked
    mask = (lambda x: jnp.asarray(keep)) if masked else None
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)
    (stats,) = qjax.calibrate(
        fn, {"w": normal(1, 4, 4, 5)}, [x], recipe(needs=SAMPLES), mask=mask
    ).values()
    starts = np.cumsum([0, 2, 0, 900, 3])
    parts = [slice(a, b) for a, b in itertools.pairwise(starts)]
    check(stats, [np.asarray(x)[s][keep[s]] for s in parts])


def test_large_hessians_skip_blocks_above_the_diagonal():
    """Four blocks, the last of 372 features."""
    x = normal(0, 3, 2100)
    (stats,) = qjax.calibrate(
        lambda p, x: x @ p["w"], {"w": normal(1, 2100, 2)}, [x], recipe(needs={"hessian"})
    ).values()
    np.testing.assert_allclose(stats.hessian, x.T @ x, rtol=1e-5, atol=1e-5)


def test_padding_is_followed_through_attention_lookups_and_experts():
    """A routed two-layer transformer: what padded tokens hold changes no statistic."""

    def fn(p, ids):
        x = jnp.take(p["table"], ids, axis=0)
        q, k, v = (x @ p[n] for n in "qkv")
        scores = jnp.einsum("bsd,btd->bst", q, k)
        scores = jnp.where((ids != 0)[:, None, :], scores, -1e9)
        x = x + jax.nn.softmax(scores) @ v @ p["o"]
        rows = x.reshape(-1, 8)
        expert = jnp.argmax(rows @ p["router"], -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=3).astype(jnp.int32)
        out = lax.ragged_dot(jnp.take(rows, order, axis=0), p["up"], sizes)
        out = lax.ragged_dot(jax.nn.silu(out), p["down"], sizes)
        return x + jnp.take(out, jnp.argsort(order), axis=0).reshape(x.shape)

    p = {n: normal(i, 8, 8) / 3 for i, n in enumerate("qkvo")}
    p |= {"table": normal(5, 20, 8), "router": normal(6, 8, 3)}
    p |= {"up": normal(7, 3, 8, 6), "down": normal(8, 3, 6, 8)}
    ids = jnp.array([[3, 4, 5, 6, 0, 0], [7, 8, 0, 0, 0, 0]])
    listen = qjax.Recipe(qjax.Rule("table", None), qjax.Rule(".*", "int8", algorithm(FIELDS)))
    found = qjax.calibrate(fn, p, [ids], listen, mask=lambda ids: ids != 0)
    alone = [ids[:1, :4], ids[1:, :2]]
    expected = qjax.calibrate(fn, p, alone, listen)
    for path, stats in found.items():
        assert float(stats.count.sum()) == 6
        for name in ("hessian", "mean_abs", "max_abs", "second_moment", "count"):
            got, want = getattr(stats, name), getattr(expected[path], name)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=f"{path} {name}")


def test_a_mask_follows_a_scan_over_layers():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    p, x = {"w": normal(0, 2, 4, 4)}, normal(1, 2, 3, 4)
    keep = np.array([[True, True, False], [True, False, False]])
    stats = qjax.calibrate(fn, p, [x], recipe(), mask=lambda x: jnp.asarray(keep))["w"]
    hidden = np.tanh(np.asarray(x) @ np.asarray(p["w"][0]))
    check(stats, [np.asarray(x)[keep], hidden[keep]])


def test_merge_is_one_run():
    fn, p = lambda p, x: x @ p["w"], {"w": normal(0, 6, 5)}
    xs = [normal(i, 4, 6) for i in range(3)]
    parts = [qjax.calibrate(fn, p, xs[:1], recipe(needs=SAMPLES))]
    parts.append(qjax.calibrate(fn, p, xs[1:], recipe(needs=SAMPLES)))
    check(qjax.merge_stats(*parts)["w"], np.concatenate(xs))


def test_arguments_by_name_and_python_values():
    def fn(p, x, *, scale, train):
        assert train is False
        return (x * scale) @ p["w"]

    p, x = {"w": normal(0, 6, 5)}, normal(1, 4, 6)
    batches = [qjax.Args(x, scale=jnp.float32(2), train=False)]
    check(qjax.calibrate(fn, p, batches, recipe())["w"], 2 * np.asarray(x))


def test_shapes_compile_once_each():
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    p = {"w": normal(0, 6, 5)}
    once = [normal(0, 4, 6), normal(1, 2, 6)]
    qjax.calibrate(fn, p, once, recipe())
    count = len(traces)
    traces.clear()
    qjax.calibrate(fn, p, once * 5, recipe())
    assert len(traces) == count


def test_quantized_parameters_run_on_their_codes():
    fn = lambda p, x: (x @ p["a"]) @ p["b"]
    p, x = {"a": normal(0, 6, 5), "b": normal(1, 5, 4)}, normal(2, 3, 6)
    p["a"] = qjax.quantize(p["a"], "int4", 0)
    listen = qjax.Recipe(qjax.Rule("a", None), qjax.Rule("b", "int8", algorithm()))
    stats = qjax.calibrate(fn, p, [x], listen)
    check(stats["b"], np.asarray(x @ qjax.dequantize(p["a"])))


def test_sharded_batches():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    p, x = {"w": normal(0, 6, 5)}, normal(1, 8, 3, 6)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    stats = qjax.calibrate(lambda p, x: x @ p["w"], p, [jax.device_put(x, where)], recipe())
    check(stats["w"], flat(x, 6))


@pytest.mark.parametrize("checked", [True, False])
def test_inside_shard_map(checked):
    mesh = jax.make_mesh((2, 2), ("data", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run = jax.shard_map(
        lambda w, x: x @ w,
        mesh=mesh,
        in_specs=(P(None, "out"), P("data")),
        out_specs=P("data", "out"),
        check_vma=checked,
    )
    x, keep = normal(1, 8, 6), np.arange(8) % 3 > 0
    mask = lambda x: jnp.asarray(keep)
    fn = lambda p, x: run(p["w"], x)
    stats = qjax.calibrate(fn, {"w": normal(0, 6, 4)}, [x], recipe(), mask=mask)["w"]
    times = 2  # each replica counts
    np.testing.assert_allclose(stats.hessian, times * x[keep].T @ x[keep], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.mean_abs, np.abs(x[keep]).mean(0), rtol=1e-5)
    assert float(stats.count) == times * keep.sum()


def test_features_cut_by_a_shard_map_are_refused():
    mesh = jax.make_mesh((2,), ("in",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "in"),
        mesh=mesh,
        in_specs=(P("in"), P(None, "in")),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"^w: a matmul contracts 3 of the 6 features"):
        qjax.calibrate(
            lambda p, x: run(p["w"], x), {"w": normal(0, 6, 4)}, [normal(1, 8, 6)], recipe()
        )


# --- what a user gets wrong


def test_errors_say_what_to_do():
    fn, p, x = (lambda p, x: x @ p["w"]), {"w": normal(0, 6, 5)}, normal(1, 4, 6)
    with pytest.raises(ValueError, match="there are no batches"):
        qjax.calibrate(fn, p, [], recipe())
    with pytest.raises(ValueError, match=r"does not take a batch of float32\[4, 7\]"):
        qjax.calibrate(fn, p, [normal(1, 4, 7)], recipe())
    with pytest.raises(ValueError, match=r"no rule of the recipe.*needs no calibration"):
        qjax.calibrate(fn, p, [x], "int8")
    with pytest.raises(ValueError, match=r"the mask is bool of shape \(3,\)"):
        qjax.calibrate(fn, p, [x], recipe(), mask=lambda x: jnp.ones(3, bool))


def test_missing_and_unusable_stats_say_what_to_do():
    fn, p, x = (lambda p, x: x @ p["w"]), {"w": normal(0, 6, 5)}, normal(1, 4, 6)
    sites = qjax.find_sites(fn, p, x)
    with pytest.raises(ValueError, match=r"^w: listener needs .*hessian.*qjax\.calibrate\("):
        qjax.quantize_params(p, recipe(), sites)
    half = qjax.calibrate(fn, p, [x], recipe(needs={"max_abs"}))
    with pytest.raises(ValueError, match=r"^w: .*its Stats have no hessian"):
        qjax.quantize_params(p, recipe(), sites, half)
    bad = qjax.calibrate(fn, p, [x.at[1, 2].set(jnp.nan)], recipe(needs={"max_abs"}))
    with pytest.raises(ValueError, match=r"^w: the max_abs of its input is not finite"):
        qjax.quantize_params(p, recipe(needs={"max_abs"}), sites, bad)
    none = qjax.calibrate(fn, p, [x], recipe(), mask=lambda x: jnp.zeros(4, bool))
    with pytest.raises(ValueError, match=r"^w: calibration saw no tokens"):
        qjax.quantize_params(p, recipe(), sites, none)
    wide, x = {"w": normal(0, 7, 5)}, normal(0, 4, 7)
    full, sites = qjax.calibrate(fn, wide, [x], recipe()), qjax.find_sites(fn, wide, x)
    assert qjax.is_qtensor(qjax.quantize_params(wide, recipe(), sites, full)["w"])
    with pytest.raises(ValueError, match=r"^w: the hessian of its Stats has shape \(7, 7\)"):
        qjax.quantize_params(p, recipe(), qjax.find_sites(fn, p, normal(1, 4, 6)), full)
