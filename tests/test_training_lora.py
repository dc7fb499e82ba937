"""Adapters beside numpy: what they add, what trains, what stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense, relative_error
from jax import lax

import qjax
from qjax import models, training

KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (6, 32))


def filled(adapters):
    """Adapters as after some training: b is not zero."""
    leaves = enumerate(adapters.items())
    fill = lambda i, b: jax.random.normal(jax.random.fold_in(KEYS[1], i), b.shape) / 8
    return {path: dataclasses.replace(v, b=fill(i, v.b)) for i, (path, v) in leaves}


def quantized_with_adapters(fn, params, *args, spec="int8", rank=2, alpha=3.0):
    sites = qjax.find_sites(fn, params, *args)
    q = qjax.quantize_params(params, spec, sites)
    return q, filled(training.lora_init(KEYS[2], q, sites, rank, alpha))


def merged(q, adapters):
    """W + alpha / rank * A @ B in float64."""
    tree = jax.tree.map(lambda v: np.asarray(v, np.float64), dense(q))
    for path, v in adapters.items():
        a, b = np.asarray(v.a, np.float64), np.asarray(v.b, np.float64)
        tree[path] = tree[path] + 1.5 * np.einsum("...ir,...ro->...io", a, b)
    return jax.tree.map(jnp.float32, tree)


CASES = {
    "plain": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], {"w": (32, 16), "v": (16, 8)}),
    "weight first": (lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), {"w": (32, 16)}),
    "layers of a scan": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
        {"w": (3, 32, 32)},
    ),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 4], jnp.int32)),
        {"w": (3, 32, 8)},
    ),
    "parallel": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x.reshape(3, 2, 32), p["w"]),
        {"w": (3, 32, 8)},
    ),
    "transposed": (lambda p, x: x @ p["w"].T @ p["w"], {"w": (16, 32)}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_that_of_the_merged_weights(name):
    fn, shapes = CASES[name]
    params = {n: jax.random.normal(KEYS[3], s) / 6 for n, s in shapes.items()}
    if name == "transposed":  # contracted along either axis: the adapter is one for both
        sites = qjax.find_sites(fn, params, X)
        q = {"w": qjax.quantize(params["w"], "int8", 0)}
        adapters = filled(training.lora_init(KEYS[2], q, {"w": sites["w"][1:]}, 2, 3.0))
    else:
        q, adapters = quantized_with_adapters(fn, params, X)
    got = jax.jit(training.lora(fn))(q, adapters, X)
    # float32 sums of 32 products in another order
    assert relative_error(got, fn(merged(q, adapters), X)) < 1e-5
    assert relative_error(fn(training.lora_merge(q, adapters), X), got) < 1e-5


def test_adapters_train_and_the_base_stays():
    fn = CASES["layers of a scan"][0]
    q, adapters = quantized_with_adapters(fn, {"w": jax.random.normal(KEYS[3], (3, 32, 32)) / 6}, X)
    loss = lambda q, adapters, x: jnp.sum(training.lora(fn)(q, adapters, x) ** 2)
    grads, dx = jax.jit(jax.grad(loss, (1, 2)))(q, adapters, X)
    plain = lambda a, b, x: jnp.sum(
        fn({"w": dense(q)["w"] + 1.5 * jnp.einsum("lir,lro->lio", a, b)}, x) ** 2
    )
    wanted = jax.grad(plain, (0, 1, 2))(adapters["w"].a, adapters["w"].b, X)
    assert relative_error((grads["w"].a, grads["w"].b, dx), wanted) < 1e-4
    assert qjax.is_qtensor(q["w"])


@pytest.mark.parametrize("name", ["plain", "layers of a scan", "experts"])
def test_the_backward_pass_keeps_codes(name):
    """Nothing as large as a dequantized weight waits for it, of all layers or of one."""
    fn, shapes = CASES[name]
    params = {n: jax.random.normal(KEYS[3], s) / 6 for n, s in shapes.items()}
    q, adapters = quantized_with_adapters(fn, params, X, spec="nf4_g16")

    def held(tree):
        _, pullback = jax.vjp(lambda a, x: training.lora(fn)(tree, a, x), adapters, X)
        floats = [v for v in jax.tree.leaves(pullback) if jnp.issubdtype(v.dtype, jnp.floating)]
        return {v.shape for v in floats if v.ndim > 1} & {*shapes.values()}

    assert held(dense(q)) == {*shapes.values()}
    assert not held(q)


def test_dropout_by_key():
    """Without a key none; with one, another mask for every layer; unbiased over keys."""
    fn = lambda p, x: lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]
    params = {"w": jnp.zeros((2, 32, 4))}
    sites = qjax.find_sites(fn, params, X)
    adapters = filled(training.lora_init(KEYS[2], params, sites, 4))
    one = dataclasses.replace(
        adapters["w"], a=adapters["w"].a[:1].repeat(2, 0), b=adapters["w"].b[:1].repeat(2, 0)
    )
    run = training.lora(fn, dropout=0.5)
    off = run(params, {"w": one}, X)
    np.testing.assert_array_equal(off[0], off[1])
    np.testing.assert_array_equal(off, training.lora(fn)(params, {"w": one}, X))
    draw = jax.jit(jax.vmap(lambda k: run(params, {"w": one}, X, dropout_key=k)))
    draws = np.asarray(draw(jax.random.split(KEYS[4], 2000)), np.float64)
    assert np.all(np.abs(draws[0, 0] - draws[0, 1]) > 0)
    again = run(params, {"w": one}, X, dropout_key=jax.random.split(KEYS[4], 2000)[0])
    assert relative_error(draws[0], again) < 1e-5
    bound = 5 * draws.std(0) / np.sqrt(2000)  # five standard errors
    assert np.all(np.abs(draws.mean(0) - off) < bound + 1e-6)


def test_a_decoder_unmodified():
    """Every projection has an adapter, table and router have none; one step lowers the loss."""
    kinds = {"dense": {}, "experts": {"num_experts": 2, "experts_per_token": 1}}
    tokens = jax.random.randint(KEYS[5], (2, 9), 0, 64)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for kind, options in kinds.items():
            model = models.Decoder(models.Config(64, 32, 32, 2, 2, 2, 16, scan=True, **options))
            params = jax.eval_shape(model.init, KEYS[6], tokens)
            sites = qjax.find_sites(model.apply, params, tokens)
            names = {n.removeprefix("params/layers/block/") for n in sites}
            adapted = {
                n.removeprefix("params/layers/block/")
                for n in training.lora_init(KEYS[2], params, sites, 4)
            }
            left = {"params/embed/embedding"} | ({"mlp/router/kernel"} if options else set())
            assert names - adapted == left, kind
        model = models.Decoder(models.Config(64, 32, 32, 2, 2, 2, 16, scan=True))
        params = jax.jit(model.init)(KEYS[6], tokens)
        sites = qjax.find_sites(model.apply, params, tokens)
        q = qjax.quantize_params(params, "nf4_g16_dq", sites)
        adapters = training.lora_init(KEYS[2], q, sites, 4)
        run = training.lora(model.apply)

        @jax.jit
        def step(adapters):
            def loss(adapters):
                logits = jax.nn.log_softmax(run(q, adapters, tokens[:, :-1]))
                return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))

            value, grads = jax.value_and_grad(loss)(adapters)
            return value, jax.tree.map(lambda v, g: v - 2.0 * g, adapters, grads)

        first, adapters = step(adapters)
        assert step(adapters)[0] < first


def test_loftq_against_its_algorithm():
    w = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]
    sites = qjax.find_sites(fn, {"w": w}, jnp.ones((2, 64)))
    q, adapters = training.loftq({"w": w}, "int3_g32", sites, 4, alpha=8.0, iterations=2)
    low = np.zeros_like(w)
    for _ in range(2):
        codes = qjax.quantize(jnp.asarray(w - low), "int3_g32", 0)
        u, s, v = np.linalg.svd(np.float64(w) - np.asarray(qjax.dequantize(codes), np.float64))
        low = np.float32(u[:, :4] * s[:4] @ v[:4])
    moved = np.asarray(qjax.dequantize(q["w"])) != np.asarray(qjax.dequantize(codes))
    assert np.mean(moved) < 0.01  # what lies halfway
    np.testing.assert_allclose(adapters["w"].delta(), low, atol=0.02 * np.abs(low).max())
    assert adapters["w"].alpha == 8
    again = qjax.quantize_params(training.lora_merge(q, adapters), "int8", sites)
    rtn = np.linalg.norm(np.asarray(qjax.dequantize(qjax.quantize(w, "int3_g32", 0))) - w)
    assert np.linalg.norm(np.asarray(qjax.dequantize(again["w"])) - w) < 0.9 * rtn


def test_bad_input():
    fn = CASES["plain"][0]
    params = {"w": jnp.ones((32, 16)), "v": jnp.ones((16, 8))}
    sites = qjax.find_sites(fn, params, X)
    with pytest.raises(ValueError, match=r"targets='x' matches no weight"):
        training.lora_init(KEYS[0], params, sites, 2, targets="x")
    with pytest.raises(ValueError, match=r"v: a rank of 9 .* 16 inputs and 8 outputs; take 1 to 8"):
        training.lora_init(KEYS[0], params, sites, 9)
    adapters = training.lora_init(KEYS[0], params, sites, 2)
    with pytest.raises(ValueError, match=r"adapter of 'v2', but no such parameter \(close: v\)"):
        training.lora(fn)(params, {"v2": adapters["v"]}, X)
    with pytest.raises(ValueError, match=r"w: the adapter is of a weight of shape \(16, 8\)"):
        training.lora_merge(params, {"w": adapters["v"]})
    with pytest.raises(ValueError, match=r"dropout must be"):
        training.lora(fn, dropout=1.0)
