"""quantize_sequential against the definition: the model cut by hand at every site."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, relative_error
from jax import lax

import qjax
from qjax.algorithms.base import Algorithm


def scaling():
    """Rounds to a grid of its own, which the Hessian changes: any error in the data flow shows."""

    def quantize(w, spec, stats):
        s = jnp.sqrt(jnp.diag(stats.hessian) / jnp.maximum(stats.count, 1) + 1e-3)
        q = qjax.quantize(w * s[:, None], spec, 0)
        act = qjax.qtensor.Activation(axis=(-2,), input_scale=s)
        return qjax.qtensor.dataclasses.replace(q, activation=act), {"mean": jnp.mean(s)}

    return Algorithm("scaling", frozenset({"hessian"}), True, quantize)


RECIPE = qjax.Recipe(qjax.Rule(".*", "int4_g4", scaling()))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_hand(w, *xs):
    """A weight [in, out] quantized for inputs xs, and dequantized."""
    x = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in xs])
    stats = qjax.Stats(hessian=jnp.asarray(x.T @ x), count=jnp.float32(len(x)))
    return qjax.dequantize(scaling().quantize(w, qjax.Spec.parse("int4_g4"), stats)[0])


def close(got, wanted):
    assert relative_error(got, wanted) < 1e-5


def test_each_weight_sees_what_the_quantized_part_makes():
    def fn(p, x):
        h = jnp.tanh(x @ p["q"]) + jax.nn.silu(x @ p["k"])
        return (h @ p["o"]) @ p["d"]

    p = {n: normal(i, 8, 8) for i, n in enumerate("qkod")}
    xs = [normal(9, 5, 8), normal(10, 3, 8), normal(11, 5, 8)]
    got = dense(qjax.quantize_sequential(fn, p, xs, RECIPE))
    q, k = by_hand(p["q"], *xs), by_hand(p["k"], *xs)
    hs = [jnp.tanh(x @ q) + jax.nn.silu(x @ k) for x in xs]
    o = by_hand(p["o"], *hs)
    close(got, {"q": q, "k": k, "o": o, "d": by_hand(p["d"], *[h @ o for h in hs])})


def test_packed_bits_of_weights_with_one_input_are_cut_apart():
    """12 and 4 outputs side by side: the cut is inside of a byte of one-bit planes."""
    fn = lambda p, x: jnp.sum(x @ p["q"]) + jnp.sum(x @ p["k"])
    p, x = {"q": normal(0, 8, 12), "k": normal(1, 8, 4)}, normal(2, 32, 8)
    recipe = qjax.Recipe(qjax.Rule(".*", "int3_g4", qjax.gptq()))
    got = qjax.quantize_sequential(fn, p, [x], recipe)
    stats = qjax.Stats(hessian=x.T @ x)
    for name, w in p.items():
        alone, _ = qjax.gptq().quantize(w, qjax.Spec.parse("int3_g4"), stats)
        np.testing.assert_array_equal(qjax.dequantize(got[name]), qjax.dequantize(alone))


def test_batches_that_would_hold_too_much_stay_and_run_again(monkeypatch):
    fn = lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]) @ p["d"]
    shapes = {"a": (8, 8), "b": (8, 32), "c": (32, 8), "d": (8, 8)}
    p = {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
    xs = [normal(9, 5, 8), normal(10, 3, 8)]
    monkeypatch.setattr("qjax.sequential._SPARE_PART", 1e9)  # of parameters this small
    wanted = qjax.quantize_sequential(fn, p, xs, RECIPE)
    monkeypatch.setattr("qjax.sequential._SPARE", 0)
    got = qjax.quantize_sequential(fn, p, xs, RECIPE)
    jax.tree.map(np.testing.assert_array_equal, dense(got), dense(wanted))


def test_of_an_input_and_its_norm_only_the_input_is_kept():
    def fn(p, x):
        for w in (p["a"], p["b"], p["c"]):
            mean = jnp.mean(x * x, axis=-1, keepdims=True)
            x = x + (x * lax.rsqrt(mean + 1e-6)) @ w
        return x

    p = {n: normal(i, 8, 8) for i, n in enumerate("abc")}
    xs, counts = [normal(9 + i, 7, 8) for i in range(3)], []

    def progress(visits):
        for visit in visits:
            counts.append(sum(v.shape == (7, 8) for v in jax.live_arrays()))
            yield visit

    qjax.quantize_sequential(fn, p, xs, RECIPE, progress=progress)
    before = counts[0]  # the batches
    # each batch rests before the norm of the site that was done last
    assert counts == [before, before, before + len(xs)]


@pytest.mark.parametrize("cast", [False, True])
def test_layers_of_a_scan_are_unrolled(cast):
    def fn(p, x):
        if cast:
            p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)

        def layer(h, w):
            return h + jnp.tanh(h @ w["up"] + w["bias"][None]) @ w["down"].T, None

        return lax.scan(jax.checkpoint(layer), x, p)[0]

    p = {"up": normal(0, 3, 8, 12), "down": normal(1, 3, 8, 12), "bias": normal(2, 3, 12)}
    if cast:
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
    x = normal(3, 6, 8)
    recipe = qjax.Recipe(qjax.Rule("bias", None), *RECIPE.rules)
    q = qjax.quantize_sequential(fn, p, [x], recipe)
    got, h = dense(q), x
    for i in range(3):
        up = by_hand(p["up"][i], h)
        middle = jnp.tanh(h @ up + p["bias"][i][None])
        down = by_hand(p["down"][i].T, middle)
        close((got["up"][i], got["down"][i]), (up, down.T))
        h = h + middle @ down
    close(jax.jit(qjax.quantized(fn))(q, x), h)


def test_a_weight_used_twice_is_quantized_at_its_last_use():
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["w"]
    p, x = {"w": normal(0, 8, 8), "v": normal(1, 8, 8)}, normal(2, 5, 8)
    got = dense(qjax.quantize_sequential(fn, p, [x], RECIPE))
    h = jnp.tanh(x @ p["w"])
    v = by_hand(p["v"], h)
    close(got, {"v": v, "w": by_hand(p["w"], x, jnp.tanh(h @ v))})


@pytest.mark.slow
def test_tied_tables_and_what_needs_no_statistics():
    def fn(p, ids):
        x = jnp.take(p["table"], ids, axis=0)
        return jnp.tanh(x @ p["w"]) @ p["table"].T

    p, ids = {"table": normal(0, 20, 8), "w": normal(1, 8, 8)}, jnp.arange(6).reshape(2, 3)
    recipe = qjax.Recipe(qjax.Rule("w", "int8"), *RECIPE.rules)
    got = dense(qjax.quantize_sequential(fn, p, [ids], recipe))
    w = qjax.dequantize(qjax.quantize(p["w"], "int8", 0))
    table = by_hand(p["table"].T, jnp.tanh(p["table"][ids] @ w)).T
    close(got, {"w": w, "table": table})


LOOPS = {
    "a constant of a scan": lambda w, x: lax.scan(
        lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3
    )[0],
    "while": lambda w, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x),
    "cond": lambda w, x: lax.cond(
        x[0, 0] < 1e9, lambda x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w), lambda x: x, x
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_inside_loops_weights_are_observed_whole(name):
    fn = lambda p, x: LOOPS[name](p["w"], x) @ p["v"]
    p, x = {"w": normal(0, 8, 8), "v": normal(1, 8, 8)}, normal(2, 5, 8)
    got = dense(qjax.quantize_sequential(fn, p, [x], RECIPE))
    one = jnp.tanh(x @ p["w"])
    w = by_hand(p["w"], x, one, jnp.tanh(one @ p["w"]))
    close(got, {"w": w, "v": by_hand(p["v"], LOOPS[name](w, x))})


@pytest.mark.slow
def test_experts_and_convolutions():
    sizes = jnp.array([3, 0, 5], jnp.int32)

    def fn(p, x):
        h = lax.conv_general_dilated(
            x[None], p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return lax.ragged_dot(h[0], p["experts"], sizes)

    p, x = {"conv": normal(0, 2, 8, 8), "experts": normal(1, 3, 8, 4)}, normal(2, 8, 8)
    seen = []
    q = qjax.quantize_sequential(fn, p, [x], RECIPE, min_tokens=4, log=seen.append)
    padded = np.concatenate([np.asarray(x), np.zeros((1, 8))])
    patches = np.stack([padded[i : i + 2].reshape(-1) for i in range(8)]).astype(np.float32)
    conv = by_hand(p["conv"].reshape(16, 8), patches)
    close(qjax.dequantize(q["conv"]).reshape(16, 8), conv)
    close(qjax.dequantize(q["experts"])[2], by_hand(p["experts"][2], (patches @ conv)[3:]))
    assert [s.few for s in seen] == [0, 2]
    assert [s.tokens for s in seen] == [8, 8]
    assert "2 experts with too few tokens" in str(seen[1])


@pytest.mark.slow
def test_gptq_on_padded_batches_of_two_shapes_with_a_mask():
    def fn(p, ids):
        x = jnp.take(p["table"], ids, axis=0)
        scores = jnp.einsum("bsd,btd->bst", x @ p["q"], x @ p["k"])
        scores = jnp.where((ids != 0)[:, None, :], scores, -1e9)
        return (x + jax.nn.softmax(scores) @ x @ p["o"]) @ p["table"].T

    p = {n: normal(i, 8, 8) for i, n in enumerate("qko")} | {"table": normal(4, 20, 8)}
    recipe = qjax.Recipe(qjax.Rule("table", None), qjax.Rule(".*", "int4_g4", qjax.gptq()))
    ids = jnp.array([[3, 4, 5, 6, 0, 0], [7, 8, 0, 0, 0, 0]])
    mask = lambda ids: ids != 0
    got = qjax.quantize_sequential(fn, p, [ids], recipe, mask=mask)
    wanted = qjax.quantize_sequential(fn, p, [ids[:1, :4], ids[1:, :2]], recipe)
    close(dense(got), dense(wanted))


def deep(layers):
    def fn(p, x):
        for w in p:
            x = x + jnp.tanh(x @ w["a"]) @ w["b"]
        return x

    return fn, [{n: normal(2 * i + j, 8, 8) for j, n in enumerate("ab")} for i in range(layers)]


class KilledError(Exception):
    """Stands for a signal."""


def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(tmp_path):
    fn, p = deep(5)
    xs = [normal(90 + i, 4, 8) for i in range(2)]
    recipe = qjax.Recipe(qjax.Rule(".*", "int4_g4", qjax.gptq(act_order="dynamic")))
    whole = qjax.quantize_sequential(fn, p, xs, recipe)
    rng = np.random.default_rng(0)
    for trial in range(3):
        folder, count = tmp_path / str(trial), int(rng.integers(1, 10))

        def stop(entry, left=[count]):  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise KilledError

        with pytest.raises(KilledError):
            qjax.quantize_sequential(fn, p, xs, recipe, folder, log=stop)
        seen = []
        again = qjax.quantize_sequential(fn, p, xs, recipe, folder, log=seen.append)
        assert len(seen) == 10 - count
        assert jax.tree.structure(again) == jax.tree.structure(whole)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b)


CHILD = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np, qjax
from test_sequential import deep, normal
fn, p = deep(12)
xs = [normal(90 + i, 64, 8) for i in range(2)]
recipe = qjax.Recipe(qjax.Rule(".*", "int4_g4", qjax.gptq(act_order="dynamic")))
q = qjax.quantize_sequential(fn, p, xs, recipe, sys.argv[1], log=lambda e: print(e, flush=True))
np.savez(sys.argv[2], *[np.asarray(v).astype(np.float32) for v in jax.tree.leaves(q)])
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments_by_the_system(tmp_path):
    def start(folder):
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path / folder),
            str(tmp_path / folder) + ".npz",
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    child = start("whole")
    child.stdout.readline()
    begin = time.perf_counter()  # the first site is done
    child.communicate()
    a_site = (time.perf_counter() - begin) / 24
    wanted, rng, cut = np.load(tmp_path / "whole.npz"), np.random.default_rng(0), set()
    for trial in range(20):
        folder = f"run{trial}"
        child = start(folder)
        for _ in range(rng.integers(1, 23)):
            child.stdout.readline()  # a site is done
        time.sleep(rng.uniform(0, a_site))
        child.kill()
        child.communicate()
        cut.add(len(list((tmp_path / folder).glob("[0-9]*"))))
        start(folder).communicate()
        got = np.load(tmp_path / f"{folder}.npz")
        assert all(np.array_equal(got[n], wanted[n]) for n in wanted.files)
    assert len(cut) > 5  # it was killed in different places


def test_a_run_on_other_batches_is_refused(tmp_path):
    fn, p = deep(1)
    xs, recipe = [normal(0, 4, 8)], RECIPE
    qjax.quantize_sequential(fn, p, xs, recipe, tmp_path)
    assert set(json.loads((tmp_path / "run.json").read_text())) == {
        "batches",
        "parameters",
        "recipe",
    }
    with pytest.raises(ValueError, match=r"holds a run with other batches; give the same"):
        qjax.quantize_sequential(fn, p, [xs[0].at[0, 0].add(1)], recipe, tmp_path)
    with pytest.raises(ValueError, match="with other parameters"):
        qjax.quantize_sequential(fn, jax.tree.map(lambda w: w + 1, p), xs, recipe, tmp_path)
    other = qjax.Recipe(qjax.Rule(".*", "int8", scaling()))
    with pytest.raises(ValueError, match="with other recipe"):
        qjax.quantize_sequential(fn, p, xs, other, tmp_path)


def test_errors_say_what_to_do():
    fn, p = deep(1)
    with pytest.raises(ValueError, match=r"can be iterated only once.*list\(batches\)"):
        qjax.quantize_sequential(fn, p, iter([normal(0, 4, 8)]), RECIPE)
    with pytest.raises(ValueError, match="there are no batches"):
        qjax.quantize_sequential(fn, p, [], RECIPE)
    with pytest.raises(ValueError, match=r"does not take a batch of float32\[4, 9\]"):
        qjax.quantize_sequential(fn, p, [normal(0, 4, 9)], RECIPE)
    with pytest.raises(ValueError, match=r"^0/a: the hessian of its input is not finite"):
        qjax.quantize_sequential(fn, p, [normal(0, 4, 8).at[0, 0].set(jnp.nan)], RECIPE)


@pytest.mark.slow
def test_equal_layers_compile_once():
    """What lowers does not grow with the number of layers."""
    counts = []
    for layers in (2, 5):
        fn, p = deep(layers)
        with _counting() as seen:
            qjax.quantize_sequential(fn, p, [normal(0, 4, 8)], RECIPE)
        counts.append(len(seen))
    assert 0 < counts[1] <= counts[0] + 1


class _counting:
    """Counts what XLA compiles."""

    def __enter__(self):
        self.seen = []
        self.on = True
        listen = lambda name, *_, **__: (
            self.seen.append(name) if self.on and "backend_compile" in name else None
        )
        jax.monitoring.register_event_duration_secs_listener(listen)
        return self.seen

    def __exit__(self, *_):
        self.on = False
