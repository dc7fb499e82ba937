"""Low-precision optimizers beside bitsandbytes, numpy and optax."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import models, training
from qjax.formats import FORMATS
from qjax.sizes import nbytes
from qjax.training import moments

ROOT = pathlib.Path(__file__).parent
GOLDEN = ROOT / "golden" / "bitsandbytes_moments.npz"
TEXT = ROOT.parent / "experiments" / "data" / "moby_dick_calibration.txt"
BITS = [("m", "dynamic8"), ("v", "udynamic8")]


def table(name):
    fmt = FORMATS[name]
    codes = jnp.arange(1 << fmt.bits, dtype=fmt.storage)
    return np.asarray(fmt.decode(codes, jnp.dtype(jnp.float32)))


def nearest(x, values):
    """Indices of the nearest values, the lower of two at the same distance."""
    return np.argmin(np.abs(np.float64(x)[..., None] - np.float64(values)), axis=-1)


@pytest.mark.parametrize(("bits", "signed", "name"), [(8, 0, "udynamic8"), (4, 1, "dynamic4")])
def test_the_dynamic_map_is_that_of_its_paper(bits, signed, name):
    wanted = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2 ** (i + 1 - signed) + 1)
        middles = 10.0 ** (i - bits + 2) * (edges[:-1] + edges[1:]) / 2
        wanted += [*middles, *(-middles if signed else [])]
    np.testing.assert_allclose(table(name), np.sort(wanted), rtol=1e-6)  # rounded to float32 thrice


@pytest.mark.parametrize(("which", "name"), BITS)
def test_moments_beside_bitsandbytes(which, name):
    """Scales and decoded codes to the bit. Its CPU library finds codes in a table of 65,536 steps,
    too coarse for small values: ours are nearest, and no value lies nearer to its code.
    """
    golden = np.load(GOLDEN)
    x, codes = golden[which], golden[f"{which}_codes"]
    held = moments.hold(jnp.asarray(x), name, 256)
    np.testing.assert_array_equal(held.scale.reshape(-1), golden[f"{which}_absmax"])
    theirs = dataclasses.replace(held, qvalue=jnp.asarray(codes))
    decoded = np.asarray(moments.opened(theirs))
    np.testing.assert_array_equal(decoded, golden[f"{which}_dequant"])
    blocks = x.reshape(-1, 256)
    top = golden[f"{which}_absmax"][:, None]
    inverse = np.where(top > 0, 1 / np.where(top > 0, top, 1), 0).astype(np.float32)
    wanted = nearest(blocks * inverse, table(name)).reshape(x.shape)
    ours = np.asarray(held.qvalue)
    assert np.mean(ours != wanted) < 1e-3  # halfway cases: midpoints are rounded to float32
    assert np.max(np.abs(ours.astype(int) - wanted)) <= 1
    assert 0.8 < np.mean(ours == codes) < 1
    error = lambda v: np.abs(v - np.float64(x))
    slack = np.spacing(np.abs(x)) + 1e-7 * np.repeat(top, 256, 1).reshape(x.shape)
    assert np.all(error(np.asarray(moments.opened(held))) <= error(decoded) + slack)


def simulated_adam(steps, grads, shape, rate, decay, maps):
    """AdamW with moments held block-wise, in float64 but for the codes."""
    p, state = np.ones(shape), [np.zeros(shape), np.zeros(shape)]
    for t in range(1, steps + 1):
        g = np.float64(grads[t - 1])
        m, v = 0.9 * state[0] + 0.1 * g, 0.999 * state[1] + 0.001 * g * g
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p - rate * (direction + decay * p)
        for i, x in enumerate((m, v)):
            blocks = x.reshape(-1, 256)
            top = np.abs(blocks).max(1, keepdims=True)
            state[i] = (table(maps[i])[nearest(blocks / top, table(maps[i]))] * top).reshape(shape)
    return p, state


def test_adamw8bit_follows_numpy():
    grads = np.random.default_rng(0).normal(size=(5, 16, 256)).astype(np.float32)
    tx = training.adamw8bit(1e-2, weight_decay=0.1)
    p = {"w": jnp.ones((16, 256)), "b": jnp.ones(8)}
    state = tx.init(p)
    step = jax.jit(tx.update, donate_argnums=1)  # no two leaves of a state share a buffer
    for g in grads:
        updates, state = step({"w": g, "b": g[0, :8]}, state, p)
        p = jax.tree.map(jnp.add, p, updates)
    wanted, (m, v) = simulated_adam(5, grads, (16, 256), 1e-2, 0.1, ("dynamic8", "udynamic8"))
    held_m, held_v = (moments.opened(tree["w"]) for tree in state[0].moments)
    # a value that float32 puts on the other side of a midpoint moves by one code
    for got, exact in ((held_m, m), (held_v, v)):
        assert np.mean(np.abs(got - exact) > 1e-5 * np.abs(exact)) < 5e-3
    assert np.quantile(np.abs(p["w"] - wanted), 0.99) < 1e-6
    # small parameters keep float32 moments: these steps are optax's
    exact = optax.adamw(1e-2, weight_decay=0.1)
    q, other = jnp.ones(8), exact.init(jnp.ones(8))
    with jax.numpy_dtype_promotion("standard"):
        for g in grads:
            updates, other = exact.update(g[0, :8], other, q)
            q = q + updates
    np.testing.assert_allclose(p["b"], q, rtol=1e-5)


def test_lion8bit_follows_its_definition():
    grads = np.random.default_rng(1).normal(size=(4, 16, 256)).astype(np.float32)
    tx = training.lion8bit(0.5, weight_decay=0.25)
    p = jnp.ones((16, 256))
    state = tx.init(p)
    step = jax.jit(tx.update)
    for g in grads:
        m = np.float64(moments.opened(state[0].moments[0]))
        updates, state = step(g, state, p)
        inner = 0.9 * m + 0.1 * g
        clear = np.abs(inner) > 1e-6
        wanted = -0.5 * (np.sign(inner) + 0.25 * np.float64(p))
        np.testing.assert_allclose(np.asarray(updates)[clear], wanted[clear], rtol=1e-5)
        p = p + updates
        held = np.asarray(moments.opened(state[0].moments[0]), np.float64)
        # codes lie at most a tenth of a decade apart: half of it to the nearest
        top = np.abs(0.99 * m + 0.01 * g).max()
        assert np.abs(held - (0.99 * m + 0.01 * g)).max() < 0.05 * top


def test_rank_one_scales():
    v = np.random.default_rng(2).normal(size=(6, 70, 90)).astype(np.float32) ** 2
    v[:, 3] = 0
    held = moments.hold_rank_one(jnp.asarray(v))
    rows = np.minimum(v.max((1, 2))[:, None, None], v.max((0, 2))[None, :, None])
    scale = np.minimum(rows, v.max((0, 1))[None, None])
    error = np.abs(np.asarray(moments.opened(held), np.float64) - v)
    # linear codes 1/16 apart; what lies below the first is held as the first: there is no zero
    assert np.all(error <= scale * np.where(v < scale / 16, 1 / 16, 1 / 32) * (1 + 1e-6))
    assert np.all(np.asarray(moments.opened(held))[v > 0] > 0)


@pytest.mark.parametrize(
    ("tx", "limit"),
    [
        (training.adamw8bit(1e-3), 2.1),
        (training.adamw8bit(1e-3, moments="fp8_e4m3"), 2.1),
        (training.adamw4bit(1e-3), 1.1),
        (training.lion8bit(1e-3), 1.05),
    ],
)
def test_bytes_of_state_per_parameter(tx, limit):
    params = {"w": jnp.zeros((512, 768)), "v": jnp.zeros((4, 512, 512)), "b": jnp.zeros(512)}
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(state, is_leaf=qjax.is_qtensor)
    held = sum(
        nbytes(v)
        if qjax.is_qtensor(v)
        else v.size * jnp.finfo(v.dtype).bits / 8
        if jnp.issubdtype(v.dtype, jnp.floating)
        else v.size * jnp.iinfo(v.dtype).bits / 8
        for v in leaves
    )
    assert held <= limit * sum(v.size for v in jax.tree.leaves(params))


def test_bfloat16_parameters_are_rounded_without_a_bias():
    """16,384 updates of a tenth of a step each: rounding to nearest would lose all of them."""
    tx = optax.chain(optax.sgd(1.0), training.round_stochastically())
    p = jnp.ones((64, 256), jnp.bfloat16)
    tenth = 2.0**-7 / 10
    updates, _ = tx.update(jnp.full((64, 256), -tenth), tx.init(p), p)
    moved = p.astype(jnp.float32) + updates
    assert set(np.unique(moved)) == {1.0, 1 + 2.0**-7}
    np.testing.assert_array_equal(moved, moved.astype(jnp.bfloat16).astype(jnp.float32))
    # a binomial share of 1/10 of 16,384: 5 standard deviations
    assert abs(np.mean(moved > 1) - 0.1) < 5 * np.sqrt(0.09 / 16384)
    float32 = {"w": jnp.ones(3)}
    kept, _ = tx.update({"w": jnp.full(3, 1e-9)}, tx.init(float32), float32)
    np.testing.assert_array_equal(kept["w"], np.full(3, -1e-9, np.float32))


def test_linear_codes_are_unbiased_and_second_moments_never_zero():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 256)) ** 2, jnp.float32)
    held = jax.vmap(lambda k: moments.opened(moments.hold(x, "fp8_e4m3", 256, k)))
    draws = np.asarray(held(jax.random.split(jax.random.key(0), 400)), np.float64)
    spacing = np.maximum(x, 0) * 2.0**-3 + x.max(1, keepdims=True) * 2.0**-9 / 448
    assert np.all(np.abs(draws.mean(0) - x) < 5 * spacing / 2 / np.sqrt(400) + 1e-6)
    tiny = jnp.asarray([[1.0, 1e-30, 0.0]])
    kept = moments.opened(moments.hold(tiny, "fp8_e4m3", 256, jax.random.key(0), positive=True))
    assert kept[0, 1] > 0
    assert kept[0, 2] == 0


@pytest.mark.parametrize("make", [training.adamw8bit, training.adamw4bit])
def test_blocks_do_not_depend_on_the_sharding(make):
    """Shards of 32 columns cut blocks of 256: state and updates stay those of one device."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    grads = np.random.default_rng(4).normal(size=(32, 256)).astype(np.float32)
    tx = make(1e-2)
    step = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))
    wanted = step(grads, jnp.ones((32, 256)))
    place = lambda v: jax.device_put(v, NamedSharding(mesh, P(None, "d")))
    got = step(place(grads), place(jnp.ones((32, 256))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.usefixtures("standard_promotion")
def test_training_in_bfloat16_inside_a_scan():
    x = jax.random.normal(jax.random.key(0), (32, 64))
    target = x @ jax.random.normal(jax.random.key(1), (64, 64))
    tx = training.adamw8bit(optax.constant_schedule(0.05), min_size=1)
    loss = lambda p: jnp.mean((x.astype(jnp.bfloat16) @ p["w"] - target) ** 2)

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), value

    p = {"w": jnp.zeros((64, 64), jnp.bfloat16)}
    (p, _), values = jax.lax.scan(step, (p, tx.init(p)), length=60)
    assert p["w"].dtype == jnp.bfloat16
    assert values[-1] < 0.1 * values[0]


def test_bad_input():
    with pytest.raises(ValueError, match=r"moments 'int8' are unknown.*'dynamic8' or 'fp8_e4m3'"):
        training.adamw8bit(1e-3, moments="int8")
    tx = training.adamw8bit(1e-3)
    with pytest.raises(ValueError, match=r"needs the parameters"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    updates, _ = tx.update(jnp.full(3, jnp.nan), tx.init(jnp.ones(3)), jnp.ones(3))
    assert np.isnan(updates).all()  # what a wrapper such as optax.apply_if_finite looks for


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_500_steps_end_where_float32_ends():
    """A language model's loss, the last 50 of 500 steps, beside float32 AdamW from three seeds."""
    _, _, tokenizer = models.load(ROOT / "golden" / "trained_dense")
    ids = jnp.asarray(tokenizer.encode(TEXT.read_text()), jnp.int32)
    model = models.Decoder(models.Config(1024, 64, 128, 2, 4, 2, 16))
    starts = jax.random.randint(jax.random.key(7), (500, 8), 0, len(ids) - 65)

    def loss(params, batch):
        logits = model.apply(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def final(tx, seed):
        params = model.init(jax.random.key(seed), ids[None, :8])

        def step(carry, begin):
            params, state = carry
            batch = ids[begin[:, None] + jnp.arange(65)]
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        run = jax.jit(lambda carry: jax.lax.scan(step, carry, starts)[1])
        return float(run((params, tx.init(params)))[-50:].mean())

    exact = [final(optax.adamw(3e-3), seed) for seed in range(3)]
    noise = max(exact) - min(exact)
    for name in ("dynamic8", "fp8_e4m3"):
        assert abs(final(training.adamw8bit(3e-3, moments=name), 0) - exact[0]) < noise
    # 4 bits cost more than the seeds differ here: 0.8 % when this was written
    assert final(training.adamw4bit(3e-3), 0) < 1.015 * exact[0]
